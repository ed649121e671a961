"""The flags by which several processes become one program; what main and prepare share."""

from __future__ import annotations

import jax
from absl import flags

_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, to run several processes as one.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are; goes with --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0; goes with --coordinator.")


def join() -> None:
    """Joins the other processes, if --coordinator names a meeting point.

    Raises:
      ValueError: some of the three flags, but not all.
    """
    given = [_COORDINATOR.value, _PROCESSES.value, _PROCESS.value]
    if all(value is None for value in given):
        return
    if any(value is None for value in given):
        raise ValueError("--coordinator, --processes and --process go together: give all three or none")
    jax.distributed.initialize(*given)
