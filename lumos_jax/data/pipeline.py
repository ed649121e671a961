"""Batches for one host: order -> read -> decode -> one array, in threads or worker processes, read ahead.

Each element that Grain moves is a whole batch, decoded straight into its array, which workers share with the trainer: nothing
is stacked or copied on the way.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from multiprocessing import resource_tracker

import numpy as np
from absl import flags

from lumos_jax import fileio
from lumos_jax.data import aspect, blocks, order, workers
from lumos_jax.data.base import CorruptRecord, Data, Source
from lumos_jax.data.decode import decode_square, ignore_pillow_warnings
from lumos_jax.data.files import read_file
from lumos_jax.data.records import make_loader
from lumos_jax.data.records.base import HostBatch, Loader, reject

Finish = Callable[[HostBatch], HostBatch]


class BatchIterator(Iterator[HostBatch]):
    """The batches of steps 0 .. count - 1, at most `rows` rows each, read ahead; `close` ends threads and processes."""

    def __init__(self, data: Data, steps: order.Steps, count: int, loader: Loader, rows: int, finish: Finish | None):
        import grain  # imports JAX

        ignore_pillow_warnings()
        finished = functools.partial(_finished, finish=finish, source=loader.source)
        batches = grain.MapDataset.range(count).map(steps).map(loader.load_batch).map(finished)
        threads = 2 if data.workers else 4  # a process
        ahead = threads if data.workers else max(data.prefetch, threads)
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        self._first: futures.Future[HostBatch] | None = None
        if not data.workers:
            self._iterator = iter(dataset)
            self._iterator.start_prefetch()
            return
        each = -(-data.prefetch // data.workers)
        # Decoded ahead in each worker, waiting in its queue, and fetched by Grain's thread here; and the one in use.
        batches = (2 * each + threads + 2) * data.workers + 1
        batch_bytes = rows * sum(dtype.itemsize * math.prod(shape) for dtype, shape in loader.row().values())
        workers.check_shared_memory(data, batches * batch_bytes)
        if not flags.FLAGS.is_parsed():  # Grain reads flags, and not every program parses them
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=each)
        dataset = dataset.map(workers.hand_over).mp_prefetch(processes, worker_init_fn=workers.start)
        options = grain.experimental.DatasetOptions(min_shm_size=workers.SHARED_FROM)
        self._iterator = iter(grain.experimental.WithOptionsIterDataset(dataset, options))
        # Grain starts processes at the first batch, from threads of its own. They inherit the signal mask of this thread, so
        # that a Ctrl-C while workers still import their modules ends in no tracebacks of theirs.
        resource_tracker.ensure_running()  # it would clear the mask
        before = signal.pthread_sigmask(signal.SIG_BLOCK, workers.STOPPING)
        try:
            starter = futures.ThreadPoolExecutor(1, thread_name_prefix="start-workers")
            self._first = starter.submit(next, self._iterator)
            starter.shutdown(wait=False)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __next__(self) -> HostBatch:
        try:
            if self._first is None:
                return next(self._iterator)
            first, self._first = self._first, None
            return first.result()
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise RuntimeError(
                f"a data worker process died ({error}). Exit code -9 usually means that memory ran out, -7 that /dev/shm did: "
                "lower config.data.workers"
            ) from error

    def close(self) -> None:
        if self._first is not None:  # Grain cannot stop workers that it is still starting
            futures.wait([self._first])
        self._iterator.close()


def _finished(batch: HostBatch, finish: Finish | None, source: Source) -> HostBatch:
    """`finish` of a batch; rows for which it raises (a caption that cannot be tokenized) become corrupt records."""
    if finish is None:
        return batch
    try:
        return finish(batch)
    except (MemoryError, ImportError):
        raise
    except Exception:
        wrong = {}
        for row in range(len(batch["weight"])):
            try:
                finish({name: array[row : row + 1] for name, array in batch.items()})
            except Exception as error:  # noqa: BLE001
                wrong[row] = error
        if not wrong:
            raise
        for row, error in wrong.items():
            reject(batch, row, source.describe(int(batch["record"][row])), error)
        return finish(batch)


def make_train_iterator(
    data: Data, source: Source, *, batch_size: int, rows: Sequence[int], start_step: int, finish: Finish | None = None
) -> BatchIterator:
    """Batches of the training order for one host, which reads the given rows of each global batch of `batch_size`.

    finish: what is done to each batch in the threads or processes that decode; picklable.

    Returns:
      An iterator over dicts: the arrays of the sample type (see `records`), as `image` uint8 (len(rows), S, S, 3), or what a
      cache holds instead (`latent` or `image`, and `feature`); `weight` float32 (len(rows),), 0 where a record could not be
      decoded; `record` int64 (len(rows),); `problem` (len(rows),) strings, empty where all is well.

    Raises:
      ValueError: holding out leaves no records, or /dev/shm is too small for config.data.workers.
    """
    assigned = reader = None
    if data.has_buckets:
        assigned = aspect.assign(data, source, batch_size)
        batch_of = aspect.BucketOrder(data, source, assigned, batch_size).batch_of
    else:
        batch_of = functools.partial(
            lambda records, step: (records, step), order.training_order(data, source, batch_size)
        )
    if data.order == "block":
        reader = blocks.BlockReader(order.training_blocks(data, source))
    steps = order.host_steps(batch_of, batch_size=batch_size, rows=rows, start_step=start_step)
    loader = make_loader(data, source, training=True, assigned=assigned, batch_size=batch_size, blocks=reader)
    return BatchIterator(data, steps, sys.maxsize, loader, len(rows), finish)


def make_record_iterator(
    data: Data, source: Source, batches: Sequence[Sequence[int]], finish: Finish | None = None, everything: bool = False
) -> BatchIterator:
    """These batches of records, once, each center-cropped and not mirrored; otherwise as `make_train_iterator`.

    everything: with all that training may choose from, as a cache keeps it.
    """
    loader = make_loader(data, source, training=False, everything=everything)
    rows = max(map(len, batches), default=0)
    return BatchIterator(data, lambda i: [(0, record) for record in batches[i]], len(batches), loader, rows, finish)


def read_batch(data: Data, source: Source, records: Sequence[int], finish: Finish | None = None) -> HostBatch:
    """These records, center-cropped and not mirrored; as `make_train_iterator` returns them."""
    ignore_pillow_warnings()
    batch = make_loader(data, source, training=False).load_batch([(0, record) for record in records])
    return _finished(batch, finish, source)


def load_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """One file -> (size, size, 3) uint8: shorter side resized, center crop. Raises ValueError: it cannot be read or decoded;
    OSError: storage fails."""
    ignore_pillow_warnings()
    try:
        return decode_square(read_file(path), size)
    except OSError as error:
        raise fileio.failure(error, f"{path} cannot be read: {error.strerror or error}") from error
    except CorruptRecord as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
