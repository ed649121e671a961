"""Writes a group of records and kills itself within a shard: python -m tests.preparation.killed_writer OUT GROUP SHARD"""

import os
import signal
import sys

from lumos_jax.data import shards
from lumos_jax.preparation import write


def main(out, group, shard):
    count, write_arrayrecord = 0, shards.write_arrayrecord

    def dies(path, records, **options):
        nonlocal count
        count += 1

        def killed():
            for i, record in enumerate(records):
                if count == shard and i == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield record

        return write_arrayrecord(path, killed(), **options)

    shards.write_arrayrecord = dies
    write.run_task(out, group)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
