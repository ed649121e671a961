"""Trains: python -m lumos_jax.main --config=configs/i2i.py:desk --workdir=runs/desk

Any field can be set on the command line, as --config.train.steps=40; docs/settings.md documents them all. The same
command continues a run that was stopped.
"""

from __future__ import annotations

import os
import sys

# TensorFlow only writes TensorBoard events here; it need not announce itself for that.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags, logging
from ml_collections import config_flags

from lumos_jax.checkpoints import CheckpointError
from lumos_jax.cluster import peers, processes
from lumos_jax.config import io as config_io

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/, with :desk or :test for its small sizes."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory: checkpoints, metrics, samples.")

USER_ERROR = 2


def main(argv: list[str]) -> None:
    """Trains as the flags say, and exits with the run's code."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Fields are set as --config.group.field=value")
    logging.set_verbosity(logging.WARNING)
    with processes.ending_together():
        try:
            settings = config_io.resolve(_CONFIG.value)
            processes.join(settings.train)
            from lumos_jax.train import loop  # after jax.distributed, which must come before any computation

            run = loop.prepare(settings, _WORKDIR.value)
        except (ValueError, CheckpointError) as error:
            logging.debug("setting up failed", exc_info=error)
            peers.await_verdict(error)  # ends the process if another one is gone, as its reason may well be
            print(f"error: {error}", file=sys.stderr)
            processes.give_up(USER_ERROR if isinstance(error, ValueError) else processes.FAILED, str(error))
        code = loop.train(run)
        if code == loop.FAILED:
            # All is closed and said. Threads of a write that failed would print their tracebacks below it as Python ends.
            processes.end(code)
        peers.leave()
    sys.exit(code)


if __name__ == "__main__":
    processes.answer_help(__doc__)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
