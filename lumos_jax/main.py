"""Trains: python -m lumos_jax.main --config=configs/i2i.py:desk --workdir=runs/desk

Any field can be set on the command line, as --config.train.steps=40; docs/settings.md documents them all. The same
command continues a run that was stopped.
"""

from __future__ import annotations

import os

# TensorFlow only writes TensorBoard events here; it need not announce itself for that.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import flags
from ml_collections import config_flags

from lumos_jax import checkpoints, cli, cluster
from lumos_jax.config import io as config_io

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/, with :desk or :test for its small sizes."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory: checkpoints, metrics, samples.")


def main(arguments: list[str]) -> int:
    """Train as the flags say; return the run's exit code."""
    checkpoints.quiet_logs()
    with cli.errors(checkpoints.CheckpointError):
        cli.refuse_arguments(arguments)
        settings = config_io.resolve(_CONFIG.value)
        cluster.join()
        from lumos_jax.train import loop  # after jax.distributed, which must come before any computation

        run = loop.prepare(settings, _WORKDIR.value)
    return loop.train(run)


if __name__ == "__main__":
    cli.run(main, __doc__, required=("config", "workdir"))
