"""What would make a run fit that does not, from shapes alone: without another compilation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lumos_jax import config
from lumos_jax.planning.ahead import gib
from lumos_jax.planning.job import make_job
from lumos_jax.planning.report import Figures

REMAT = ("none", "dots", "mlp", "full")  # from most memory to least


def ways_over(chips: int) -> list[int]:
    """Numbers of chips that parameters can be split over."""
    return [n for n in range(1, chips + 1) if chips % n == 0]


def with_fsdp(settings: config.Settings, fsdp: int) -> config.Settings:
    return config.replace(settings, {"mesh.fsdp": fsdp})


def suggest(figures: Figures, devices: Sequence[Any]) -> list[str]:
    """Settings to try for a run that did not fit, each with its reason, the most promising first."""
    job, usable = figures.job, figures.target.chip.usable
    settings, now = job.settings, sum(job.resident_bytes().values())
    tips = []
    if now > usable / 2:
        for fsdp in ways_over(job.mesh.size // settings.mesh.context):
            if fsdp <= job.mesh.shape["fsdp"]:
                continue
            split = make_job(with_fsdp(settings, fsdp), devices, job.cached)
            held = sum(split.resident_bytes().values())
            if held < usable / 2:
                tips.append(
                    f"--config.mesh.fsdp={fsdp} splits the state over {fsdp} chips: {gib(held)} on each instead of {gib(now)}, "
                    f"which leaves {gib(usable - held)} for the step"
                )
                break
    for policy in REMAT[REMAT.index(settings.model.remat) + 1 :]:
        tips.append(f"--config.model.remat={policy} saves less of the forward pass and recomputes it")
    per_chip = settings.train.batch_size // (job.mesh.shape["data"] * job.mesh.shape["fsdp"])
    parts = next((n for n in range(2, per_chip + 1) if per_chip % n == 0 and n > settings.optimizer.accumulate), None)
    if parts:
        tips.append(f"--config.optimizer.accumulate={parts} takes the batch in {parts} parts, with the same gradient")
    resident, optimizer = job.resident_bytes(), settings.optimizer
    if now > usable / 4 and optimizer.state_dtype == "float32":
        tips.append(
            f"--config.optimizer.state_dtype=bfloat16 halves the optimizer's {gib(resident['optimizer'])} and the EMA; a "
            "little noise"
        )
    if now > usable / 4 and optimizer.ema_memory == "device":
        tips.append(
            f"--config.optimizer.ema_memory=host keeps the EMA ({gib(resident['ema'])}) in host memory; it is "
            "copied every step"
        )
    return tips or ["more chips, or a smaller network: the state alone does not fit"]
