"""Scores of a set of samples, and the files that keep them: scores.json for people, scores.npz for differences between runs.

Samples are those of a directory (`shards.Samples`), of a folder of PNG files (`ImageFolder`), or anything else that has their
`items` and `protocol` and iterates (shard number, ids, pixels).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lumos_jax import fileio, progress
from lumos_jax.data.files import IMAGE_ENDINGS, files_below
from lumos_jax.evaluation import metrics, references
from lumos_jax.evaluation.frechet import Moments
from lumos_jax.evaluation.intervals import Estimate
from lumos_jax.evaluation.lists import Item, ItemList
from lumos_jax.evaluation.references import Reference
from lumos_jax.evaluation.shards import SHARD_SIZE, Samples

FILE, ARRAYS = "scores.json", "scores.npz"
_NUMBERS = ("value", "corrected", "error", "low", "high")


@dataclasses.dataclass
class Scores:
    """Scores of one set of samples.

    Attributes:
      estimates: score name -> its estimate.
      details: score name -> what it was made with: metric, better, num, network, reference ...
      warnings: what a reader of the numbers should know.
    """

    estimates: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    details: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


def score_samples(
    samples: Any,
    names: Sequence[str],
    given: Sequence[str | Reference] = (),
    networks: metrics.Networks | None = None,
) -> Scores:
    """Scores of samples.

    Args:
      samples: see above.
      names: of metrics.METRICS.
      given: references, or their files, for the networks that metrics of sets need.
      networks: weights and protocols of networks.

    Raises:
      ValueError: a metric that is unknown or that these samples cannot have; statistics that are missing or of other features;
        features that are NaN; too few samples.
    """
    networks, scores, chosen = networks or metrics.Networks(), Scores(), metrics.find(names)
    for name, metric in chosen.items():
        check_needs(name, metric, samples.items, bool(samples.protocol.get("paired")))
    of_sets = {name: metric for name, metric in chosen.items() if isinstance(metric, metrics.SetMetric)}
    found = {metric.network: _find_reference(metric.network, name, given) for name, metric in of_sets.items()}
    for name, reference in found.items():
        network = networks.open(name)
        scores.warnings += reference.check(network)
        features = _features(samples, network, reference)
        _warn_of_counts(scores, features.shape, reference)
        if reference.images.get("list_digest") == samples.items.digest:
            scores.warnings.append(
                f"{reference.path} is of the true images of these very samples: the correction of its bias does not hold"
            )
        made_with = {
            "network": {"name": name, "sha256": network.sha256, **network.protocol},
            "reference": {"path": reference.path, "num": reference.num, "ddof": reference.ddof, **reference.images},
        }
        for short, metric in of_sets.items():
            if metric.network == name:
                full = metrics.name_with_count(short, len(features))
                scores.estimates[full] = metric.function(features, reference)
                scores.details[full] = {"metric": short, "num": len(features), **metrics.described(metric), **made_with}
    of_samples = {name: metric for name, metric in chosen.items() if isinstance(metric, metrics.SampleMetric)}
    _score_each(samples, of_samples, networks, scores)
    return scores


def make_reference(network: Any, batches: Iterable[np.ndarray], total: int, images: Mapping[str, Any]) -> Reference:
    """The statistics of images or clips.

    Args:
      network: features.FeatureNetwork.
      batches: their pixels, uint8 (B, [F,] H, W, 3); sums are formed of each, in this order.
      total: how many there are at most; decides which features are kept.
      images: what is known of them, see Reference.

    Raises:
      ValueError: fewer than two, or features that are NaN.
    """
    keep = np.unique(np.linspace(0, total - 1, min(total, references.MOST_FEATURES)).astype(int))
    sums, kept, count = None, [], 0
    bar = progress.bar(total=total, unit=network.kind)
    for features in network.stream(batches):
        bar.update(len(features))
        numbers = np.arange(count, count + len(features))
        check_finite(features, numbers)
        kept.append(features[np.isin(numbers, keep)])
        made, count = Moments.of(features), count + len(features)
        sums = made if sums is None else sums + made
    bar.close()
    if count < 2:
        raise ValueError(f"{count} {network.kind}s give no statistics: two or more are needed")
    return Reference(
        sums.mean, sums.covariance, count, network.name, network.sha256, network.protocol, images=images,
        features=np.concatenate(kept),
    )  # fmt: skip


def check_needs(name: str, metric: metrics.Metric, items: ItemList, paired: bool) -> None:
    """Raises ValueError if samples of these items cannot have a metric. paired: whether their true images are known."""
    if isinstance(metric, metrics.SetMetric):
        return
    lacking = [item.id for item in items.items if metric.needs and metric.needs not in item.condition]
    if lacking:
        raise ValueError(f"{name} needs items with a {metric.needs}, and item {lacking[0]!r} has none")
    if metric.truth and not paired:
        raise ValueError(f"{name} compares samples with their true images, which these samples do not have")


def _find_reference(network: str, metric: str, given: Sequence[str | Reference]) -> Reference:
    made = [one if isinstance(one, Reference) else references.read(one, network) for one in given]
    found = [one for one in made if one is not None and one.network == network]
    if len(found) != 1:
        what = "gives no statistics" if not found else f"gives {len(found)} files"
        raise ValueError(
            f"{metric} needs one reference for the network {network}, and --reference {what} for it: make one with "
            f"`lumos_jax.evaluate statistics --network={network}`"
        )
    return found[0]


def _features(samples: Any, network: Any, reference: Reference) -> np.ndarray:
    """(N, D) float32. Raises ValueError if one is NaN or infinite, or samples are not of the network's or reference's shape."""
    ids: list[str] = []

    def pixels() -> Iterator[np.ndarray]:
        for _, names, batch in samples:
            if (batch.ndim == 5) != (network.kind == "clip"):
                given = "clips" if batch.ndim == 5 else "images"
                raise ValueError(f"the network {network.name} takes {network.kind}s, and these samples are {given}")
            own = {"image_size": list(batch.shape[-3:-1]), "frames": batch.shape[1]}
            for field in own.keys() & reference.images.keys():
                if own[field] != reference.images[field]:
                    raise ValueError(
                        f"{reference.path} cannot be the reference: its {field} is {reference.images[field]}, and that of the "
                        f"samples is {own[field]}"
                    )
            ids.extend(names)
            yield batch

    with progress.bar(total=len(samples.items.items), unit=network.kind) as bar:
        parts = []
        for part in network.stream(pixels()):
            parts.append(part)
            bar.update(len(part))
    features = np.concatenate(parts)
    check_finite(features, ids)
    return features


def check_finite(features: np.ndarray, ids: Sequence[Any]) -> None:
    """Raises ValueError, which names the first sample, if a feature is NaN or infinite."""
    wrong = np.flatnonzero(~np.isfinite(features).all(1))
    if len(wrong):
        raise ValueError(f"{len(wrong)} samples have features that are NaN or infinite, the first is {ids[wrong[0]]!r}")


def _warn_of_counts(scores: Scores, shape: tuple[int, int], reference: Reference) -> None:
    count, dim = shape
    for what, number in (("samples", count), ("reference images", reference.num)):
        if 0 < number <= dim:
            scores.warnings.append(
                f"{number} {what} are too few for {dim} features: the covariance is singular, and a Frechet distance has a "
                "large bias"
            )


def _score_each(
    samples: Any, chosen: Mapping[str, metrics.SampleMetric], networks: metrics.Networks, scores: Scores
) -> None:
    """Adds the metrics of single samples, and a warning of equal samples."""
    opened = {name: metric.open(networks) for name, metric in chosen.items()}
    values: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    hashes, items = [], {item.id: item for item in samples.items.items}
    bar = progress.bar(total=len(items), unit="sample")
    for shard, ids, pixels in samples:
        bar.update(len(ids))
        hashes += [hashlib.blake2b(np.ascontiguousarray(one).data, digest_size=16).digest() for one in pixels]
        truth = samples.references(shard) if any(metric.truth for metric in chosen.values()) else None
        for name, score in opened.items():
            values[name].append(np.asarray(score(pixels, truth, [items[id] for id in ids]), np.float64))
    bar.close()
    if len(set(hashes)) < len(hashes):
        scores.warnings.append(f"{len(hashes) - len(set(hashes))} samples are equal to another one, pixel for pixel")
    for name, metric in chosen.items():
        found = np.concatenate(values[name])
        check_finite(found[:, None], list(items))
        scores.estimates[name] = metric.estimate(found, samples.items.items)
        scores.details[name] = {"metric": name, "num": len(found), **metrics.described(metric)}


def save(scores: Scores, directory: str | pathlib.Path, about: Mapping[str, Any]) -> None:
    """Writes both files, or adds to those of the same samples.

    about: of the samples, as `describe` gives it.
    """
    directory = pathlib.Path(directory)
    kept, estimates, warnings = {}, scores.estimates, scores.warnings
    if (directory / FILE).exists():
        before, others = load(directory)
        if before["samples"] == json.loads(json.dumps(about)):
            kept, estimates = before["scores"], others | estimates
            warnings = list(dict.fromkeys([*before["warnings"], *warnings]))
    for name, estimate in scores.estimates.items():
        numbers = {field: getattr(estimate, field) for field in _NUMBERS}
        kept[name] = {**numbers, "interval": estimate.kind, **scores.details[name], **_categories(estimate)}
    arrays = {f"{name}/{field}": array for name, one in estimates.items() for field, array in one.basis.items()}
    with fileio.replacing(directory / ARRAYS) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)
    fileio.save_json({"samples": about, "scores": kept, "warnings": warnings}, directory / FILE)


def _categories(estimate: Estimate) -> dict[str, Any]:
    if estimate.kind != "bootstrap":
        return {}
    values, categories = estimate.basis["values"], estimate.basis["categories"]
    return {"categories": {str(tag): float(values[categories == tag].mean()) for tag in np.unique(categories)}}


def load(directory: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, Estimate]]:
    """(content of scores.json, score name -> estimate). Raises ValueError if they cannot be read."""
    directory = pathlib.Path(directory)
    try:
        content = json.loads((directory / FILE).read_text())
        with np.load(directory / ARRAYS) as file:
            arrays = {name: file[name] for name in file.files}
        made = {}
        for name, entry in content["scores"].items():
            basis = {key.rpartition("/")[2]: array for key, array in arrays.items() if key.startswith(f"{name}/")}
            made[name] = Estimate(*(entry[field] for field in _NUMBERS), entry["interval"], basis)
    except OSError as error:
        raise fileio.failure(error, f"{directory} holds no scores: run `lumos_jax.evaluate score` ({error})") from error
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{directory}: {FILE} or {ARRAYS} is damaged ({error}): delete both and score again"
        ) from error
    return content, made


def describe(samples: Any) -> dict[str, Any]:
    """What scores.json says of the samples."""
    own = dict(samples.protocol)
    own |= {"directory": str(samples.directory), "list_digest": samples.items.digest, "num": len(samples.items)}
    digests = samples.digests()
    return own | {"samples_digest": hashlib.sha256("".join(digests).encode()).hexdigest()}


class ImageFolder:
    """A folder of PNG files of one size as samples, in the order of their names; its list is their names.

    Raises:
      ValueError: no PNG files, or images of another format.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        found = sorted(map(pathlib.Path, files_below(self.directory))) if self.directory.is_dir() else []
        self.files = [path for path in found if path.suffix.lower() in IMAGE_ENDINGS]
        if not self.files:
            raise ValueError(f"{self.directory} holds neither samples of lumos_jax.evaluate nor PNG files")
        if other := [path for path in self.files if path.suffix.lower() != ".png"]:
            raise ValueError(
                f"{other[0]} is no PNG file: lossy compression alone changes a Frechet distance; save samples as PNG files"
            )
        names = (path.relative_to(self.directory).with_suffix("").as_posix() for path in self.files)
        self.items = ItemList(self.directory.name, tuple(Item(name) for name in names))
        self.protocol = {"list": self.directory.name}

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[int, list[str], np.ndarray]]:
        shape = None
        for shard, start in enumerate(range(0, len(self), SHARD_SIZE)):
            files = self.files[start : start + SHARD_SIZE]
            images = []
            for path in files:
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("RGB")))
                shape = shape or images[-1].shape
                if images[-1].shape != shape:
                    raise ValueError(f"{path} is of {images[-1].shape[:2]} pixels, and others are of {shape[:2]}")
            yield shard, [item.id for item in self.items.items[start : start + SHARD_SIZE]], np.stack(images)

    def references(self, shard: int) -> None:
        return None

    def digests(self) -> list[str]:
        """The SHA-256 of each file."""
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files]


def open_samples(directory: str | pathlib.Path) -> Samples | ImageFolder:
    """A directory of shards, or a folder of PNG files. Raises ValueError as these do."""
    sharded = (pathlib.Path(directory) / "protocol.json").exists()
    return Samples(directory) if sharded else ImageFolder(directory)
