"""What an evaluation samples: a numbered list of items, which depends on no run, so that two runs are compared on the same one.

Item i is an id, a condition, and a reference; the noise of its sample is folded from (seed, i). A list is a JSONL file, one
item a line, with a digest. `make_list` reads a set of `SETS`, a .jsonl file, or a folder of images.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lumos_jax import fileio
from lumos_jax.data.files import IMAGE_ENDINGS, files_below, has_image_ending
from lumos_jax.data.sources.videos import VIDEO_ENDINGS
from lumos_jax.scenes.scene import COLORS, KINDS, VERSION, captions, make_scene

FIRST_SCENE = 2**39  # of the set `scenes`: beyond any that a run trains on (config.data.scenes.num_scenes)
PER_PROMPT = 4  # samples of GenEval's and DPG-Bench's prompts
_SEED = 0x6E7


@dataclasses.dataclass(frozen=True)
class Item:
    """One sample to make.

    Attributes:
      id: unique in its list; a relative file name without its ending.
      condition: what a task conditions on, by name: caption, image (a path), label, azimuth and elevation (degrees; target is
        the true view's path), fps, motion; or a record that has it all: scene (a number), record (of the run's own data),
        video (a path, with frames, stride and the share of it where the clip begins).
      reference: names the true or reference image, where it is a file by its path.
      group: the prompt or object that several items share; standard errors are clustered by it.
      extra: what a scorer needs besides.
    """

    id: str
    condition: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reference: str = ""
    group: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ItemList:
    """Items in their order, numbered from 0. Raises ValueError if there are none, or an id occurs twice.

    root: the folder that paths are relative to, which is no part of the list itself.
    """

    name: str
    items: tuple[Item, ...]
    root: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        if not self.items:
            raise ValueError(f"the list {self.name} has no items")
        twice = [name for name, count in Counter(item.id for item in self.items).items() if count > 1]
        if twice:
            raise ValueError(f"the list {self.name} has {len(twice)} ids more than once, {twice[0]!r} among them")

    def __len__(self) -> int:
        return len(self.items)

    def lines(self) -> list[str]:
        return [json.dumps(dataclasses.asdict(item)) for item in self.items]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the lines: of every id, condition and reference, and of their order."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()

    def save(self, path: pathlib.Path) -> None:
        fileio.write_whole(path, "\n".join(self.lines()) + "\n")


def read_list(path: str | pathlib.Path) -> ItemList:
    """A list from its .jsonl file.

    Raises:
      ValueError: it cannot be read, has no items, one that is none, or an id twice.
    """
    known, items = {field.name for field in dataclasses.fields(Item)}, []
    for number, record in _json_lines(pathlib.Path(path)):
        if not isinstance(record, dict) or "id" not in record or set(record) - known:
            raise ValueError(
                f"{path}, line {number}: an item is an object with id and any of condition, reference, group and extra"
            )
        items.append(Item(**{**record, "id": str(record["id"])}))
    return ItemList(pathlib.Path(path).stem, tuple(items), str(pathlib.Path(path).parent))


def make_list(name: str, data: str | None = None, num: int | None = None) -> ItemList:
    """The list of a set, of a .jsonl file, or of a folder of images.

    Args:
      name: of SETS, or a path.
      data: the folder of the set's files, where it has any.
      num: the first so many items; of scenes, how many. None takes all, or the set's own number.

    Raises:
      ValueError: no such set or file, files that the set needs are missing, or it has fewer than `num` items.
    """
    path = pathlib.Path(name).expanduser()
    if name in SETS:
        chosen = SETS[name]
        if chosen.files and data is None:
            raise ValueError(f"--set={name} needs --data=FOLDER with {chosen.files}")
        found = ItemList(name, tuple(chosen.items(Folder(name, data or ""), num)), data or "")
    elif path.is_dir():
        files = sorted(map(pathlib.Path, filter(has_image_ending, files_below(path))))
        if not files:
            raise ValueError(f"--set={name}: the folder holds no images ({', '.join(sorted(IMAGE_ENDINGS))})")
        found = ItemList(path.name, tuple(_image_item(path, file) for file in files), str(path))
    elif path.is_file():
        found = read_list(path)
    else:
        raise ValueError(f"--set={name} is not one of {', '.join(SETS)}, nor a .jsonl list, nor a folder of images")
    if num is None:
        return found
    if not 1 <= num <= len(found):
        raise ValueError(f"--num={num}: the set {name} has {len(found)} items")
    return dataclasses.replace(found, items=found.items[:num])


def _image_item(folder: pathlib.Path, file: pathlib.Path) -> Item:
    name = file.relative_to(folder)
    return Item(
        name.with_suffix("").as_posix(), {"image": name.as_posix()}, name.as_posix(),
        extra={"bytes": file.stat().st_size},
    )  # fmt: skip


def _json_lines(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    """(line number, object) of a JSONL file. Raises ValueError if it cannot be read."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error


def read_text(path: pathlib.Path) -> str:
    """A UTF-8 file. Raises ValueError if a file cannot be read or is no text, and OSError where storage fails."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise fileio.failure(error, f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class Folder:
    """The files of a set, as the user has them."""

    set: str
    path: str

    def __truediv__(self, name: str) -> pathlib.Path:
        """A file or folder in it. Raises ValueError, which says where the files come from, if it is missing."""
        found = pathlib.Path(self.path).expanduser() / name
        if not found.exists():
            raise ValueError(f"--set={self.set}: there is no {found}; --data must hold {SETS[self.set].files}")
        return found

    def table(self, name: str, *columns: str) -> list[dict[str, str]]:
        """The rows of a csv file with these columns. Raises ValueError if it is missing or has others."""
        path = self / name
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        if not rows or not set(columns) <= set(rows[0]):
            raise ValueError(
                f"{path} has the columns {', '.join(rows[0] if rows else ())}; needed: {', '.join(columns)}"
            )
        return rows


# Sets of the embedded scenes.


def _scenes(_: Folder, num: int | None) -> Iterator[Item]:
    for number in range(num or 2048):
        scene = FIRST_SCENE + number
        condition = {"scene": scene, "caption": captions(make_scene(scene))[0]}
        yield Item(f"{number:06d}", condition, f"scenes-v{VERSION}/{scene}")


GENEVAL_TAGS = {
    "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
}  # fmt: skip
_PLURALS = dict(zip(KINDS, ("spheres", "boxes", "cylinders", "cones", "tori"), strict=True))
_NUMBERS = ("", "one", "two", "three", "four")


def _scene_prompts(_: Folder, __: int | None) -> Iterator[Item]:
    """GenEval's six categories, in its own metadata, with the objects and colors of scenes: 553 prompts, 4 samples each."""
    rng, index = np.random.Generator(np.random.Philox(_SEED)), 0
    for tag, count in GENEVAL_TAGS.items():
        for _ in range(count):
            a, b = (KINDS[i] for i in rng.permutation(len(KINDS))[:2])
            first, second = (tuple(COLORS)[i] for i in rng.permutation(len(COLORS))[:2])
            number = int(rng.integers(2, 5))
            yield from _prompt_items(index, _scene_metadata(tag, a, b, first, second, number))
            index += 1


def _scene_metadata(tag: str, a: str, b: str, first: str, second: str, number: int) -> dict[str, Any]:
    def phrase(color, kind):
        return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {kind}"

    one, two = {"class": a, "count": 1}, {"class": b, "count": 1}
    both = f"{phrase(first, a)} and {phrase(second, b)}"
    if tag == "counting":
        found = {"include": [{"class": a, "count": number}], "exclude": [{"class": a, "count": number + 1}]}
        return {"tag": tag, **found, "prompt": f"{_NUMBERS[number]} {first} {_PLURALS[a]}"}
    if tag == "position":
        where = two | {"position": ["right of", 0]}
        prompt = f"{phrase(first, a)} on the left and {phrase(second, b)} on the right"
        return {"tag": tag, "include": [one, where], "prompt": prompt}
    include, prompt = {
        "single_object": ([one], phrase(first, a)),
        "two_object": ([one, two], both),
        "colors": ([one | {"color": first}], phrase(first, a)),
        "color_attr": ([one | {"color": first}, two | {"color": second}], both),
    }[tag]
    return {"tag": tag, "include": include, "prompt": prompt}


def _prompt_items(index: int, metadata: Mapping[str, Any]) -> Iterator[Item]:
    for k in range(PER_PROMPT):
        yield Item(f"{index:05d}/{k:04d}", {"caption": metadata["prompt"]}, group=f"{index:05d}", extra=dict(metadata))


# Sets of public benchmarks.


def _coco30k(folder: Folder, _: int | None) -> Iterator[Item]:
    for row in folder.table("uid_caption.csv", "uid", "caption"):
        yield _coco_item(row["uid"].partition("_")[0], row["uid"], row["caption"])


def _coco30k_long(folder: Folder, _: int | None) -> Iterator[Item]:
    for row in folder.table("recap_coco.csv", "image_id", "caption", "recaption"):
        yield _coco_item(row["image_id"], row["image_id"], row["recaption"])


def _coco_item(image: str, id: str, caption: str) -> Item:
    return Item(id, {"caption": caption}, f"val2014/COCO_val2014_{int(image):012d}.jpg")


def _imagenet50k(_: Folder, __: int | None) -> Iterator[Item]:
    for k in range(50):  # all classes in turn, so that the first N are balanced too
        for label in range(1000):
            yield Item(f"{label:04d}_{k:02d}", {"label": label})


def _geneval(folder: Folder, _: int | None) -> Iterator[Item]:
    for number, metadata in _json_lines(folder / "evaluation_metadata.jsonl"):
        if not {"tag", "include", "prompt"} <= set(metadata):
            raise ValueError(f"{folder.path}/evaluation_metadata.jsonl, line {number}: no tag, include and prompt")
        yield from _prompt_items(number - 1, metadata)


def _dpg(folder: Folder, _: int | None) -> Iterator[Item]:
    for file in sorted((folder / "prompts").glob("*.txt")):
        text = read_text(file).strip()
        for k in range(PER_PROMPT):
            yield Item(f"{file.stem}/{k:04d}", {"caption": text}, group=file.stem)


def _gso(folder: Folder, _: int | None) -> Iterator[Item]:
    for model in sorted(p for p in (folder / "renderings").iterdir() if p.is_dir()):
        for elevation in (0, 30):
            for view in range(16):
                name = f"renderings/{model.name}/elevation_{elevation}"
                image, target = (f"{name}/{number:03d}.png" for number in (0, view))
                condition = {"image": image, "azimuth": 22.5 * view, "elevation": 0.0, "target": target}
                id = f"{model.name}/{elevation:02d}/{view:03d}"
                yield Item(id, condition, target, group=model.name, extra={"elevation": elevation})


CLIPS, FRAMES, STRIDE = 2048, 16, 3  # of video sets


def _videos(folder: Folder, num: int | None) -> Iterator[Item]:
    """Videos in a seeded order, each long enough, with a seeded start frame."""
    import av  # its libraries take a moment to load, and only videos need them

    root, wanted = folder / "videos", CLIPS if num is None else num
    files = sorted(p for p in map(pathlib.Path, files_below(root)) if p.suffix.lower() in VIDEO_ENDINGS)
    rng = np.random.Generator(np.random.Philox(_SEED))
    for index in rng.permutation(len(files)):
        if not wanted:
            break
        share = float(rng.random())
        with av.open(str(files[index])) as container:
            stream = container.streams.video[0]
            total = stream.frames or math.floor(float((stream.duration or 0) * stream.time_base * stream.average_rate))
        room = total - ((FRAMES - 1) * STRIDE + 1)
        if room >= 0:
            wanted -= 1
            name = files[index].relative_to(root)
            condition = {"video": f"videos/{name.as_posix()}", "share": share, "frames": FRAMES, "stride": STRIDE}
            yield Item(name.with_suffix("").as_posix(), condition, extra={"start": int(share * (room + 1))})


class Set(NamedTuple):
    """items: of its folder, and the number asked for. files: what the folder must hold and where it is from; empty: none."""

    items: Callable[[Folder, int | None], Iterable[Item]]
    files: str = ""


SETS: dict[str, Set] = {
    "scenes": Set(_scenes),
    "scenes-geneval": Set(_scene_prompts),
    "coco30k": Set(
        _coco30k,
        "val2014/ (images.cocodataset.org/zips/val2014.zip) and uid_caption.csv (of DALL-Eval, github.com/j-min/DallEval: "
        "columns uid and caption)",
    ),
    "coco30k-long": Set(
        _coco30k_long,
        "val2014/ (images.cocodataset.org/zips/val2014.zip) and recap_coco.csv (UCSC-VLAA/Recap-COCO-30K of Hugging Face, as "
        "csv with the columns image_id, caption and recaption)",
    ),
    "imagenet50k": Set(_imagenet50k),
    "geneval": Set(_geneval, "evaluation_metadata.jsonl (github.com/djghosh13/geneval, prompts/)"),
    "dpg": Set(_dpg, "prompts/, one .txt a prompt (github.com/TencentQQGYLab/ELLA, dpg_bench/prompts)"),
    "gso": Set(
        _gso,
        "renderings/MODEL/elevation_0/ and elevation_30/, each with 000.png to 015.png, 22.5 degrees of azimuth apart "
        "(counter-clockwise from above), white background, of the models of Google Scanned Objects",
    ),
    "ucf101": Set(_videos, "videos/, the .avi files of UCF-101 (crcv.ucf.edu/data/UCF101.php)"),
    "msrvtt": Set(_videos, "videos/, the .mp4 files of MSR-VTT's test split (TestVideo)"),
}
