"""Batches for one host: order -> read -> decode -> one array, in threads or worker processes, read ahead.

Each element that Grain moves is a whole batch, decoded straight into its array: nothing is stacked or copied on the way.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags

from lumos_jax import config
from lumos_jax.data import order
from lumos_jax.data.decode import UndecodableImage, decode_square
from lumos_jax.data.sources import Source

HostBatch = dict[str, np.ndarray]
_PROBLEM = "<U240"


@dataclasses.dataclass(frozen=True)
class Loader(grain.transforms.Map):
    """(position, record) pairs -> HostBatch."""

    source: Source
    size: int
    seed: int
    random_crop: bool
    flip: bool

    def map(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        count = len(element)
        batch = {
            "image": np.zeros((count, self.size, self.size, 3), np.uint8),
            "weight": np.ones(count, np.float32),
            "record": np.array([record for _, record in element], np.int64),
            "problem": np.zeros(count, _PROBLEM),
        }
        for row, (position, record) in enumerate(element):
            try:
                batch["image"][row] = self._load(position, record)
            except (UndecodableImage, OSError) as error:
                batch["weight"][row] = 0.0
                batch["problem"][row] = f"{self.source.describe(record)}: {error}"[-240:]
        return batch

    def _load(self, position: int, record: int) -> np.ndarray:
        data = self.source.read(record)
        shift, flip = 0.5, False
        if self.random_crop or self.flip:
            # The record's own stream: nothing is carried from one record to the next.
            draw = np.random.Generator(np.random.Philox(key=[self.seed, position])).random(2)
            shift = float(draw[0]) if self.random_crop else 0.5
            flip = self.flip and draw[1] < 0.5
        if isinstance(data, np.ndarray):
            pixels = data[:, ::-1] if flip else data
        else:
            pixels = decode_square(data, self.size, shift=shift, flip=flip)
        return pixels


def _loader(data: config.Data, source: Source, *, training: bool) -> Loader:
    return Loader(source, data.image_size, data.seed, training and data.crop == "random", training and data.flip)


def _start_worker(_index: int, _count: int) -> None:
    """In each worker process: die with the trainer, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() == 1:  # the trainer had died before the line above
            os._exit(1)


class TrainIterator(Iterator[HostBatch]):
    """Batches from `start_step` on; `close` ends threads and processes."""

    def __init__(self, data: config.Data, steps: grain.MapDataset):
        options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(data.prefetch, data.threads))
        dataset = steps.to_iter_dataset(options)
        if data.workers:
            if not flags.FLAGS.is_parsed():  # Grain's workers read flags, and not every program parses them
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=data.prefetch)
            dataset = dataset.mp_prefetch(workers, worker_init_fn=_start_worker)
        self._iterator = iter(dataset)

    def __next__(self) -> HostBatch:
        return next(self._iterator)

    def close(self) -> None:
        self._iterator.close()


def make_train_iterator(
    data: config.Data, source: Source, *, batch_size: int, rows: Sequence[int], start_step: int
) -> TrainIterator:
    """Batches of the training order for one host.

    Args:
      data: config.data.
      source: as `make_source` gives it.
      batch_size: B, rows of the global batch.
      rows: the rows, within [0, B), that this host reads.
      start_step: the first step.

    Returns:
      An iterator over dicts: `image` uint8 (len(rows), S, S, 3); `weight` float32 (len(rows),), 0 where a record could not be
      decoded; `record` int64 (len(rows),); `problem` (len(rows),) strings, empty where all is well.
    """
    positions = order.training_order(data, source)
    steps = order.HostSteps(positions, batch_size=batch_size, rows=tuple(rows), start_step=start_step)
    return TrainIterator(data, steps.map(_loader(data, source, training=True)))


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
