"""Numbers about what was learned. Knows no trainer."""

from lumos_jax.evaluation.held_out import held_out_loss, make_held_out_step

__all__ = ["held_out_loss", "make_held_out_step"]
