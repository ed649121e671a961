"""Prepares data for training: python -m lumos_jax.prepare cache --config=configs/i2i.py:desk --out=DIR

cache   runs the frozen encoders of the config over its source, once, and writes latents and features as ArrayRecord shards.
        Train on them with --config.data.source=cached --config.data.path=DIR. The same command continues a stopped one.

Any field can be set on the command line, as --config.data.path=/data/photos; docs/settings.md documents them all.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags, logging
from ml_collections import config_flags

from lumos_jax.cluster import peers, processes
from lumos_jax.config import io as config_io
from lumos_jax.data import TooManyCorruptRecords

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file in configs/, with :desk or :test for its small sizes."
)
_OUT = flags.DEFINE_string(
    "out", None, "The directory to write, new or with a cache that was begun by the same command."
)
_SHARD_RECORDS = flags.DEFINE_integer("shard_records", 4096, "Records a shard; a stopped command loses at most one.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Records encoded at a time, over all devices of a process; default: config.train.batch_size."
)
_DTYPE = flags.DEFINE_string(
    "dtype", "float16", "How latents and features are stored: float16 | bfloat16 | float32 (twice the size)."
)

FAILED, USER_ERROR, STOPPED = 1, 2, 130
_COMMANDS = ("cache",)


def _cache() -> None:
    for name, flag in (("config", _CONFIG), ("out", _OUT)):
        if flag.value is None:
            raise ValueError(f"--{name} is needed, as in: prepare cache --config=configs/i2i.py:desk --out=DIR")
    settings = config_io.resolve(_CONFIG.value)
    processes.join(settings.train)
    from lumos_jax.preparation import cache  # after jax.distributed, which must come before any computation

    size = settings.train.batch_size if _BATCH_SIZE.value is None else _BATCH_SIZE.value
    options = cache.Options(_SHARD_RECORDS.value, size, _DTYPE.value)
    made = cache.write(settings, _OUT.value, options, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{made.records:,} records, {made.undecodable} of them undecodable")
    print(f"train on it with --config.data.source=cached --config.data.path={_OUT.value}")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with processes.ending_together():
        try:
            if argv[1:] != ["cache"]:
                raise ValueError(
                    f"say what to prepare, {' or '.join(_COMMANDS)}, not {' '.join(argv[1:]) or 'nothing'}"
                )
            _cache()
        except ValueError as error:
            logging.debug("preparing failed", exc_info=error)
            print(f"error: {error}", file=sys.stderr)
            processes.give_up(USER_ERROR, str(error))
        except (TooManyCorruptRecords, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            processes.give_up(FAILED, str(error))
        except KeyboardInterrupt:
            print("stopped; the same command continues after the last whole shard", file=sys.stderr)
            processes.give_up(STOPPED, "interrupted")
        peers.leave()


if __name__ == "__main__":
    processes.answer_help(__doc__)
    app.run(main)
