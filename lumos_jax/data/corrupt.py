"""Counting records that could not be decoded, naming them, and stopping when they are too many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Below this many records a rate says little: three bad files at the start must not stop a run of millions.
MIN_RECORDS = 200
# Records named one by one; after these, only round numbers are announced.
NAMED = 20


class TooManyCorruptRecords(RuntimeError):
    """More records cannot be decoded than config.data.max_corrupt_rate allows."""


class CorruptMeter:
    """How many records were read and how many of them gave no picture, over the whole run."""

    def __init__(self, max_rate: float, state: Mapping[str, Any] | None = None):
        self.max_rate = max_rate
        self.read, self.corrupt = (state or {}).get("read", 0), (state or {}).get("corrupt", 0)

    def add(self, batch: Mapping[str, np.ndarray]) -> list[str]:
        """Counts a host batch and returns what there is to say about it.

        Raises:
          TooManyCorruptRecords: the rate over the run so far is above the limit.
        """
        problems = [str(problem) for problem in batch["problem"] if problem]
        self.read += len(batch["weight"])
        lines = []
        for problem in problems:
            self.corrupt += 1
            if self.corrupt <= NAMED or self.corrupt % 1000 == 0:
                lines.append(f"corrupt record {self.corrupt}: {problem}")
            if self.corrupt == NAMED:
                lines.append("further corrupt records are counted, and every thousandth named")
        rate = self.corrupt / self.read
        if rate > self.max_rate and self.read >= MIN_RECORDS:
            raise TooManyCorruptRecords(
                f"{self.corrupt} of {self.read} records ({rate:.1%}) could not be decoded, more than "
                f"config.data.max_corrupt_rate={self.max_rate:.1%}; the last was {problems[-1] if problems else 'earlier'}. "
                "Mend or remove them, or raise that rate"
            )
        return lines

    def counts(self) -> dict[str, int]:
        """For the metrics."""
        return {"corrupt_records": self.corrupt}

    def state(self) -> dict[str, int]:
        """Plain values for a checkpoint."""
        return {"read": self.read, "corrupt": self.corrupt}
