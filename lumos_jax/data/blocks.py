"""Block order: random blocks of consecutive records, shuffled within a window of blocks. It reads each block once and whole.

    records that are not held out -> blocks of `block` consecutive ones --seeded permutation, a new one each epoch-->
    windows of some `window` blocks, a whole number T of batches of R rows:
        row r of batch t of a window takes number r T + t of it, numbers being shuffled within cells of max(block, T)

A window thus holds the records of its blocks, each once; a batch has records of all its blocks, or R different ones;
consecutive rows share blocks, so that hosts, which read consecutive rows of each batch, read different blocks. The order
depends on the seed and on R, never on hosts, devices or workers.
"""

from __future__ import annotations

import bisect
import collections
import threading
from collections.abc import Callable, Sequence
from concurrent import futures

from lumos_jax.data.base import Fetched, Source

_SHUFFLES = 16  # different shuffles of cells in an epoch: each is a table
Permuted = Callable[[int, int, int], int]  # position, count, seed -> place; see `order.permuted`


class Blocks:
    """The records 0 .. count - 1 but for `held`, numbered by places 0 .. len - 1 and cut into blocks of `size` places."""

    def __init__(self, count: int, held: Sequence[int], size: int):
        self._held, self._count, self.size = sorted(held), count, size
        self._before = [record - i for i, record in enumerate(self._held)]  # places before each held-out record

    def __len__(self) -> int:
        return self._count - len(self._held)

    def record(self, place: int) -> int:
        return place + bisect.bisect_right(self._before, place)

    def block_of(self, record: int) -> range:
        """The records of the same block, the held-out ones among them too."""
        first = (record - bisect.bisect_left(self._held, record)) // self.size * self.size
        return range(self.record(first), self.record(min(first + self.size, len(self)) - 1) + 1)


def place_at(position: int, count: int, *, block: int, window: int, rows: int, seed: int, permuted: Permuted) -> int:
    """Which of `count` places a position of an epoch takes. rows: of each batch. seed: of the epoch, in [0, 2^32)."""
    steps = max(1, round(window * block / rows))
    extent = steps * rows
    number = min(position // extent, max(count // extent, 1) - 1)  # the last window takes what is left over
    begin = number * extent
    if begin + 2 * extent > count:
        extent = count - begin
        steps = extent // rows
    inside = position - begin
    if inside < steps * rows:
        inside = inside % rows * steps + inside // rows
    size = max(block, steps)
    cell, inside = divmod(inside, size)
    inside = permuted(inside, min(size, extent - cell * size), (seed + 1 + cell % _SHUFFLES) % 2**32)
    return _of_blocks(begin + cell * size + inside, count, block, seed, permuted)


def _of_blocks(number: int, count: int, block: int, seed: int, permuted: Permuted) -> int:
    """The permutation of blocks: the one that is shorter than the others stands at a random place between them."""
    whole, rest = divmod(count, block)
    early = permuted(0, whole + 1, seed) * block
    if early <= number < early + rest:
        return whole * block + number - early
    which, within = divmod(number if number < early else number - rest, block)
    return permuted(which, whole, seed) * block + within


class BlockReader:
    """Fetches whole blocks of a remote source and keeps those of the last batches, once for all threads of a process.

    parts: for each source of a mixture, its first record and its blocks.
    """

    def __init__(self, parts: Sequence[tuple[int, Blocks]]):
        self._parts, self._firsts = parts, [first for first, _ in parts]
        self._lock, self._most = threading.Lock(), 0
        self._blocks: collections.OrderedDict[range, futures.Future[Fetched]] = collections.OrderedDict()

    def __reduce__(self) -> tuple:
        return BlockReader, (self._parts,)

    def fetch(self, source: Source, images: Sequence[int], captions: Sequence[int]) -> Fetched:
        """As `source.fetch`, by the blocks that hold these images, with the captions of the same blocks."""
        own = {record: self._block_of(record) for record in images}
        wanted, missing = dict.fromkeys(own.values()), {}
        with self._lock:
            for block in wanted:
                if block not in self._blocks:
                    self._blocks[block] = missing[block] = futures.Future()
                self._blocks.move_to_end(block)
            held = {block: self._blocks[block] for block in wanted}
            self._most = max(self._most, 2 * len(wanted) + 2)  # the next window begins while threads read the last one
            while len(self._blocks) > self._most:
                self._blocks.popitem(last=False)
        if missing:
            self._fill(source, missing, bool(captions))
        found = Fetched({record: held[block].result().images[record] for record, block in own.items()}, {})
        for record in captions:
            if record in own:
                found.captions[record] = held[own[record]].result().captions[record]
        others = [record for record in captions if record not in own]
        found.captions.update(source.fetch([], others).captions if others else {})
        return found

    def _fill(self, source: Source, missing: dict[range, futures.Future[Fetched]], captioned: bool) -> None:
        try:
            records = [record for block in missing for record in block]
            found = source.fetch(records, records if captioned else [])
            for block, future in missing.items():
                future.set_result(Fetched(*({r: of[r] for r in block if r in of} for of in found)))
        except BaseException as error:
            with self._lock:
                for block, future in missing.items():
                    self._blocks.pop(block, None)
                    if not future.done():
                        future.set_exception(error)
            raise

    def _block_of(self, record: int) -> range:
        first, blocks = self._parts[bisect.bisect_right(self._firsts, record) - 1]
        within = blocks.block_of(record - first)
        return range(first + within.start, first + within.stop)
