"""The trained network: the diffusion transformer and its conditions."""

from __future__ import annotations

from lumos_jax.models.conditioning import PARTS, Condition
from lumos_jax.models.network import Network, make_dit, position_scale

__all__ = ["PARTS", "Condition", "Network", "make_dit", "position_scale"]
