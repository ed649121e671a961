"""Batches for one host: order -> read -> decode -> one array, in threads or worker processes, read ahead.

Each element that Grain moves is a whole batch, decoded straight into its array, which workers share with the trainer: nothing
is stacked or copied on the way.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from lumos_jax import config
from lumos_jax.data import buckets, clips, loaders, order, workers
from lumos_jax.data.decode import UndecodableImage, decode_square
from lumos_jax.data.loaders import HostBatch
from lumos_jax.data.sources import Source

Finish = Callable[[HostBatch], HostBatch]


class BatchIterator(Iterator[HostBatch]):
    """The batches of `steps` (step -> (position, record) pairs, at most `rows` of them), read ahead from the beginning;
    `close` ends threads and processes."""

    def __init__(
        self,
        data: config.Data,
        steps: grain.MapDataset,
        loader: loaders.BatchLoader,
        rows: int,
        finish: Finish | None = None,
    ):
        steps = steps.map(loader)
        if finish is not None:
            steps = steps.map(finish)
        batch_bytes = rows * sum(dtype.itemsize * math.prod(shape) for dtype, shape in loader.row().values())
        ahead = max(data.prefetch, data.threads) if not data.workers else data.threads
        dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead))
        self._first: futures.Future[HostBatch] | None = None
        if not data.workers:
            self._iterator = iter(dataset)
            self._iterator.start_prefetch()
            return
        each = -(-data.prefetch // data.workers)
        # Decoded ahead in each worker, waiting in its queue, and fetched by Grain's thread here; and the one in use.
        batches = (2 * each + data.threads + 2) * data.workers + 1
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
                "lower config.data.workers or config.data.prefetch"
            ) from error

    def close(self) -> None:
        if self._first is not None:  # Grain cannot stop workers that it is still starting
            futures.wait([self._first])
            self._first = None
        self._iterator.close()


def make_train_iterator(
    data: config.Data,
    source: Source,
    *,
    batch_size: int,
    rows: Sequence[int],
    start_step: int,
    finish: Finish | None = None,
) -> BatchIterator:
    """Batches of the training order for one host.

    Args:
      data: config.data.
      source: as `make_source` gives it.
      batch_size: B, rows of the global batch.
      rows: the rows, within [0, B), that this host reads.
      start_step: the first step.
      finish: what is done to each batch in the threads or processes that decode; picklable.

    Returns:
      An iterator over dicts: `image` uint8 (len(rows), S, S, 3) (with config.data.buckets, (len(rows), h, w, 3) of the step's
      bucket, and `size`), or what a cache holds instead (`latent` or `image`, and
      `feature`); `weight` float32 (len(rows),), 0 where a record could not be
      decoded; `record` int64 (len(rows),); `problem` (len(rows),) strings, empty where all is well.

    Raises:
      ValueError: holding out leaves no records, or /dev/shm is too small for config.data.workers.
    """
    assigned, where = None, {"batch_size": batch_size, "rows": tuple(rows), "start_step": start_step}
    if data.buckets:
        assignment = buckets.assign(data, source, batch_size)
        steps, assigned = buckets.BucketSteps(data, source, assignment, **where), assignment.bucket_of
    else:
        steps = order.HostSteps(order.training_order(data, source), **where)
    loader = loaders.make_loader(data, source, training=True, assigned=assigned)
    if isinstance(loader, clips.Clips):
        loader = clips.joint(data, loader, batch_size)
    return BatchIterator(data, steps, loader, len(rows), finish)


def make_record_iterator(
    data: config.Data,
    source: Source,
    batches: Sequence[Sequence[int]],
    finish: Finish | None = None,
    everything: bool = False,
) -> BatchIterator:
    """These batches of records, once, each centre-cropped and not mirrored; otherwise as `make_train_iterator`.

    everything: with all that training may choose from, as a cache keeps it.
    """
    loader = loaders.make_loader(data, source, training=False, everything=everything)
    return BatchIterator(data, order.Listed(batches), loader, max(map(len, batches), default=0), finish)


def read_batch(data: config.Data, source: Source, records: Sequence[int], finish: Finish | None = None) -> HostBatch:
    """These records, centre-cropped and not mirrored; as `make_train_iterator` returns them."""
    batch = loaders.make_loader(data, source, training=False).map([(0, record) for record in records])
    return batch if finish is None else finish(batch)


def load_image(path: str | os.PathLike, size: int) -> np.ndarray:
    """One file -> (size, size, 3) uint8: shorter side resized, centre crop.

    Raises:
      ValueError: it cannot be read or decoded.
    """
    try:
        with open(path, "rb") as file:
            return decode_square(file.read(), size)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UndecodableImage as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
