"""Training steps that were measured on one chip, beside which `lumos_jax.plan` puts its figures.

`measured.json` holds a row per run; `python -m benchmarks.accelerator --record` adds those of the machine that it runs on. All
are of I2I on cached features, in bfloat16, with AdamW.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

from lumos_jax import config, fileio
from lumos_jax.planning.chips import Target

FILE = pathlib.Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run on one chip."""

    chip: str  # as in chips.CHIPS
    device: str  # as JAX names it
    jax: str  # its version
    size: str  # config.model.size
    pixels: int  # config.data.image_size
    images: int  # a step
    remat: str
    milliseconds: float  # a step
    teraflops: float  # model TFLOP/s
    memory_gib: float  # that the allocator held at most; 0 if unknown

    @property
    def key(self) -> tuple:
        """What tells runs apart: a later one replaces the row."""
        return self.device, self.size, self.pixels, self.images, self.remat

    def __str__(self) -> str:
        return f"{self.size} at {self.pixels} px, {self.images} images, remat {self.remat}, on one {self.device}"


def load(path: pathlib.Path = FILE) -> list[Measured]:
    """The rows of a file."""
    return [Measured(**row) for row in json.loads(path.read_text())]


def record(rows: Sequence[Measured], path: pathlib.Path = FILE) -> None:
    """Adds rows to the file, in place of older ones of the same run."""
    kept = {row.key: row for row in [*(load(path) if path.exists() else []), *rows]}
    lines = ",\n".join(" " + json.dumps(dataclasses.asdict(row)) for row in kept.values())
    fileio.write_whole(path, f"[\n{lines}\n]\n")


def nearest(settings: config.Settings, target: Target, rows: Sequence[Measured]) -> Measured | None:
    """The row on this kind of chip that is most like a step of the settings: of the same network at the same number of pixels.

    Of several, one of the same remat policy if there is any, and the one of the closest number of images a chip.
    """
    network = settings.model.size, settings.data.image_size
    images = settings.train.batch_size / target.chips

    def distance(row: Measured) -> tuple:
        return row.remat != settings.model.remat, abs(math.log(row.images / images))

    same = [row for row in rows if row.chip == target.chip.name and (row.size, row.pixels) == network]
    return min(same, key=distance, default=None)
