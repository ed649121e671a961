"""Samples in the layouts that official scorers read.

adm-npz  one .npz with `arr_0`, uint8 (N, H, W, 3): ADM's evaluator, and what reads its files
png      a folder of ID.png; of clips, ID/0000.png and so on
geneval  GenEval: 00000/metadata.jsonl (the prompt's one object) and 00000/samples/0000.png
dpg      DPG-Bench: PROMPT.png, a grid of 2 x 2 samples without padding, sample k at column k % 2, row k // 2
"""

from __future__ import annotations

import json
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from lumos_jax import fileio
from lumos_jax.evaluation.lists import PER_PROMPT, Item
from lumos_jax.evaluation.shards import Samples


def _each(samples: Samples) -> Iterator[tuple[Item, np.ndarray]]:
    numbers = iter(samples.items.items)
    for _, _, pixels in samples:
        for row in pixels:
            yield next(numbers), row


def _groups(samples: Samples, what: str) -> Iterator[tuple[Item, np.ndarray]]:
    """(first item, samples (PER_PROMPT, H, W, 3)) of each prompt, whose items follow each other."""
    rows: list[tuple[Item, np.ndarray]] = []
    for item, pixels in _each(samples):
        rows.append((item, pixels))
        if not item.group or item.group != rows[0][0].group or pixels.ndim != 3:
            raise ValueError(f"{what} has {PER_PROMPT} images a prompt, one after the other: sample its own set")
        if len(rows) == PER_PROMPT:
            yield rows[0][0], np.stack([image for _, image in rows])
            rows = []
    if rows:
        raise ValueError(
            f"{what} has {PER_PROMPT} images a prompt, and prompt {rows[0][0].group} has {len(rows)}: sample them all"
        )


def adm_npz(samples: Samples, out: pathlib.Path) -> None:
    """Shard after shard, so that the memory of one suffices."""
    if out.suffix != ".npz":
        raise ValueError(f"--out={out}: the name must end in .npz")
    with (
        fileio.replacing(out) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        for shard, _, pixels in samples:
            if pixels.ndim != 4:
                raise ValueError(f"adm-npz holds images, and these samples are clips of {pixels.shape[1]} frames")
            if shard == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(samples), *pixels.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(pixels).data)


def png(samples: Samples, out: pathlib.Path) -> None:
    for item, pixels in _each(samples):
        if pixels.ndim == 3:
            fileio.save_png(pixels, out / f"{item.id}.png")
            continue
        for number, frame in enumerate(pixels):
            fileio.save_png(frame, out / item.id / f"{number:04d}.png")


def geneval(samples: Samples, out: pathlib.Path) -> None:
    for item, images in _groups(samples, "GenEval"):
        if not {"tag", "include", "prompt"} <= set(item.extra):
            raise ValueError("these samples are not of GenEval's prompts: evaluate sample --set=geneval")
        fileio.write_whole(out / item.group / "metadata.jsonl", json.dumps(item.extra))
        for number, image in enumerate(images):
            fileio.save_png(image, out / item.group / "samples" / f"{number:04d}.png")


def dpg(samples: Samples, out: pathlib.Path) -> None:
    for item, images in _groups(samples, "DPG-Bench"):
        rows = [np.concatenate(list(images[first : first + 2]), axis=1) for first in (0, 2)]
        fileio.save_png(np.concatenate(rows), out / f"{item.group}.png")


FORMATS = {"adm-npz": adm_npz, "png": png, "geneval": geneval, "dpg": dpg}
