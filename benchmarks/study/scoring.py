"""Scores of one finished run: commands of `lumos_jax.evaluate`, one after another in one process, which imports JAX once.

python -m benchmarks.study.scoring '[["sample", ...], ["score", ...]]'
"""

from __future__ import annotations

import json
import sys

from lumos_jax import evaluate
from lumos_jax.checkpoints import quiet_logs


def main(commands: list[list[str]]) -> int:
    """The exit code of the first command that fails, else 0."""
    quiet_logs()
    for arguments in commands:
        print("evaluate", *arguments, flush=True)
        if code := evaluate.main(arguments):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
