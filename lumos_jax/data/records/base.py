"""(position, record) pairs of one step -> the arrays of its batch: read, decode, choose what is random about a record.

One bad record never ends a run: whatever its loading raises, it becomes a row of weight 0 whose problem is counted and named.
Failures of storage or of the machine are no record's fault: they are tried again, and then end the run by name. So do corrupt
records that are too many.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lumos_jax import fileio
from lumos_jax.data import workers
from lumos_jax.data.base import SOURCES, Captions, CorruptRecord, Data, Fetched, Source, TombstonedRecord
from lumos_jax.data.blocks import BlockReader
from lumos_jax.data.files import system_error

HostBatch = dict[str, np.ndarray]
Row = dict[str, tuple[np.dtype, tuple[int, ...]]]  # of the arrays of a batch: name -> dtype and shape of one row
TEXT = np.dtype(object), ()  # in a Row
_PROBLEM_LENGTH, _REASON_LENGTH = 240, 100  # characters
MIN_RECORDS = 200  # below this a rate says little: three bad files at the start must not stop a run of millions
NAMED = 20  # records named one by one; after these, only every thousandth
TOMBSTONED = "tombstoned"  # in the place of a problem
SAMPLE_TYPES: dict[str, type[Loader]] = {}


@dataclasses.dataclass(frozen=True)
class Loader(abc.ABC):
    """(position, record) pairs of one step -> HostBatch; picklable. A sample type is a subclass.

    training: random crops and mirrors, captions that change from epoch to epoch.
    everything: not for training, but all of a record that training may choose from, as a cache keeps it.
    assigned: with config.data.aspect_ratios, (records,) the number of each record's bucket; None takes the square one.
    batch_size: rows of a global batch.
    blocks: reads the blocks of config.data.order=block.
    needs: the class of sources that have what this sample type needs.
    """

    registry: ClassVar[dict[str, type]] = SAMPLE_TYPES
    needs: ClassVar[type] = Source
    data: Data
    source: Source
    training: bool
    everything: bool = False
    assigned: np.ndarray | None = None
    batch_size: int = 1
    blocks: BlockReader | None = None

    def check(self) -> None:
        """Raises ValueError if the source, or a part of a mixture, lacks what this sample type needs."""
        lacking = next((part.source for part in self.source.parts if not isinstance(part.source, self.needs)), None)
        if lacking is not None:
            able = [name for name, one in sorted(SOURCES.items()) if issubclass(one, self.needs) and one.in_mixture]
            raise ValueError(
                f"config.data.sample_type={self.data.sample_type}: {lacking.describe(0)} ... have no "
                f"{self.needs.__name__.removeprefix('Has').lower()}. Sources that do are {', '.join(able)}"
            )

    @abc.abstractmethod
    def row(self) -> Row:
        """Dtype and shape of one row of each array; where batches differ, of the largest."""

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        """`row` of this batch."""
        return self.row()

    @abc.abstractmethod
    def load(self, position: int, record: int) -> Mapping[str, Any]:
        """The arrays of one row, as `row` describes them; with a "problem" if it has no weight.
        Raises Exception: any; the record is corrupt."""

    def records_of(self, element: Sequence[tuple[int, int]]) -> tuple[Sequence[int], Sequence[int]]:
        """The records whose images, and those whose captions, `load` reads for these (position, record) pairs."""
        return [record for _, record in element], ()

    @property
    def square(self) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of a square image."""
        return np.dtype(np.uint8), (self.data.image_size, self.data.image_size, 3)

    def augmentation(self, shift: float, flip: float) -> dict[str, Any]:
        """Arguments of `decode_square` from two random numbers in [0, 1): crop and mirror image, if settings ask for them."""
        crop = self.training and self.data.crop == "random"
        return {"shift": float(shift) if crop else 0.5, "flip": bool(self.training and self.data.flip and flip < 0.5)}

    def load_batch(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        """Raises OSError if storage or the machine fails, MemoryError, and ImportError for a library that is missing."""
        batch, loader = _new_batch(element, self.row_of(element)), self
        if self.source.remote:
            loader, wanted = copy.copy(self), self.records_of(element)
            fetched = self.blocks.fetch(self.source, *wanted) if self.blocks else self.source.fetch(*wanted)
            vars(loader)["source"] = _Ahead(self.source, fetched)
        for row, (position, record) in enumerate(element):
            try:
                loaded = dict(fileio.with_retries(functools.partial(loader.load, position, record)))
                if problem := loaded.pop("problem", ""):
                    reject(batch, row, problem)
                for name, array in loaded.items():
                    batch[name][row] = array
            except (MemoryError, ImportError):  # of the machine and of its installation
                raise
            except Exception as error:
                where = self.source.describe(record)
                if isinstance(error, TombstonedRecord):
                    reject(batch, row, TOMBSTONED)
                    continue
                if failure := system_error(error):
                    raise OSError(failure.errno, f"{where} cannot be read: {failure.strerror}") from error
                reject(batch, row, where, error)
        return batch


class _Ahead(Source):
    """A source of which some records are in memory. An error is raised once, and the record then read anew."""

    def __init__(self, source: Source, fetched: Fetched):
        self._source, self._fetched = source, fetched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> bytes | np.ndarray:
        return _take(self._fetched.images, index, self._source.read)

    def captions(self, index: int) -> Captions:
        return _take(self._fetched.captions, index, self._source.captions)

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def _take(fetched: dict[int, Any], index: int, read: Callable[[int], Any]) -> Any:
    if index not in fetched:
        return read(index)
    if isinstance(fetched[index], Exception):
        raise fetched.pop(index)
    return fetched[index]


def record_rng(seed: int, position: int) -> np.random.Generator:
    """A record's own random numbers: nothing is carried from one record to the next."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, position], np.uint64)))


def _new_batch(element: Sequence[tuple[int, int]], row: Row) -> HostBatch:
    """Zeros of weight 1 for these (position, record) pairs."""
    count = len(element)
    batch = {
        name: np.full((count, *shape), "", object) if dtype.hasobject else workers.new_array((count, *shape), dtype)
        for name, (dtype, shape) in row.items()
    }
    return batch | {
        "weight": np.ones(count, np.float32),
        "record": np.array([record for _, record in element], np.int64),
        "problem": np.zeros(count, f"<U{_PROBLEM_LENGTH}"),
    }


def reject(batch: HostBatch, row: int, problem: str, error: BaseException | None = None) -> None:
    """Makes a row count for nothing. problem: what is wrong, or with an error, which record; its arrays are emptied then."""
    if error is not None:
        kind = "" if isinstance(error, (CorruptRecord, OSError)) else f"{type(error).__name__}: "
        problem = f"{problem}: {kind}{str(error)[:_REASON_LENGTH]}"
        for name in batch.keys() - {"record"}:
            batch[name][row] = "" if batch[name].dtype.kind in "OU" else 0
    batch["weight"][row] = 0.0
    batch["problem"][row] = problem[-_PROBLEM_LENGTH:]  # the end of a path and the reason say most


class TooManyCorruptRecords(RuntimeError):
    """More records cannot be decoded than config.data.max_corrupt_rate allows."""


class CorruptMeter:
    """How many records were read, and how many of them gave no image or have a tombstone, over the whole run. state: as `state`
    gives it."""

    def __init__(self, max_rate: float, state: Mapping[str, Any] | None = None):
        self.max_rate = max_rate
        self.read, self.corrupt, self.tombstoned = ((state or {}).get(n, 0) for n in ("read", "corrupt", "tombstoned"))

    def add(self, batch: Mapping[str, np.ndarray]) -> list[str]:
        """Counts a host batch and returns what there is to say about it.
        Raises TooManyCorruptRecords: the rate over the run so far is above the limit."""
        lines, last = [], "earlier"
        self.read += len(batch["weight"])
        self.tombstoned += int(np.count_nonzero(batch["problem"] == TOMBSTONED))
        for last in filter(lambda problem: problem not in ("", TOMBSTONED), batch["problem"]):
            self.corrupt += 1
            if self.corrupt <= NAMED or self.corrupt % 1000 == 0:
                lines.append(f"corrupt record {self.corrupt}: {last}")
            if self.corrupt == NAMED:
                lines.append("further corrupt records are counted, and every thousandth named")
        rate = self.corrupt / self.read
        if rate > self.max_rate and self.read >= MIN_RECORDS:
            raise TooManyCorruptRecords(
                f"{self.corrupt} of {self.read} records ({rate:.1%}) could not be decoded, more than "
                f"config.data.max_corrupt_rate={self.max_rate:.1%}; the last was {last}. "
                "Mend or remove them, or raise that rate"
            )
        return lines

    def counts(self) -> dict[str, int]:
        """For the metrics."""
        return {"corrupt_records": self.corrupt} | ({"tombstoned_records": self.tombstoned} if self.tombstoned else {})

    def state(self) -> dict[str, int]:
        """Plain values for a checkpoint."""
        return {"read": self.read, "corrupt": self.corrupt, "tombstoned": self.tombstoned}
