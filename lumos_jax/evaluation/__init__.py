"""Metrics, one file each. Knows no trainer."""

from lumos_jax.evaluation.held_out import held_out_loss, make_held_out_step
from lumos_jax.evaluation.neighbors import nearest, neighbor_accuracy, retrieval_accuracy
from lumos_jax.evaluation.reconstruction import reconstruction_scores
from lumos_jax.scenes.reader import caption_agreement

__all__ = [
    "caption_agreement",
    "held_out_loss",
    "make_held_out_step",
    "nearest",
    "neighbor_accuracy",
    "reconstruction_scores",
    "retrieval_accuracy",
]
