"""What makes the compilation of tiny networks cheap, most of their time: programs that all processes of a test run share."""

import gc
import os
import pathlib
import threading


def write_whole():
    """Lets JAX write each entry of its compilation cache in one piece, so that processes may share a directory."""
    from jax._src import lru_cache

    def put(self, key, value):
        path = pathlib.Path(os.fspath(self.path)) / f"{key}{lru_cache._CACHE_SUFFIX}"
        if not path.exists():
            partial = path.with_name(f"{key}.{os.getpid()}.{threading.get_ident()}")
            partial.write_bytes(value)
            partial.replace(path)

    lru_cache.LRUCache.put = put


def keep_what_all_compile():
    """JAX lets process 0 alone write to the compilation cache. On CPU each process looks for entries of its own, as they hold
    its devices: process 1 would compile everything anew at each start."""
    from jax._src import compiler, distributed

    write, state = compiler._cache_write, distributed.global_state

    def write_own(*entry):
        own, state.process_id = state.process_id, 0
        try:
            write(*entry)
        finally:
            state.process_id = own

    compiler._cache_write = write_own


def collect_rarely():
    """Tracing makes many objects and few cycles: a tenth of its time is garbage collection, at Python's thresholds."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
