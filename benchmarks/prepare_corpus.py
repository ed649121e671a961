"""Makes a corpus to prepare, in the layouts that people have, and the truth about each of its images.

    python -m benchmarks.prepare_corpus --out=DIR [--images=100000] [--photographs=FOLDER] [--seed=0] [--processes=2]

Scenes, clip art, and crops and mosaics of photographs (those in FOLDER; none without it), with planted exact and near
duplicates, images that only resemble others, copies of evaluation images, broken files, low and missing scores, odd captions,
keys that repeat and dots in names. A stopped command continues after the last whole file. DIR then has

    laion       img2dataset tars in nested folders, scores in their parquet files
    coyo        img2dataset tars, scores in coyo-metadata.parquet, joined by url
    sa1b        tars of sa_N.jpg and sa_N.json
    journeydb   imgs/NNN.tgz and train_anno.jsonl
    imagenet, classes    class tars, class folders
    parquet     Hugging Face parquet
    folder      plain folders, some captions beside the images
    evaluation  images for decontamination
    truth.parquet        one row an image: file, name, url, sha256, role (see ROLES), base (number of the image copied), how
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import tarfile
import time

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet as parquet
from PIL import Image

from benchmarks import prepare_images as images
from lumos_jax.scenes import scene

SOURCES = {
    "laion": 0.3, "coyo": 0.2, "sa1b": 0.12, "journeydb": 0.1, "imagenet": 0.08, "classes": 0.05, "parquet": 0.1,
    "folder": 0.05,
}  # fmt: skip
ROLES = {  # shares of the images
    "distinct": 0.79, "exact": 0.04, "near": 0.08, "negative": 0.03, "evaluation": 0.01, "broken": 0.02, "scores": 0.02,
    "shape": 0.01,
}  # fmt: skip
SCORES = {"aesthetic": (5.0, 8.0), "watermark": (0.0, 0.4), "unsafe": (0.0, 0.4), "similarity": (0.25, 0.4)}
LOW = {"aesthetic": (1.0, 4.5), "watermark": (0.6, 1.0), "unsafe": (0.6, 1.0)}  # scores that reject
COLUMNS = {
    "laion": {"aesthetic": "aesthetic", "watermark": "pwatermark", "unsafe": "punsafe", "similarity": "similarity"},
    "coyo": {
        "aesthetic": "aesthetic_score_laion_v2", "watermark": "watermark_score", "unsafe": "nsfw_score_opennsfw2",
        "similarity": "clip_similarity_vitb32",
    },
}  # fmt: skip
SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
NAN_SHARE, CAPTION_SHARE, FAILED_SHARE = 0.03, 0.02, 0.03
EVALUATION_SHARE = 0.002  # evaluation images, of the number of images
CAPTIONS = (
    "", "   ", "a\tb\r\nc", "\u732b\u306e\u5199\u771f", "caf\u00e9 \U0001f600", "<b>sale</b> &amp; more", "x" * 5000, "NaN",
)  # fmt: skip
CHOICES = {
    "near": images.MUTATIONS, "evaluation": ("", *images.MUTATIONS), "broken": images.BROKEN, "shape": ("small", "long"),
    "scores": tuple(LOW),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    """One image of the corpus: its encoded bytes, what is true of it, its caption and its scores."""

    number: int
    content: bytes
    suffix: str
    role: str
    base: int
    how: str
    caption: str
    scores: dict[str, float]

    @property
    def url(self) -> str:
        return f"https://images.example/{self.number}{self.suffix}?size=1.5"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


class Corpus:
    """What image `number` is: a pure function of (seed, number)."""

    def __init__(self, seed: int, count: int, cache: str):
        self.seed, self.count = seed, count
        self.evaluation = range(count, count + max(5, round(EVALUATION_SHARE * count)))
        self.images = images.Images(seed, self.evaluation.stop, pathlib.Path(cache))

    @functools.lru_cache(maxsize=1 << 20)  # noqa: B019, one corpus a process
    def role(self, number: int) -> str:
        name = str(images.generator(self.seed, 2, number).choice(list(ROLES), p=list(ROLES.values())))
        return "distinct" if name == "scores" and self.source(number) not in ("laion", "coyo") else name

    def source(self, number: int) -> str:
        ends = np.cumsum(list(SOURCES.values()))
        return list(SOURCES)[int(np.searchsorted(ends, (number + 0.5) / self.count))]

    def original(self, number: int) -> tuple[bytes, str]:
        """The bytes and suffix of a distinct image, as its exact copies have them."""
        rng = images.generator(self.seed, 3, number)
        kind = str(rng.choice(list(SUFFIXES), p=(0.9, 0.05, 0.05)))
        return images.encoded(self.images.image(number), kind, int(rng.integers(82, 96))), SUFFIXES[kind]

    def item(self, number: int) -> Item:
        role, rng = self.role(number), images.generator(self.seed, 4, number)
        how = str(rng.choice(CHOICES[role])) if role in CHOICES else ""
        base = self._base(role, number, rng)
        if role == "negative":  # two of the same image differ in how
            start, base = base, self._distinct(base)
            how = images.NEGATIVES[(base - start) % self.count % len(images.NEGATIVES)]
            content, suffix = images.encoded(self.images.image(base, how)), ".jpg"
        else:
            content, suffix = self.original(base)
            content = self._altered(content, role, how, rng)
        scores = self._scores(role == "scores", how, rng)
        return Item(number, content, suffix, role, base, how, self._caption(number, rng), scores)

    def _base(self, role: str, number: int, rng: np.random.Generator) -> int:
        if role in ("exact", "near"):
            return self._distinct(int(rng.integers(self.count)))
        if role == "evaluation":
            return int(rng.choice(self.evaluation))
        return (number + self.count // 2) % self.count if role == "negative" else number

    def _distinct(self, number: int) -> int:
        """The first distinct image from `number` on."""
        return next(
            n % self.count for n in range(number, number + self.count) if self.role(n % self.count) == "distinct"
        )

    def _altered(self, content: bytes, role: str, how: str, rng: np.random.Generator) -> bytes:
        if role == "broken":
            return images.broken(content, how, rng)
        if how in images.MUTATIONS:
            return images.changed(Image.open(io.BytesIO(content)).convert("RGB"), how, rng)
        if role == "shape":
            side = int(rng.integers(100, 250))
            return images.encoded(Image.open(io.BytesIO(content)).convert("RGB").resize(
                (side, side + 40) if how == "small" else (1300 + side, 260)))  # fmt: skip
        return content

    def _caption(self, number: int, rng: np.random.Generator) -> str:
        if rng.random() < CAPTION_SHARE:
            return str(rng.choice(CAPTIONS))
        if number < self.count and self.images.kind(number) == "scene":
            return scene.captions(scene.make_scene(number))[0]
        return " ".join(rng.choice(images.WORDS, int(rng.integers(3, 12))))

    def _scores(self, low: bool, how: str, rng: np.random.Generator) -> dict[str, float]:
        scores = {name: float(rng.uniform(*span)) for name, span in SCORES.items()}
        if low:
            scores[how] = float(rng.uniform(*LOW[how]))
        elif rng.random() < NAN_SHARE:
            scores[str(rng.choice(list(scores)))] = float("nan")
        return scores


@dataclasses.dataclass(frozen=True)
class Job:
    """Images [first, last) of a source, written to a file (or a folder's files) of its own."""

    source: str
    place: int  # of the source's jobs
    first: int
    last: int
    total: int  # jobs of the source

    @property
    def path(self) -> str:
        n = self.place
        return {
            "laion": f"laion/{'ab'[n % 2]}/{n // 2:05d}.tar",  # two crawls: file names and keys repeat
            "coyo": f"coyo/{n:05d}.tar",
            "sa1b": f"sa1b/sa_{n:06d}.tar",
            "journeydb": f"journeydb/imgs/{n:03d}.tgz",
            "imagenet": f"imagenet/n{1440764 + n:08d}.tar",
            "classes": f"classes/n{2084071 + n:08d}",
            "parquet": f"parquet/train-{n:05d}-of-{self.total:05d}.parquet",
            "folder": f"folder/{n:03d}",
        }[self.source]


def jobs(count: int, file_images: int) -> list[Job]:
    found, first = [], 0
    for name, end in zip(SOURCES, np.cumsum(list(SOURCES.values())), strict=True):
        last = round(end * count)
        starts = range(first, last, file_images)
        found += [Job(name, i, n, min(n + file_images, last), len(starts)) for i, n in enumerate(starts)]
        first = last
    return found


def member(job: Job, item: Item) -> str:
    """The name of an image within its tar or folder."""
    place, stem = item.number - job.first, pathlib.PurePath(job.path).stem
    if job.source in ("laion", "coyo"):
        return f"{stem}{place:04d}.jpg"
    if job.source in ("imagenet", "classes"):
        return f"{stem}_{item.number}{'.v1.5' if item.number % 10 == 0 else ''}.JPEG"
    if job.source == "folder":
        return f"{item.number}{' at 1.5 km' if item.number % 10 == 0 else ''}{item.suffix}"
    return f"sa_{item.number}.jpg" if job.source == "sa1b" else f"{stem}/{item.sha256[:8]}-{item.number}.jpg"


def write_tar(stream, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def row(job: Job, item: Item) -> dict:
    """A row of img2dataset's parquet and the JSON of an image."""
    names = COLUMNS["laion"] if job.source == "laion" else {}
    key = member(job, item)[:-4]
    return {
        "url": item.url, "caption": item.caption, "key": key, "status": "success", "error_message": None, "sha256": item.sha256,
        **{column: item.scores[name] for name, column in names.items()},
    }  # fmt: skip


def write_img2dataset(path: pathlib.Path, job: Job, items: list[Item]) -> None:
    members, rows = [], []
    for item in items:
        rows.append(row(job, item))
        key = rows[-1]["key"]
        valid = {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in rows[-1].items()}
        members += [
            (f"{key}.jpg", item.content),
            (f"{key}.json", json.dumps(valid).encode()),
            (f"{key}.txt", item.caption.encode()),
        ]
    for number in range(int(len(items) * FAILED_SHARE)):
        failed = {
            "key": f"{path.stem.split('.')[0]}{len(items) + number:04d}",
            "url": f"https://gone.example/{job.first}/{number}",
        }
        rows.append(
            dict.fromkeys(rows[0]) | failed | {"status": "failed_to_download", "error_message": "HTTP Error 404"}
        )
    with open(path, "wb") as stream:
        write_tar(stream, members)
    final = path.with_name(path.name.removesuffix(".partial"))
    parquet.write_table(pyarrow.Table.from_pylist(rows), final.with_suffix(".parquet"))
    stats = {"count": len(rows), "successes": len(items), "failed_to_download": len(rows) - len(items)}
    final.with_name(f"{final.stem}_stats.json").write_text(json.dumps(stats))


def write_job(path: pathlib.Path, job: Job, items: list[Item]) -> None:
    """Writes the file, or folder, of a job."""
    named = [(member(job, item), item) for item in items]
    if job.source in ("laion", "coyo"):
        write_img2dataset(path, job, items)
    elif job.source == "sa1b":
        members = []
        for name, item in named:
            label = {"image": {"image_id": item.number, "file_name": name}, "annotations": []}
            members += [(name, item.content), (f"{name[:-4]}.json", json.dumps(label).encode())]
        with open(path, "wb") as stream:
            write_tar(stream, members)
    elif job.source == "journeydb":
        with open(path, "wb") as stream, gzip.GzipFile("", "wb", 1, stream, mtime=0) as packed:
            write_tar(packed, [(name, item.content) for name, item in named])
        lines = [
            {"img_path": f"./{n}", "prompt": i.caption, "Task2": {"Caption": f"A picture. {i.caption}"}}
            for n, i in named
        ]
        path.with_name(f"{path.name.split('.')[0]}.lines").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    elif job.source == "imagenet":
        with open(path, "wb") as stream:
            write_tar(stream, [(name, item.content) for name, item in named])
    elif job.source == "parquet":
        rows = [
            {"image": {"bytes": item.content, "path": f"{item.number}{item.suffix}"}, "text": item.caption}
            for item in items
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100, compression="none")
    else:
        path.mkdir()
        for name, item in named:
            (path / name).write_bytes(item.content)
            if job.source == "folder" and item.number % 2:
                (path / name).with_suffix(".txt").write_text(item.caption)


_corpus = functools.lru_cache(maxsize=1)(Corpus)  # of a process


def make(job: Job, out: str, *of_corpus) -> int:
    """Writes a job and then its truth, which says that it is done. Returns the number of images."""
    path = pathlib.Path(out, job.path)
    truth = pathlib.Path(out, ".truth", job.path.replace("/", "-") + ".parquet")
    if truth.exists():
        return 0
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in (path, partial):
        if old.is_dir():
            shutil.rmtree(old)
    items = [_corpus(*of_corpus).item(number) for number in range(job.first, job.last)]
    write_job(partial, job, items)
    os.replace(partial, path)
    rows = []
    for item in items:
        name = str(item.number) if job.source == "parquet" else member(job, item)
        known = {"role": item.role, "base": item.base, "how": item.how} | item.scores
        content = {"sha256": item.sha256, "bytes": len(item.content)}
        rows.append(
            {"number": item.number, "source": job.source, "file": job.path, "name": name, "url": item.url}
            | content
            | known
        )
    parquet.write_table(pyarrow.Table.from_pylist(rows), truth.with_suffix(".partial"))
    os.replace(truth.with_suffix(".partial"), truth)
    return len(items)


def finish(out: pathlib.Path, corpus: Corpus) -> pyarrow.Table:
    """Writes what covers several jobs: COYO's metadata, JourneyDB's annotations, evaluation images and the truth."""
    truth = pyarrow.concat_tables(parquet.read_table(path) for path in (out / ".truth").glob("*.parquet")).sort_by(
        "number"
    )
    parquet.write_table(truth, out / "truth.parquet")
    coyo = truth.filter(pyarrow.compute.equal(truth["source"], "coyo"))
    columns = {"url": coyo["url"], **{column: coyo[name] for name, column in COLUMNS["coyo"].items()}}
    parquet.write_table(pyarrow.table(columns), out / "coyo-metadata.parquet")
    lines = [path.read_text() for path in sorted((out / "journeydb/imgs").glob("*.lines"))]
    (out / "journeydb/train_anno.jsonl").write_text("".join(lines))
    (out / "evaluation").mkdir(exist_ok=True)
    for number in corpus.evaluation:
        content, suffix = corpus.original(number)
        (out / f"evaluation/{number}{suffix}").write_bytes(content)
    return truth


def build(
    out: pathlib.Path, count: int, file_images: int = 1000, photographs: str = "", seed: int = 0, processes: int = 0
):
    """Makes the corpus, in this process or in several, and returns its truth."""
    (out / ".truth").mkdir(parents=True, exist_ok=True)
    cache, made, begun = out / ".photographs", 0, time.time()
    images.prepare_photographs(photographs, cache)
    todo, of_corpus = jobs(count, file_images), (seed, count, str(cache))
    with multiprocessing.get_context("spawn").Pool(processes) if processes else contextlib.nullcontext() as pool:
        parts = [(job, str(out), *of_corpus) for job in todo]
        for done, number in enumerate(pool.imap_unordered(_make, parts) if pool else map(_make, parts), 1):
            made += number
            if processes and (done % 10 == 0 or done == len(todo)):
                print(f"{done} of {len(todo)} files, {made / (time.time() - begun):.0f} images/s", flush=True)
    return finish(out, Corpus(*of_corpus))


def _make(part) -> int:
    return make(*part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--file-images", type=int, default=1000, help="images a tar or parquet file, at most")
    parser.add_argument("--photographs", default="", help="a folder of photographs, 256 px or more on the shorter side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args, begun = parser.parse_args(), time.time()
    truth = build(args.out, args.images, args.file_images, args.photographs, args.seed, args.processes)
    size, photographs = sum(truth["bytes"].to_pylist()), len(list((args.out / ".photographs").iterdir()))
    print(f"{len(truth):,} images, of {photographs} photographs too, {size / 1e9:.2f} GB, {time.time() - begun:.0f} s")
    for line in truth.group_by("role").aggregate([("number", "count")]).to_pylist():
        print(f"{line['role']:12}{line['number_count']:8,}")


if __name__ == "__main__":
    main()
