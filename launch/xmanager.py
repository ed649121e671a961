"""Launches runs with XManager (https://github.com/google-deepmind/xmanager), on this machine or on Vertex AI.

    pip install xmanager
    xmanager launch launch/xmanager.py -- --config=configs/i2i.py:desk --workdir=/runs/desk
    xmanager launch launch/xmanager.py -- --executor=vertex --accelerator=A100:8 --config=configs/i2i.py \\
        --workdir=/gcs/BUCKET/xl

The image is made from launch/Dockerfile. On Vertex AI, which asks for GCP_PROJECT and GOOGLE_CLOUD_BUCKET_NAME in the
environment, --workdir is in a bucket, which it mounts below /gcs. Fields are set with --set, as --set=train.steps=1000; a comma
in --sweep, as --sweep=train.seed=0,1,2, makes a work unit of each value.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import app, flags
from xmanager import xm, xm_local

_CONFIG = flags.DEFINE_string("config", None, "As of lumos_jax.main.", required=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "As of lumos_jax.main; each value of a sweep has a directory in it.", required=True
)
_SET = flags.DEFINE_multi_string("set", [], "A field and its value, as train.steps=1000.")
_SWEEP = flags.DEFINE_string("sweep", None, "A field and its values, as train.seed=0,1,2.")
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "vertex"], "Where to run.")
_ACCELERATOR = flags.DEFINE_string("accelerator", None, "vertex: kind:count, as A100:8 or TPU_V3:8; none: CPU.")
_CPU = flags.DEFINE_integer("cpu", 8, "vertex: virtual CPUs.")
_RAM = flags.DEFINE_integer("ram", 32, "vertex: GiB of memory.")

ROOT = pathlib.Path(__file__).parent.parent


def runs() -> list[tuple[str, list[str]]]:
    """(directory, fields) of each work unit."""
    if not _SWEEP.value:
        return [(_WORKDIR.value, list(_SET.value))]
    field, _, values = _SWEEP.value.partition("=")
    if not values:
        raise app.UsageError(f"--sweep={_SWEEP.value} is not field=value,value")
    return [(f"{_WORKDIR.value}/{field}={value}", [*_SET.value, f"{field}={value}"]) for value in values.split(",")]


def executor() -> xm.Executor:
    if _EXECUTOR.value == "local":
        return xm_local.Local()
    kind, _, count = (_ACCELERATOR.value or "").partition(":")
    wanted = {kind: int(count)} if kind else {}
    return xm_local.Vertex(requirements=xm.JobRequirements(cpu=_CPU.value, ram=_RAM.value * xm.GiB, **wanted))


def extra() -> str:
    """The extra of jax that the image needs."""
    kind = _ACCELERATOR.value or ""
    return "tpu" if kind.startswith("TPU") else "cuda12" if kind else "cpu"


def main(_: Sequence[str]) -> None:
    with xm_local.create_experiment(experiment_title="lumos_jax") as experiment:
        where = executor()
        (image,) = experiment.package(
            [
                xm.dockerfile_container(
                    executor_spec=where.Spec(),
                    path=str(ROOT),
                    dockerfile=str(ROOT / "launch" / "Dockerfile"),
                )
            ]
        )
        for workdir, fields in runs():
            arguments = [
                f"--config={_CONFIG.value}",
                f"--workdir={workdir}",
                *(f"--config.{field}" for field in fields),
            ]
            experiment.add(xm.Job(executable=image, executor=where, args=arguments))


if __name__ == "__main__":
    app.run(main)
