"""Finds images that kill the process which decodes them, by bisection: ranges of an input are scanned in child processes.

python -m lumos_jax.preparation.quarantine OUT INPUT FIRST LAST   measures the rows from FIRST to LAST - 1 of an input
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import lumos_jax
from lumos_jax.preparation import candidates, plan
from lumos_jax.preparation.readers import DamagedInput


def crashing(out: str, number: int) -> set[int]:
    """Rows of an input whose images kill their process. Raises DamagedInput: reading the input does so already."""
    code, count = _child(out, number, 0, 0)
    if code < 0:
        raise DamagedInput(f"reading it kills the process (signal {-code})")
    found, pending = set(), [(0, count)] if count else []
    while pending:
        first, last = pending.pop()
        if _child(out, number, first, last)[0] >= 0:  # the scan raises a Python error itself
            continue
        if last - first == 1:
            found.add(first)
        else:
            middle = (first + last) // 2
            pending += [(first, middle), (middle, last)]
    return found


def _child(out: str, number: int, first: int, last: int) -> tuple[int, int]:
    """(exit code, negative for a signal; number of candidates in the input)."""
    root = pathlib.Path(lumos_jax.__file__).parent.parent
    paths = os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", __name__, out, *map(str, (number, first, last))]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    return done.returncode, int(done.stdout or 0) if done.returncode == 0 else 0


if __name__ == "__main__":
    made, part = plan.read(sys.argv[1]), range(*map(int, sys.argv[3:5]))
    print(candidates.scan_input(made.settings, made.inputs[int(sys.argv[2])], part=part).read)
