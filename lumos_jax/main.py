"""Trains: python -m lumos_jax.main --config=configs/i2i.py:desk --workdir=runs/desk

Any field can be set on the command line, as --config.train.steps=40; docs/settings.md documents them all. The same
command continues a run that was stopped.
"""

from __future__ import annotations

from absl import flags

from lumos_jax import checkpoints, cli, cluster
from lumos_jax.config import io as config_io

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory: checkpoints, metrics, samples.")


def main() -> int:
    """Train as the flags say; return the run's exit code."""
    checkpoints.quiet_logs()
    with cli.errors(checkpoints.CheckpointError):
        settings = config_io.resolve(_CONFIG.value)
        cluster.join()
        from lumos_jax.train import loop  # after jax.distributed, which must come before any computation

        run = loop.prepare(settings, _WORKDIR.value)
    return loop.train(run)


if __name__ == "__main__":
    cli.run(main, __doc__, required=("config", "workdir"))
