"""The sampling job: batches of a list's items through a `generate` callable, into shards.

Batches run on across shards. The last one is padded by repeating its last item, whose extra samples are dropped. A sample must
depend on its item's number alone (see `diffusion.normal_rows`), so that batch size and number of processes do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

import numpy as np

from lumos_jax import progress
from lumos_jax.evaluation.shards import ShardWriter

T = TypeVar("T")


def padded_batches(numbers: Sequence[int], size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(numbers int32 (size,), how many of them count) of each batch."""
    for first in range(0, len(numbers), size):
        rows = np.minimum(np.arange(first, first + size), len(numbers) - 1)
        yield np.asarray(numbers, np.int32)[rows], min(size, len(numbers) - first)


def read_ahead(call: Callable[[Any], T], arguments: Sequence[Any]) -> Iterator[T]:
    """call(argument) of each, the next one in a thread meanwhile."""
    with futures.ThreadPoolExecutor(1) as thread:
        ahead = None
        for argument in arguments:
            ready, ahead = ahead, thread.submit(call, argument)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def make_samples(
    writer: ShardWriter,
    shards: Sequence[int],
    read: Callable[[np.ndarray], tuple[Any, np.ndarray | None]],
    generate: Callable[[Any, np.ndarray], np.ndarray],
    batch_size: int,
    show: bool = True,
) -> None:
    """Makes and writes these shards.

    Args:
      writer: of the job.
      shards: which.
      read: numbers of items (B,) -> (their inputs, true or reference images uint8 (B, ...) or None).
      generate: (inputs, numbers) -> uint8 (B, [F,] H, W, 3).
      batch_size: B.
      show: whether to show a progress bar, on a terminal.
    """
    numbers = [number for shard in shards for number in writer.numbers(shard)]
    batches = list(padded_batches(numbers, batch_size))
    pending, rows = list(shards), []
    with progress.bar(total=len(numbers), unit="sample", show=show) as bar:
        read_batches = read_ahead(read, [batch for batch, _ in batches])
        for (batch, count), (inputs, reference) in zip(batches, read_batches, strict=True):
            pixels = np.asarray(generate(inputs, batch))
            rows += [(pixels[i], None if reference is None else reference[i]) for i in range(count)]
            while pending and len(rows) >= (size := len(writer.numbers(pending[0]))):
                samples, references = zip(*rows[:size], strict=True)
                truth = None if references[0] is None else np.stack(references)
                writer.write(pending.pop(0), np.stack(samples), truth)
                rows = rows[size:]
            bar.update(count)
