"""(position, record) pairs of one step -> the arrays of its batch: read, decode, choose what is random about a record.

One bad record never ends a run: whatever its loading raises, it becomes a row of weight 0 whose problem is counted and named.
Failures of storage or of the machine are no record's fault: they are tried again, and then end the run by name.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lumos_jax import fileio
from lumos_jax.data import workers
from lumos_jax.data.base import SOURCES, CorruptRecord, Data, Source
from lumos_jax.data.files import system_error

HostBatch = dict[str, np.ndarray]
Row = dict[str, tuple[np.dtype, tuple[int, ...]]]  # of the arrays of a batch: name -> dtype and shape of one row
_PROBLEM_LENGTH, _REASON_LENGTH = 240, 100  # characters


@dataclasses.dataclass(frozen=True)
class Use:
    """What batches are for.

    Attributes:
      training: random crops and mirrors, captions that change from epoch to epoch.
      everything: not for training, but all of a record that training may choose from, as a cache keeps it.
      assigned: with config.data.buckets.enabled, (records,) the number of each record's bucket; None takes the square one.
      batch_size: rows of a global batch.
    """

    training: bool
    everything: bool = False
    assigned: np.ndarray | None = None
    batch_size: int = 1


class Loader(abc.ABC):
    """(position, record) pairs of one step -> HostBatch; picklable.

    Attributes:
      source: of the records.
      needs: the class of sources that have what this sample type needs.
    """

    source: Source
    needs: ClassVar[type] = Source

    @classmethod
    def check(cls, data: Data, source: Source) -> None:
        """Raises ValueError if the source, or a part of a mixture, lacks what this sample type needs."""
        lacking = next((part.source for part in source.parts if not isinstance(part.source, cls.needs)), None)
        if lacking is not None:
            able = [name for name, one in sorted(SOURCES.items()) if issubclass(one, cls.needs) and one.in_mixture]
            raise ValueError(
                f"config.data.sample_type={data.sample_type}: {lacking.describe(0)} ... have no "
                f"{cls.needs.__name__.removeprefix('Has').lower()}. Sources that do are {', '.join(able)}"
            )

    @classmethod
    def make(cls, data: Data, source: Source, use: Use) -> Loader:
        """The loader that config.data describes; of every sample type."""
        raise NotImplementedError

    @abc.abstractmethod
    def row(self) -> Row:
        """Dtype and shape of one row of each array; where batches differ, of the largest."""

    def row_of(self, element: Sequence[tuple[int, int]]) -> Row:
        """`row` of this batch."""
        return self.row()

    @abc.abstractmethod
    def load(self, position: int, record: int) -> Mapping[str, Any]:
        """The arrays of one row, as `row` describes them; with a "problem" if it has no weight.

        Raises:
          Exception: any; the record is corrupt.
        """

    def load_batch(self, element: Sequence[tuple[int, int]]) -> HostBatch:
        """Raises OSError if storage or the machine fails, MemoryError, and ImportError for a library that is missing."""
        batch = _new_batch(element, self.row_of(element))
        for row, (position, record) in enumerate(element):
            try:
                loaded = dict(fileio.with_retries(functools.partial(self.load, position, record)))
                problem = loaded.pop("problem", "")
                for name, array in loaded.items():
                    batch[name][row] = array
            except (MemoryError, ImportError):  # of the machine and of its installation
                raise
            except Exception as error:
                failure = system_error(error)
                if failure is not None:
                    where = self.source.describe(record)
                    raise OSError(failure.errno, f"{where} cannot be read: {failure.strerror}") from error
                for name, (dtype, _) in self.row_of(element).items():
                    batch[name][row] = "" if dtype.hasobject else 0  # of a row that was filled in part
                reject(batch, row, self.source.describe(record), error)
            else:
                if problem:
                    reject(batch, row, problem)
        return batch


SAMPLE_TYPES: dict[str, type[Loader]] = {}


def register(name: str) -> Callable[[type[Loader]], type[Loader]]:
    """Decorator that makes a class of loaders the value `name` of config.data.sample_type."""

    def add(loader: type[Loader]) -> type[Loader]:
        SAMPLE_TYPES[name] = loader
        return loader

    return add


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
    """Makes a row count for nothing. problem: what is wrong, or which record, if the error says what."""
    if error is not None:
        kind = "" if isinstance(error, (CorruptRecord, OSError)) else f"{type(error).__name__}: "
        problem = f"{problem}: {kind}{str(error)[:_REASON_LENGTH]}"
    batch["weight"][row] = 0.0
    batch["problem"][row] = problem[-_PROBLEM_LENGTH:]  # the end of a path and the reason say most
