"""Shared entry of the command-line programs: flags, --help, one line an error, and exit codes.

0 done; 1 failed, and the same command may succeed; 2 a user's mistake, which launchers do not retry; 130 and 143 after SIGINT
and SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA says on its own what concerns nobody

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from lumos_jax import cluster
from lumos_jax.config import migration
from lumos_jax.exit_codes import FAILED, STOPPED, USER_ERROR

flags.disclaim_key_flags()  # --config is a flag of the program that calls config_flag

# How errors of JAX's runtime begin, ValueErrors among them, as where another process is gone.
_RUNTIME = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): ")


@contextlib.contextmanager
def errors(*failures: type[Exception]) -> Iterator[None]:
    """Turn exceptions into one line on stderr and SystemExit: ValueError with code 2, OSError and `failures` with code 1."""
    try:
        yield
    except ValueError as error:
        if cluster.is_distributed() and _RUNTIME.search(str(error)):
            raise
        logging.debug("user error", exc_info=error)
        _stop(error, USER_ERROR)
    except (OSError, *failures) as error:
        logging.debug("failed", exc_info=error)
        _stop(error, FAILED)
    except KeyboardInterrupt:
        _stop("interrupted", STOPPED["SIGINT"])


def call(action: Callable[[], int | None], *failures: type[Exception]) -> int:
    """The exit code of `action`: what it returns, or that of `errors`."""
    try:
        with _interrupts(), errors(*failures):
            return action() or 0
    except SystemExit as stop:
        return stop.code


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Sends Ctrl-C again where its exception was lost: what is raised in a finalizer or in a callback of the garbage collector,
    as JAX has one, Python reports and ignores, and the program would go on."""
    before = sys.unraisablehook

    def hook(lost) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()  # when this hook is left
        else:
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _stop(error: BaseException | str, code: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


def changed_config(path: str | None, default: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """The config file, or `default` where none is given, with fields changed by flags --config.group.field=value. Ends the
    program where either is wrong."""
    values = flags.FlagValues()
    try:
        if path is None:
            tree = ConfigDict(default, convert_dict=True)
            config_flags.DEFINE_config_dict("config", tree, flag_values=values)
        else:
            config_flags.DEFINE_config_file("config", None, "", flag_values=values)
            changes = [f"--config={path}", *changes]
        values([sys.argv[0], *changes])
        return values.config.to_dict()
    except Exception as error:  # noqa: BLE001 (config files run code of their own)
        logging.debug("parsing failed", exc_info=error)
        _stop(_describe(error), USER_ERROR)


def config_flag() -> flags.FlagHolder:
    """The flag --config of a program that takes a config file and changes of its fields."""
    return config_flags.DEFINE_config_file(
        "config", None, "A file in configs/, with :desk or :test for its small sizes."
    )


def run(
    main: Callable[..., int | None], text: str, *, required: Sequence[str] = (), verbs: Sequence[str] = ()
) -> NoReturn:
    """Parse the absl flags, call `main`, and exit with the code that it returns or raises.

    Args:
      main: takes the verb, where there are any.
      text: for --help, which also lists the program's own flags.
      required: flags that must be given.
      verbs: of which one must be given.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        own = flags.FLAGS.module_help(sys.modules["__main__"]).strip()
        print(f"{text.strip()}\n\nflags (of jax.distributed: --coordinator, --processes, --process):\n{own}")
        sys.exit(0)
    words = _parse(required)[1:]
    if verbs and (len(words) != 1 or words[0] not in verbs):
        _stop(f"name what to do, {' or '.join(verbs)}, not {' '.join(words) or 'nothing'}", USER_ERROR)
    if words and not verbs:
        _stop(f"unexpected argument {words[0]!r}; fields are set as --config.group.field=value", USER_ERROR)
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    code = FAILED
    try:
        with _interrupts():
            code = main(*words) or 0
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:  # a second one, while the first is waiting for a step
        code = STOPPED["SIGINT"]
    except Exception as error:  # noqa: BLE001 (reported with its traceback)
        _report_fault(error)
    # After a failure wait neither for other processes nor for threads whose write failed, which would print tracebacks.
    if code == FAILED or (code == USER_ERROR and cluster.is_distributed()):
        cluster.end(code)
    sys.exit(code)


def _report_fault(error: Exception) -> None:
    """The traceback of an error that nobody expected, or one line where JAX lost another process."""
    text = str(error).strip().splitlines() or [""]
    if cluster.is_distributed() and _RUNTIME.search(text[0]):
        print(f"error: another process is gone, or this one cannot reach it: {text[0]}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def _parse(required: Sequence[str]) -> list[str]:
    """The positional arguments; ends the program where flags or the config file are wrong."""
    logging.set_verbosity(logging.FATAL)  # what is wrong is reported below
    try:
        arguments = flags.FLAGS(sys.argv)
        given = {name: flags.FLAGS[name].value for name in required}
        if given.get("config") is not None:
            given["config"].to_dict()  # where a file that cannot be read raises OSError
    except Exception as error:  # noqa: BLE001 (config files run code of their own)
        logging.debug("parsing failed", exc_info=error)
        _stop(_describe(error), USER_ERROR)
    missing = [f"--{name}" for name, value in given.items() if value in (None, [])]
    if missing:
        _stop(f"missing {' and '.join(missing)}; see --help", USER_ERROR)
    return arguments


def _describe(error: Exception) -> str:
    """One line about an error of parsing flags or running a config file."""
    lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines() if line.strip()] or [""]
    if isinstance(error, OSError):
        return f"--config: {lines[-1]}"
    if isinstance(error, flags.Error):  # raised in a config file, with its traceback, or by absl
        return f"{lines[0].removesuffix(' Error whilst parsing config file:')} {lines[-1]}" if lines[1:] else lines[0]
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in own if "-packages" not in frame.filename]
    if isinstance(error, (AttributeError, KeyError)) and not own:  # ml_collections: a field that does not exist
        name = lines[0].strip("'\\\"")
        where = next((word for word in sys.argv if f".{name}" in word), name)
        if known := migration.advice(where.partition("=")[0].removeprefix("--config.")):
            return f"{where}: {known}; see docs/settings.md"
        return f"unknown field {name} in {where}. {' '.join(lines[1:])}".strip("\"' ")
    place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    return f"--config: {place}{type(error).__name__}: {' '.join(lines)}"


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are ValueErrors of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")
