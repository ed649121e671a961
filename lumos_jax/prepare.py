"""Prepares data for training: python -m lumos_jax.prepare cache --config=configs/i2i.py:desk --out=DIR

cache   runs the frozen encoders of the config over its source, once, and writes latents and features as ArrayRecord shards.
        Train on them with --config.data.source=cached --config.data.path=DIR. The same command continues a stopped one.

Any field can be set on the command line, as --config.data.path=/data/photos; docs/settings.md documents them all.
"""

from __future__ import annotations

import sys

from absl import flags

from lumos_jax import cli, cluster, fileio
from lumos_jax.config import io as config_io
from lumos_jax.data import TooManyCorruptRecords

_CONFIG = cli.config_flag()
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


def _cache() -> None:
    settings = config_io.resolve(_CONFIG.value)
    out = fileio.local_directory("--out", _OUT.value)
    cluster.join()
    from lumos_jax.preparation import cache  # after jax.distributed, which must come before any computation

    size = settings.train.batch_size if _BATCH_SIZE.value is None else _BATCH_SIZE.value
    options = cache.Options(_SHARD_RECORDS.value, size, _DTYPE.value)
    made = cache.write(settings, str(out), options, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{made.records:,} records, {made.undecodable} of them undecodable")
    print(f"train on it with --config.data.source=cached --config.data.path={out}")


def main(verb: str) -> None:
    """Prepare as the command line says."""
    try:
        with cli.errors(TooManyCorruptRecords):
            {"cache": _cache}[verb]()
    except SystemExit as stop:
        if stop.code == cli.STOPPED["SIGINT"]:
            print("the same command continues after the last whole shard", file=sys.stderr)
        raise


if __name__ == "__main__":
    cli.run(main, __doc__, required=("config", "out"), verbs=("cache",))
