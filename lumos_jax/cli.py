"""Shared entry of the command-line programs: flags, --help, one line an error, and exit codes.

0 done; 1 failed, and the same command may succeed; 2 a user's mistake, which launchers do not retry; 130 and 143 after SIGINT
and SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
from absl import flags, logging

from lumos_jax import cluster

FAILED, USER_ERROR = 1, 2
STOPPED = {"SIGINT": 130, "SIGTERM": 143}  # as a shell reports them
# How errors of JAX's runtime begin, ValueErrors among them, as where another process is gone.
_RUNTIME = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): ")


@contextlib.contextmanager
def errors(*failures: type[Exception]) -> Iterator[None]:
    """Turn exceptions into one line on stderr and SystemExit: ValueError with code 2, OSError and `failures` with code 1."""
    try:
        yield
    except ValueError as error:
        logging.debug("user error", exc_info=error)
        _stop(error, FAILED if jax.distributed.is_initialized() and _RUNTIME.search(str(error)) else USER_ERROR)
    except (OSError, *failures) as error:
        logging.debug("failed", exc_info=error)
        _stop(error, FAILED)
    except KeyboardInterrupt:
        _stop("interrupted", STOPPED["SIGINT"])


def _stop(error: BaseException | str, code: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


def run(main: Callable[[list[str]], int | None], text: str, *, required: Sequence[str] = ()) -> NoReturn:
    """Parse the absl flags, call `main` with what is left, and exit with the code that it returns or raises.

    Args:
      main: takes positional arguments, the program's name first.
      text: for --help, which also lists the program's own flags.
      required: flags that must be given.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        own = flags.FLAGS.module_help(sys.modules["__main__"]).strip()
        print(f"{text.strip()}\n\nflags (of jax.distributed: --coordinator, --processes, --process):\n{own}")
        sys.exit(0)
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    arguments = _parse(required)
    code = FAILED
    try:
        code = main(arguments) or 0
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:  # a second one, while the first is waiting for a step
        code = STOPPED["SIGINT"]
    except BaseException:
        traceback.print_exc()
    # After a failure nothing is waited for: other processes, or threads of a write that failed and would print their tracebacks.
    if code == FAILED or (code == USER_ERROR and jax.distributed.is_initialized()):
        cluster.end(code)
    sys.exit(code)


def _parse(required: Sequence[str]) -> list[str]:
    try:
        arguments = flags.FLAGS(sys.argv)
        missing = [f"--{name}" for name in required if flags.FLAGS[name].value in (None, [])]
    except Exception as error:  # config files run code of their own
        logging.debug("parsing failed", exc_info=error)
        named = type(error) in (ValueError, FileNotFoundError) or isinstance(error, flags.Error)
        lines = str(error).strip().splitlines() or [""]
        _stop(lines[0] if named else f"{_place(error)}{type(error).__name__}: {lines[0]}", USER_ERROR)
    if missing:
        _stop(f"missing {' and '.join(missing)}; see --help", USER_ERROR)
    return arguments


def _place(error: BaseException) -> str:
    """The file and line of ours or the user's where an error was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "-packages" not in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Raise ValueError if there are positional arguments."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; fields are set as --config.group.field=value")


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        _stop(f"{message}; see {self.prog} --help", USER_ERROR)
