"""The allocator setting of `launch/` for CPUs, for benchmarks that are started without it."""

from __future__ import annotations

import os
import sys

# See launch/environment.sh.
TUNABLES = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", "trim_threshold=1073741824", "top_pad=67108864", "arena_max=1")
)


def restart_with_tunables() -> None:
    """Starts this program again with the setting, unless the environment has its own: glibc reads it when a process starts."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
