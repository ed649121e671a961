"""What is on a picture of a scene, read back from its pixels alone, and how well that is what the caption told.

1. Every pixel is one of the palette's colours or none: a table of 32^3 cells of RGB, the most frequent owner of such pixels
   among rendered scenes.
2. Pixels of one colour that touch are a part; specks are dropped.
3. A small network looks at each part's silhouette, its shading and what is next to it, and says its kind, or the kinds of two
   solids of one colour that run together, or that it is no solid: a piece of another part, or noise.

Of 1,000 rendered scenes at 32 px that nothing was fitted to, the number of solids is right for 90 % and everything for 78 %;
`colour` and `shape` (see `caption_agreement`) are 0.96 and 0.92.

The table and the network are fitted to rendered scenes and come with the package (`reader.safetensors`, with the names of
colours and kinds), so that no data set is needed to use them. `python tests/scenes/make_reader.py` fits them again.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

FILE = pathlib.Path(__file__).parent / "reader.safetensors"
MEASURES = ("count", "colour", "shape", "all")
CELLS = 32  # of the table, along each of R, G, B
CROP = 16  # pixels a side of what the network sees of a part
LARGEST = 0.5  # share of the picture: no solid covers as much, at most about a third, so that a larger part is none
SPECK = 5  # parts of fewer pixels at 32 px are dropped
_MARGIN = 1.25  # of a crop around the longer side of a part


class Found(NamedTuple):
    """A solid on a picture, by its color and kind; box: left, top, right and bottom in pixels, of what shows of it."""

    color: str
    kind: str
    box: tuple[int, int, int, int]


def find_solids(pictures: np.ndarray) -> list[list[Found]]:
    """The solids on each of pictures (B, H, W, 3) uint8, left to right.
    Raises ValueError: pictures of another shape or dtype."""
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}: give uint8 (B, H, W, 3)")
    reader, found = _reader(), []
    for picture in pictures:
        solids = []
        for colour, mask, features in parts(picture, reader["table"]):
            if mask.mean() <= LARGEST:
                rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
                box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
                contents = reader["contents"][classify(reader, features).argmax()]
                solids += [Found(reader["colours"][colour], kind, box) for kind in contents]
        found.append(solids)
    return found


def read_scenes(pictures: np.ndarray) -> list[list[tuple[str, str]]]:
    """(colour, kind) of each solid on each of pictures (B, H, W, 3) uint8, left to right. Raises as `find_solids`."""
    return [[(solid.color, solid.kind) for solid in solids] for solids in find_solids(pictures)]


def caption_agreement(pictures: np.ndarray, scenes: Sequence) -> dict[str, np.ndarray]:
    """How well pictures show what the scenes' short captions tell: numbers of solids of a colour and a kind.

    Args:
      pictures: (B, H, W, 3) uint8, generated from the captions (or anything that tells as much).
      scenes: for each picture the scene whose caption it was: has `solids` with `color` and `kind`.

    Returns:
      name -> float64 (B,) in [0, 1]: `count`, 1 if the number of solids is right, else 0; `colour` and `shape`, solids whose
      colour (kind) is told and found, over those told or those found, whichever are more: surplus solids cost as much as
      missing ones; `all`, 1 if the picture shows exactly the solids told, else 0.

    Raises:
      ValueError: as `read_scenes`; or not one scene for each picture.
    """
    if len(pictures) != len(scenes):
        raise ValueError(f"{len(pictures)} pictures of {len(scenes)} scenes: give one scene for each picture")
    rows = np.zeros((len(scenes), len(MEASURES)))
    for row, found, scene in zip(rows, read_scenes(pictures), scenes, strict=True):
        told = [(solid.color, solid.kind) for solid in scene.solids]
        most = max(len(told), len(found))
        shares = [_shared((t[i] for t in told), (f[i] for f in found)) / most for i in (0, 1)]
        row[:] = (len(told) == len(found), *shares, _shared(told, found) == most)
    return dict(zip(MEASURES, rows.T, strict=True))


def _shared(told: Iterable, found: Iterable) -> int:
    return (Counter(told) & Counter(found)).total()


@functools.cache
def _reader() -> dict:
    from safetensors import safe_open

    with safe_open(FILE, "numpy") as file:
        reader = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        reader |= {name: json.loads(file.metadata()[name]) for name in ("colours", "contents")}
    return {name: np.float32(value) if name[0] in "wb" else value for name, value in reader.items()}


def cells(pixels: np.ndarray) -> np.ndarray:
    """Index in the table of pixels (..., 3) uint8."""
    r, g, b = (pixels[..., i].astype(np.int64) * CELLS // 256 for i in range(3))
    return (r * CELLS + g) * CELLS + b


def parts(picture: np.ndarray, table: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(colour, its mask (H, W), features) of each part of a picture (H, W, 3) uint8, left to right; see `features_of`.

    The table (CELLS^3,) holds 0 for no colour, or a colour's index + 1.
    """
    from scipy import ndimage  # takes a quarter of a second, which no start of a run need pay

    owner = table[cells(picture)]
    least = SPECK * (min(picture.shape[:2]) / 32) ** 2
    found = []
    for value in np.unique(owner[owner > 0]):
        labels, _ = ndimage.label(owner == value, np.ones((3, 3), int))
        sizes = np.bincount(labels.ravel())[1:]
        found += [(int(value) - 1, labels == number + 1) for number in np.flatnonzero(sizes >= least)]
    found.sort(key=lambda part: np.nonzero(part[1])[1].mean())
    light = picture.astype(np.float32).max(2) / 255
    return [(colour, mask, features_of(mask, owner == colour + 1, owner, light)) for colour, mask in found]


def features_of(mask: np.ndarray, alike: np.ndarray, owner: np.ndarray, light: np.ndarray) -> np.ndarray:
    """What the network sees of a part: four crops of CROP^2 pixels, then its place and size in the picture.

    The crops are the part, other pixels of its colour, those of other colours, and its brightness, centred on the part.
    """
    side = min(mask.shape)
    rows, columns = np.nonzero(mask)
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    reach = _MARGIN * max(bottom - top, right - left)
    middle = (top + bottom) / 2, (left + right) / 2
    steps = ((np.arange(CROP) + 0.5) / CROP - 0.5) * reach
    at_y, at_x = middle[0] + steps - 0.5, middle[1] + steps - 0.5
    layers = np.stack([mask, alike & ~mask, (owner > 0) & ~alike, light * mask]).astype(np.float32)
    mean = max(layers[3].sum() / len(rows), 1 / 255)
    layers[3] = np.where(mask, layers[3] / mean - 1, 0)
    crops = _interpolate(_interpolate(layers, at_y, 1), at_x, 2)
    place = (bottom - top, right - left, middle[0], middle[1], np.sqrt(len(rows)))
    return np.concatenate([crops.ravel(), np.array(place, np.float32) / side])


def _interpolate(layers: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    """Layers at fractional places along an axis, 0 outside."""
    low = np.floor(at).astype(int)
    weight = (at - low).astype(np.float32)
    shape, total = np.where(np.arange(3) == axis, -1, 1), 0
    for index, w in ((low, 1 - weight), (low + 1, weight)):
        inside = (index >= 0) & (index < layers.shape[axis])
        total = total + layers.take(np.clip(index, 0, layers.shape[axis] - 1), axis) * (w * inside).reshape(shape)
    return total


def classify(reader, features: np.ndarray) -> np.ndarray:
    """Logits (P, contents) of features (P, C)."""
    hidden = np.maximum(features @ reader["w1"] + reader["b1"], 0)
    hidden = np.maximum(hidden @ reader["w2"] + reader["b2"], 0)
    return hidden @ reader["w3"] + reader["b3"]
