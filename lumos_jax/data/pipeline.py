"""Batches for one host: order -> read -> decode -> one array, in threads or worker processes, read ahead.

Each element that Grain moves is a whole batch, decoded straight into its array, which workers share with the trainer: nothing
is stacked or copied on the way.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent import futures
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from lumos_jax import config
from lumos_jax.data import cached, order, workers
from lumos_jax.data.decode import UndecodableImage, decode_square, fit_square
from lumos_jax.data.sources import Source

HostBatch = dict[str, np.ndarray]
Row = dict[str, tuple[np.dtype, tuple[int, ...]]]  # of the arrays of a batch: name -> dtype and shape of one row
_PROBLEM_LENGTH, _REASON_LENGTH = 240, 100  # characters


@dataclasses.dataclass(frozen=True)
class Loader(grain.transforms.Map):
    """(position, record) pairs -> HostBatch."""

    source: Source
    size: int
    seed: int
    random_crop: bool
    flip: bool

    def map(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        batch = _new_batch(element, self.row())
        for row, (position, record) in enumerate(element):
            try:
                batch["image"][row] = self._load(position, record)
            except (UndecodableImage, OSError) as error:
                _reject(batch, row, f"{self.source.describe(record)}: {str(error)[:_REASON_LENGTH]}")
        return batch

    def row(self) -> Row:
        return {"image": (np.dtype(np.uint8), (self.size, self.size, 3))}

    def _load(self, position: int, record: int) -> np.ndarray:
        data = self.source.read(record)
        shift, flip = 0.5, False
        if self.random_crop or self.flip:
            # The record's own stream: nothing is carried from one record to the next.
            key = np.array([self.seed % 2**64, position], np.uint64)
            draw = np.random.Generator(np.random.Philox(key=key)).random(2)
            shift = float(draw[0]) if self.random_crop else 0.5
            flip = self.flip and draw[1] < 0.5
        if isinstance(data, np.ndarray):
            return fit_square(data, self.size, shift=shift, flip=flip)
        return decode_square(data, self.size, shift=shift, flip=flip)


@dataclasses.dataclass(frozen=True)
class CachedLoader(grain.transforms.Map):
    """(position, record) pairs -> HostBatch of what a cache holds; see `data.cached`."""

    source: Source
    arrays: Row

    def map(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        batch = _new_batch(element, self.arrays)
        for row, (_, number) in enumerate(element):
            try:
                record = cached.decode_record(self.source.read(number))
                held = {name: (array.dtype, array.shape) for name, array in record.arrays.items()}
                if record.number != number or held != self.arrays:
                    raise ValueError("another record than the manifest says")
            except (ValueError, OSError) as error:
                _reject(batch, row, f"{self.source.describe(number)}: {str(error)[:_REASON_LENGTH]}")
                continue
            if not record.weight:
                _reject(batch, row, record.problem)
            for name, array in record.arrays.items():
                batch[name][row] = array
        return batch

    def row(self) -> Row:
        return self.arrays


def _new_batch(element: Sequence[tuple[int, int]], row: Row) -> HostBatch:
    """Zeros of weight 1 for these (position, record) pairs."""
    count = len(element)
    batch = {name: workers.new_array((count, *shape), dtype) for name, (dtype, shape) in row.items()}
    return batch | {
        "weight": np.ones(count, np.float32),
        "record": np.array([record for _, record in element], np.int64),
        "problem": np.zeros(count, f"<U{_PROBLEM_LENGTH}"),
    }


def _reject(batch: HostBatch, row: int, problem: str) -> None:
    batch["weight"][row] = 0.0
    batch["problem"][row] = problem[-_PROBLEM_LENGTH:]  # the end of a path and the reason say most


def _loader(data: config.Data, source: Source, *, training: bool) -> Loader | CachedLoader:
    if data.source == "cached":
        arrays = cached.read_manifest(data.path).arrays
        return CachedLoader(source, {name: (np.dtype(dtype), shape) for name, (dtype, shape) in arrays.items()})
    return Loader(source, data.image_size, data.seed, training and data.crop == "random", training and data.flip)


class BatchIterator(Iterator[HostBatch]):
    """The batches of `steps` (step -> (position, record) pairs, at most `rows` of them), read ahead from the beginning;
    `close` ends threads and processes."""

    def __init__(self, data: config.Data, steps: grain.MapDataset, loader: Loader | CachedLoader, rows: int):
        steps = steps.map(loader)
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
    data: config.Data, source: Source, *, batch_size: int, rows: Sequence[int], start_step: int
) -> BatchIterator:
    """Batches of the training order for one host.

    Args:
      data: config.data.
      source: as `make_source` gives it.
      batch_size: B, rows of the global batch.
      rows: the rows, within [0, B), that this host reads.
      start_step: the first step.

    Returns:
      An iterator over dicts: `image` uint8 (len(rows), S, S, 3), or what a cache holds instead (`latent` or `image`, and
      `feature`); `weight` float32 (len(rows),), 0 where a record could not be
      decoded; `record` int64 (len(rows),); `problem` (len(rows),) strings, empty where all is well.

    Raises:
      ValueError: holding out leaves no records, or /dev/shm is too small for config.data.workers.
    """
    positions = order.training_order(data, source)
    steps = order.HostSteps(positions, batch_size=batch_size, rows=tuple(rows), start_step=start_step)
    return BatchIterator(data, steps, _loader(data, source, training=True), len(rows))


def make_record_iterator(data: config.Data, source: Source, batches: Sequence[Sequence[int]]) -> BatchIterator:
    """These batches of records, once, each centre-cropped and not mirrored; otherwise as `make_train_iterator`."""
    loader = _loader(data, source, training=False)
    return BatchIterator(data, order.Listed(batches), loader, max(map(len, batches), default=0))


def read_batch(data: config.Data, source: Source, records: Sequence[int]) -> HostBatch:
    """These records, centre-cropped and not mirrored; as `make_train_iterator` returns them."""
    return _loader(data, source, training=False).map([(0, record) for record in records])


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
