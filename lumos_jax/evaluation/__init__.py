"""Metrics, one file each. Knows no trainer."""

from lumos_jax.evaluation.flow import end_point_error, has_optical_flow, optical_flow
from lumos_jax.evaluation.held_out import held_out_loss, make_held_out_step
from lumos_jax.evaluation.neighbors import nearest, neighbor_accuracy
from lumos_jax.evaluation.reconstruction import psnr, reconstruction_scores, ssim
from lumos_jax.scenes.reader import caption_agreement

__all__ = [
    "caption_agreement",
    "end_point_error",
    "has_optical_flow",
    "held_out_loss",
    "make_held_out_step",
    "nearest",
    "neighbor_accuracy",
    "optical_flow",
    "psnr",
    "reconstruction_scores",
    "ssim",
]
