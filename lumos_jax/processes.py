"""The flags by which several processes become one program; what main and prepare share."""

from __future__ import annotations

import sys

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


def answer_help(text: str) -> None:
    """Where the command line asks for --help: prints a program's text and its flags, and ends it with exit code 0, which absl's
    own --help does not."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        own = flags.FLAGS.module_help(sys.modules["__main__"]).strip()
        print(f"{text.strip()}\n\nflags (of jax.distributed: --coordinator, --processes, --process):\n{own}")
        sys.exit(0)
