"""Networks that are trained: the diffusion transformer and its conditions."""

from __future__ import annotations

from lumos_jax.models.conditioning import PARTS, Condition
from lumos_jax.models.dit import DiT, make_dit

__all__ = ["PARTS", "Condition", "DiT", "make_dit"]
