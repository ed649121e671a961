"""Numbers about what was learned. Knows no trainer."""

from lumos_jax.evaluation.flow import end_point_error, has_optical_flow, optical_flow
from lumos_jax.evaluation.held_out import held_out_loss, make_held_out_step
from lumos_jax.evaluation.neighbours import nearest, neighbour_accuracy
from lumos_jax.evaluation.reconstruction import WINDOW as SSIM_WINDOW
from lumos_jax.evaluation.reconstruction import psnr, ssim
from lumos_jax.scenes.reader import caption_agreement

__all__ = [
    "SSIM_WINDOW",
    "caption_agreement",
    "end_point_error",
    "has_optical_flow",
    "held_out_loss",
    "make_held_out_step",
    "nearest",
    "neighbour_accuracy",
    "optical_flow",
    "psnr",
    "ssim",
]
