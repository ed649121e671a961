"""Worker processes: how they end, and the memory that they share with the trainer.

A worker decodes a batch into an array in shared memory, and Grain sends its name. Grain frees what it was given; what was
decoded ahead when a worker is told to stop, it never saw, so that a worker frees it itself.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import threading
from multiprocessing import util

import numpy as np

from lumos_jax.data.base import Data
from lumos_jax.data.decode import ignore_pillow_warnings

SHARED_FROM = 1 << 16  # bytes; smaller arrays are cheaper to send than to share
STOPPING = (signal.SIGINT, signal.SIGTERM)

_lock = threading.Lock()
_sharing = False  # in a worker process, until it ends
_waiting: dict[str, np.ndarray] = {}  # decoded ahead, not handed to Grain yet


def start(_index: int, _count: int) -> None:
    """In each worker process: leave Ctrl-C and SIGTERM to the trainer, and end when it ends, however that happens."""
    global _sharing
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    ignore_pillow_warnings()
    util.Finalize(None, _free_waiting, exitpriority=0)
    _sharing = True


def _end_with_parent() -> None:
    # Not Linux's parent-death signal: that one fires when the thread ends that started this process.
    multiprocessing.parent_process().join()
    os._exit(1)


def new_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros; in a worker process large arrays are in shared memory."""
    with _lock:
        if not _sharing or math.prod(shape) * dtype.itemsize < SHARED_FROM:
            return np.zeros(shape, dtype)
        from grain.multiprocessing import SharedMemoryArray  # Grain imports JAX; in a worker process both are there

        array = SharedMemoryArray(shape, dtype)  # new memory is zero
        _waiting[array.metadata.name] = array
        return array


def hand_over(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The last stage in a worker: from here on Grain frees the memory."""
    with _lock:
        for array in batch.values():
            if hasattr(array, "metadata"):  # it is in shared memory
                _waiting.pop(array.metadata.name, None)
    return batch


def _free_waiting() -> None:
    global _sharing
    with _lock:
        _sharing = False
        for array in _waiting.values():
            array.metadata.close_and_unlink_shm()
        _waiting.clear()


def check_shared_memory(data: Data, needed: int) -> None:
    """Batches come from workers through /dev/shm, which is small in many containers and ends a process that fills it.
    Raises ValueError: less than `needed` bytes are free."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if needed > free:
        raise ValueError(
            f"config.data.workers={data.workers} needs about {needed / 2**20:.0f} MiB in /dev/shm, which has "
            f"{free / 2**20:.0f} MiB free. Lower data.workers, set data.workers=0 (threads only), or enlarge it "
            "(docker run --shm-size=8g)"
        )
