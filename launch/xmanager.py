"""Launches runs with XManager (https://github.com/google-deepmind/xmanager), on this machine or on Vertex AI.

    pip install xmanager
    python launch/xmanager.py --config=configs/i2i.py:desk --workdir=/runs/desk --sweep=train.seed=0,1,2
    python launch/xmanager.py --executor=vertex --accelerator=A100:8 --config=configs/i2i.py --workdir=/gcs/BUCKET/xl

(`xmanager launch`, which imports a script by its name, would find its own package under this one.)

--executor=local runs launch/local.sh here, in .venv; docker an image of launch/Dockerfile, with --workdir mounted; vertex the
same image on Vertex AI, which asks for GCP_PROJECT and GOOGLE_CLOUD_BUCKET_NAME in the environment and mounts buckets below
/gcs. Fields are set with --set, as --set=train.steps=1000; a comma in --sweep, as --sweep=train.seed=0,1,2, makes a work unit
of each value. Here they run one after another, as each takes all devices, and one that fails does not keep the rest from
running; the code is 1 if any did, which XManager does not tell of containers. Ctrl-C or SIGTERM lets a run save (within the
ten seconds that Docker gives a container) and ends the sweep with code 130 or 143; the same command continues it.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Sequence

sys.path.pop(0)  # this directory, where "xmanager" is this file

from absl import app, flags, logging
from xmanager import xm, xm_local

_CONFIG = flags.DEFINE_string("config", None, "As of lumos_jax.main.", required=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "As of lumos_jax.main; each value of a sweep has a directory in it.", required=True
)
_SET = flags.DEFINE_multi_string("set", [], "A field and its value, as train.steps=1000.")
_SWEEP = flags.DEFINE_string("sweep", None, "A field and its values, as train.seed=0,1,2.")
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "docker", "vertex"], "Where to run.")
_ACCELERATOR = flags.DEFINE_string(
    "accelerator", None, "kind:count; vertex: as A100:8 or TPU_V3:8; docker: LOCAL_GPU:count; none: CPU."
)
_CPU = flags.DEFINE_integer("cpu", 8, "vertex: virtual CPUs.")
_RAM = flags.DEFINE_integer("ram", 32, "vertex: GiB of memory.")

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXTRA = "ARG JAX_EXTRA=tpu"  # the line of the Dockerfile that names the extra of jax
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as lumos_jax.main ends


def directory() -> str:
    """--workdir, as Docker mounts it."""
    return os.path.abspath(_WORKDIR.value) if _EXECUTOR.value == "docker" else _WORKDIR.value


def runs() -> list[tuple[str, list[str]]]:
    """(directory, fields) of each work unit."""
    if not _SWEEP.value:
        return [(directory(), list(_SET.value))]
    field, _, values = _SWEEP.value.partition("=")
    if not values:
        raise app.UsageError(f"--sweep={_SWEEP.value} is not field=value,value")
    return [(f"{directory()}/{field}={value}", [*_SET.value, f"{field}={value}"]) for value in values.split(",")]


def executor() -> xm.Executor:
    kind, _, count = (_ACCELERATOR.value or "").partition(":")
    if kind and (not count.isdecimal() or _EXECUTOR.value == "local"):
        raise app.UsageError(f"--accelerator={_ACCELERATOR.value} is kind:count, of --executor=vertex or docker")
    wanted = {kind: int(count)} if kind else {}
    machine = {"cpu": _CPU.value, "ram": _RAM.value * xm.GiB} if _EXECUTOR.value == "vertex" else {}
    try:
        requirements = xm.JobRequirements(wanted, **machine)
    except KeyError as error:
        raise app.UsageError(f"--accelerator={_ACCELERATOR.value}: XManager knows no {kind}") from error
    if _EXECUTOR.value == "vertex":
        return xm_local.Vertex(requirements)
    mounted = {directory(): directory()} if _EXECUTOR.value == "docker" else {}
    return xm_local.Local(requirements, xm_local.DockerOptions(volumes=mounted))


def packaged(experiment: xm.Experiment, where: xm.Executor) -> xm.Executable:
    """launch/local.sh, or an image with jax for the accelerator."""
    if _EXECUTOR.value == "local":
        return experiment.package([xm.binary(where.Spec(), str(ROOT / "launch" / "local.sh"))])[0]
    kind = _ACCELERATOR.value or ""
    extra = "tpu" if kind.startswith("TPU") else "cuda12" if kind else "cpu"
    text = (ROOT / "launch" / "Dockerfile").read_text()
    assert EXTRA in text
    with tempfile.TemporaryDirectory() as directory:
        dockerfile = pathlib.Path(directory) / "Dockerfile"
        dockerfile.write_text(text.replace(EXTRA, f"ARG JAX_EXTRA={extra}"))
        return experiment.package([xm.dockerfile_container(where.Spec(), str(ROOT), str(dockerfile))])[0]


async def launch(units: list[tuple[str, list[str]]], where: xm.Executor) -> None:
    """Runs all, those on this machine one after another.

    Raises:
      Failed: some of those did not end well.
    """
    failed = []
    async with xm_local.create_experiment("lumos_jax") as experiment:
        executable = packaged(experiment, where)
        for workdir, fields in units:
            arguments = [
                f"--config={_CONFIG.value}",
                f"--workdir={workdir}",
                *(f"--config.{field}" for field in fields),
            ]
            unit = await experiment.add(xm.Job(executable=executable, executor=where, args=arguments))
            if _EXECUTOR.value == "vertex":
                continue
            ended = asyncio.ensure_future(unit.wait_until_complete())
            try:
                await asyncio.shield(ended)
            except xm.ExperimentUnitError:
                failed.append(workdir)
            except asyncio.CancelledError:
                for handle in unit._local_execution_handles:  # XManager itself stops them as it exits, unsaved
                    if _EXECUTOR.value == "local":
                        os.killpg(handle.process.pid, signal.SIGTERM)  # of the shell that leads the run's session
                    else:
                        handle.terminate()
                await asyncio.gather(ended, return_exceptions=True)
                raise  # behind which XManager waits for the end of what the run prints
        if failed:
            raise Failed(failed)  # within: XManager would otherwise wait for all again, and print each one's traceback


class Failed(Exception):
    """Directories of runs that failed."""


async def until_stopped(units: list[tuple[str, list[str]]], where: xm.Executor) -> int:
    """Launches them; the exit code."""
    loop, caught = asyncio.get_running_loop(), []
    launching = asyncio.ensure_future(launch(units, where))

    def catch(number):
        caught.append(number)
        launching.cancel()

    for number in STOPPED:
        loop.add_signal_handler(number, catch, number)
    try:
        await launching
    except Failed as error:
        print("error: these failed:", *error.args[0], sep="\n  ", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        return STOPPED[caught[0]]
    return 0


def main(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    sys.exit(asyncio.run(until_stopped(runs(), executor())))


if __name__ == "__main__":
    app.run(main)
