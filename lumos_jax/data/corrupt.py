"""Counting records that could not be decoded, naming them, and stopping when they are too many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

MIN_RECORDS = 200  # below this a rate says little: three bad files at the start must not stop a run of millions
NAMED = 20  # records named one by one; after these, only every thousandth


class TooManyCorruptRecords(RuntimeError):
    """More records cannot be decoded than config.data.max_corrupt_rate allows."""


class CorruptMeter:
    """How many records were read and how many of them gave no picture, over the whole run. state: as `state` gives it."""

    def __init__(self, max_rate: float, state: Mapping[str, Any] | None = None):
        self.max_rate = max_rate
        self.read, self.corrupt = (state or {}).get("read", 0), (state or {}).get("corrupt", 0)

    def add(self, batch: Mapping[str, np.ndarray]) -> list[str]:
        """Counts a host batch and returns what there is to say about it.
        Raises TooManyCorruptRecords: the rate over the run so far is above the limit."""
        lines, last = [], "earlier"
        self.read += len(batch["weight"])
        for last in filter(None, batch["problem"]):
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
        return {"corrupt_records": self.corrupt}

    def state(self) -> dict[str, int]:
        """Plain values for a checkpoint."""
        return {"read": self.read, "corrupt": self.corrupt}
