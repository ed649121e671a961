"""Diffusion as pure functions: schedule, noising and targets, losses, guidance, samplers. Knows no network and no task."""

from lumos_jax.diffusion.guidance import guided
from lumos_jax.diffusion.loss import loss_terms
from lumos_jax.diffusion.process import (
    Process,
    corrupt,
    make_process,
    network_time,
    sample_timesteps,
    target,
    timestep_quartile,
)
from lumos_jax.diffusion.samplers import SAMPLERS, Carry, Tables, normal_rows, sample, stages, start, step

__all__ = [
    "SAMPLERS",
    "Carry",
    "Process",
    "Tables",
    "corrupt",
    "guided",
    "loss_terms",
    "make_process",
    "network_time",
    "normal_rows",
    "sample",
    "sample_timesteps",
    "stages",
    "start",
    "step",
    "target",
    "timestep_quartile",
]
