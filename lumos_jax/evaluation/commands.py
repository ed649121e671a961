"""The commands `statistics`, `score` and `report` of lumos_jax.evaluate."""

from __future__ import annotations

import argparse
import io
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from lumos_jax import config, data
from lumos_jax.data.sources.scenes import ScenesSource
from lumos_jax.evaluation import features, metrics, official_results, report, scoring

_BATCH = 500  # records: sums are formed of so many, whatever the hardware
_OF_SAMPLES = ("samples", "truth")  # sources that are a directory of `evaluate sample`
_PREPARED = {"crop": "center square", "resize": "bilinear antialiased"}  # how data.decode makes images of one size


def _add_networks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--network-weights", action="append", default=[], metavar="NETWORK=PATH",
        help="official file, directory or hub id of a network that no package carries")  # fmt: skip
    add("--network-protocol", action="append", default=[], metavar="NETWORK=NAME",
        help="how its input is prepared, where not as usual, as inception=clean")  # fmt: skip


def add_statistics(commands: argparse._SubParsersAction) -> None:
    """Adds the command `statistics` and its flags."""
    parser = commands.add_parser("statistics", allow_abbrev=False, help="statistics of a reference set")
    add = parser.add_argument
    add("--source", required=True, choices=(*_OF_SAMPLES, *sorted(data.SOURCES)),
        help="samples, truth: of a directory of samples, and their true images; others: as config.data.source")  # fmt: skip
    add("--path", default="", help="of the source")
    add("--name", default="", help="of a set of source=tfds, as config.data.tfds.name")
    add("--split", default="train", help="of source=tfds")
    add("--network", required=True, choices=features.NETWORKS, help="whose features")
    add("--image-size", type=int, help="side in pixels to which images are cropped and resized: that of the samples")
    add("--num", type=int, metavar="N", help="so many records, evenly spaced; of scenes how many (default: all)")
    add("--frames", type=int, default=16, help="of clips")
    add("--stride", type=int, default=3, help="of clips: frames of the video from one to the next")
    add(
        "--motion", default="any", choices=("any", "turntable"), help="of clips of scenes, as config.data.scenes.motion"
    )
    add("--out", required=True, metavar="FILE.npz", help="file to write")
    _add_networks(parser)
    parser.set_defaults(run=statistics)


def statistics(args: argparse.Namespace) -> None:
    """Writes the statistics of a source's features. Raises ValueError for what is missing or damaged."""
    if pathlib.Path(args.out).suffix != ".npz":
        raise ValueError(f"--out={args.out} must end with .npz")
    network = metrics.Networks.parse(args.network_weights, args.network_protocol).open(args.network)
    total, images, batches = _of_samples(args) if args.source in _OF_SAMPLES else _of_records(args, network.kind)
    reference = scoring.make_reference(network, batches, total, images)
    reference.save(args.out)
    if reference.num <= network.dim:
        few = f"{reference.num} {network.kind}s are too few for {network.dim} features"
        print(f"warning: {few}: sigma is singular", file=sys.stderr)
    print(f"{network.name} statistics of {reference.num:,} {network.kind}s in {args.out}")


Batches = tuple[int, dict[str, Any], Iterator[np.ndarray]]  # images, what is known of them, their pixels


def _of_samples(args: argparse.Namespace) -> Batches:
    samples = scoring.open_samples(args.path)
    if args.image_size or args.num:
        raise ValueError(f"--source={args.source} takes all samples as they are: leave out --image-size and --num")
    about = {"source": args.source, "path": args.path, "codec": "none", "list_digest": samples.items.digest}

    def batches() -> Iterator[np.ndarray]:
        for shard, _, pixels in samples:
            pixels = pixels if args.source == "samples" else samples.references(shard)
            if pixels is None:
                raise ValueError(f"--source=truth: the samples in {args.path} have no true images")
            about["image_size"] = list(pixels.shape[-3:-1])
            yield pixels

    return len(samples), about, batches()


def _of_records(args: argparse.Namespace, kind: str) -> Batches:
    if not args.image_size:
        raise ValueError(
            f"--source={args.source} needs --image-size, the side in pixels of the samples to compare with"
        )
    fields: dict[str, Any] = {"source": args.source, "path": args.path, "image_size": args.image_size}
    fields |= {"tfds": config.Tfds(args.name, args.split)}
    if args.source == "scenes":
        fields["scenes"] = config.Scenes(args.num or 50_000, motion=args.motion)
    if kind == "clip":
        fields |= {"sample_type": "clip", "clips": config.Clips(args.frames, (args.stride, args.stride))}
    settings = config.Data(**fields)
    settings.check()
    source = data.make_source(settings)
    if args.num and args.num > len(source):
        raise ValueError(f"--num={args.num}: the source has {len(source)} records")
    records = np.linspace(0, len(source) - 1, args.num or len(source)).astype(int)
    about = {
        "source": args.source, "path": args.path, "codec": _codec(source, kind), "image_size": [args.image_size] * 2,
        "list_digest": source.fingerprint(), **_PREPARED,
    }  # fmt: skip
    if kind == "clip":
        about |= {"frames": args.frames, "stride": args.stride}
        about |= {"motion": args.motion} if args.source == "scenes" else {}

    def batches() -> Iterator[np.ndarray]:
        lists = [records[i : i + _BATCH].tolist() for i in range(0, len(records), _BATCH)]
        iterator, bad = data.make_record_iterator(settings, source, lists), 0
        try:
            for _ in lists:
                batch = next(iterator)
                good = batch["weight"] > 0
                bad += int((~good).sum())
                yield batch["frames" if kind == "clip" else "image"][good]
        finally:
            iterator.close()
        if bad:
            print(f"warning: {bad} records cannot be decoded and are left out", file=sys.stderr)

    return len(records), about, batches()


def _codec(source: data.Source, kind: str) -> str:
    """The format of the first record's file; none where the source gives pixels."""
    if kind == "clip":
        return "none" if isinstance(source, ScenesSource) else "video"
    try:
        content = source.read(0)
        if isinstance(content, np.ndarray):
            return "none"
        with Image.open(io.BytesIO(content)) as image:
            return (image.format or "unknown").lower()
    except (OSError, ValueError, data.CorruptRecord):
        return "unknown"


def add_score(commands: argparse._SubParsersAction) -> None:
    """Adds the command `score` and its flags."""
    parser = commands.add_parser("score", allow_abbrev=False, help="scores of samples, with intervals")
    add = parser.add_argument
    add("--samples", required=True, metavar="DIR", help="of `evaluate sample`, or a folder of PNG files")
    add("--metrics", default="", metavar="NAME,...", help=", ".join(metrics.METRICS))
    add("--geneval", metavar="FILE", help="results.jsonl of GenEval's own scorer about these samples, exported")
    add("--dpg", metavar="FILE", help="results of DPG-Bench's own scorer (--res-path, with --pic-num=4) about them")
    add("--reference", action="append", default=[], metavar="FILE",
        help="statistics, one file a network: of `evaluate statistics`, or of ADM, EDM, EDM2, pytorch-fid")  # fmt: skip
    add("--out", metavar="DIR", help="where scores.json goes (default: to the samples)")
    _add_networks(parser)
    parser.set_defaults(run=score)


def score(args: argparse.Namespace) -> None:
    """Scores samples, writes scores.json and prints a table. Raises ValueError as `scoring.score_samples`."""
    samples = scoring.open_samples(args.samples)
    names = list(dict.fromkeys(name.strip() for name in args.metrics.split(",") if name.strip()))
    official = {name: getattr(args, name) for name in official_results.SCORERS if getattr(args, name)}
    if not (names or official):
        raise ValueError("--metrics is missing: name what to score, as --metrics=psnr,ssim")
    networks = metrics.Networks.parse(args.network_weights, args.network_protocol)
    scores = scoring.score_samples(samples, names, args.reference, networks)
    for name, path in official.items():
        scores.estimates[name] = official_results.SCORERS[name](path, samples.items.items)
        scores.details[name] = {"metric": name, "better": "higher", "num": len(samples)}
    scoring.save(scores, args.out or args.samples, scoring.describe(samples))
    for warning in scores.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    width = max(map(len, scores.estimates))
    for name, estimate in scores.estimates.items():
        corrected = "" if estimate.corrected is None else f"   without bias {estimate.corrected:.4g}"
        interval = f"[{estimate.low:.4g}, {estimate.high:.4g}]"
        print(f"{name:{width}}  {estimate.value:10.4g}   95 % {interval}{corrected}")


def add_report(commands: argparse._SubParsersAction) -> None:
    """Adds the command `report` and its flags."""
    parser = commands.add_parser("report", allow_abbrev=False, help="tables, differences and curves of scored samples")
    add = parser.add_argument
    add("directories", nargs="+", metavar="DIR", help="with a scores.json; the first is what others are compared with")
    add(
        "--out", default="report.md", metavar="FILE.md", help="file to write, with .json and .png beside it (report.md)"
    )
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> None:
    """Writes and prints a report. Raises ValueError where there are no scores."""
    print(report.write(args.directories, args.out), end="")
