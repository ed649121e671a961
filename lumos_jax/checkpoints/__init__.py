"""Checkpoints on disk, and the hand-off of one run's weights to the next."""

from lumos_jax.checkpoints.handoff import Account, transfer
from lumos_jax.checkpoints.manager import CheckpointError, Checkpoints, quiet_logs

__all__ = ["Account", "CheckpointError", "Checkpoints", "quiet_logs", "transfer"]
