"""Checkpoints on disk, and the hand-off of one run's weights to the next."""

from lumos_jax.checkpoints.handoff import Account, transfer
from lumos_jax.checkpoints.manager import CheckpointError, Checkpoints

__all__ = ["Account", "CheckpointError", "Checkpoints", "transfer"]
