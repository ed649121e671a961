"""The metrics of `lumos_jax.evaluate score`, by name. A new one is an entry of METRICS.

A `SetMetric` compares features of all samples with a reference; its value depends on the number of samples, which becomes part
of its name (`name_with_count`). A `SampleMetric` has a value for each sample, and its score is their mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax.evaluation import features, intervals, kernel, precision_recall, scene_prompts
from lumos_jax.evaluation.frechet import frechet
from lumos_jax.evaluation.intervals import Estimate
from lumos_jax.evaluation.lists import Item
from lumos_jax.evaluation.networks import weights as weights_of
from lumos_jax.evaluation.reconstruction import reconstruction_scores
from lumos_jax.evaluation.references import Reference
from lumos_jax.scenes.reader import MEASURES, caption_agreement
from lumos_jax.scenes.scene import make_scene


@dataclasses.dataclass(frozen=True)
class SetMetric:
    """A metric of all samples.

    Attributes:
      network: of `features.NETWORKS`.
      function: (features (N, D), reference) -> its estimate.
      lower: whether lower is better.
    """

    network: str
    function: Callable[[np.ndarray, Reference], Estimate]
    lower: bool = True


@dataclasses.dataclass(frozen=True)
class Networks:
    """How networks are opened: for each name its weights (path or hub id) and protocol, where they are not the usual ones."""

    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    protocols: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        weights: Sequence[str],
        protocols: Sequence[str],
        fields: tuple[str, str] = ("--network-weights", "--network-protocol"),
    ) -> Networks:
        """From NETWORK=PATH and NETWORK=NAME. `fields` names both in errors.
        Raises ValueError: another form, or an unknown network."""
        known = tuple(weights_of.OFFICIAL), features.NETWORKS
        return cls(*map(_parse_pairs, (weights, protocols), fields, known))

    def open(self, name: str) -> features.FeatureNetwork:
        return features.open_network(name, self.weights.get(name, ""), self.protocols.get(name, ""))


def _parse_pairs(pairs: Sequence[str], field: str, known: Sequence[str]) -> dict[str, str]:
    made = {}
    for text in pairs:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ValueError(f"{field} {text!r} must be NETWORK=VALUE, NETWORK one of {', '.join(known)}")
        made[name] = value
    return made


Score = Callable[[np.ndarray, "np.ndarray | None", Sequence[Item]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SampleMetric:
    """A metric of single samples.

    Attributes:
      open: networks -> (samples (n, [F,] H, W, 3) uint8, true images of the same shape or None, items) -> values (n,).
      needs: the condition of an item that must be there; empty: none.
      truth: whether it compares with the true image.
      lower: whether lower is better.
      protocol: what else the value depends on; a key of weights and protocols where a network is used.
      categories: whether the score is the mean over the items' tags.
    """

    open: Callable[[Networks], Score]
    needs: str = ""
    truth: bool = False
    lower: bool = False
    protocol: str = ""
    categories: bool = False

    def estimate(self, values: np.ndarray, items: Sequence[Item]) -> Estimate:
        """From the values of all samples."""
        clusters = np.array([item.group or item.id for item in items])
        if self.categories:
            return intervals.category_mean(values, clusters, np.array([item.extra["tag"] for item in items]))
        return intervals.clustered_mean(values, clusters)


def _reconstruction(name: str) -> Callable[[Networks], Score]:
    def score(pixels, truth, items):
        scores = reconstruction_scores(pixels, truth, (name,))
        if name not in scores:
            raise ValueError(
                f"{name} has no value for samples of shape {pixels.shape[1:]}: ssim needs 11 pixels a side, flow_error needs "
                "clips and the extra `video`"
            )
        return scores[name]

    return lambda networks: score


def _lpips(net: str) -> Callable[[Networks], Score]:
    def open(networks: Networks) -> Score:
        distance = features.lpips(networks.weights.get("vgg16" if net == "vgg" else net, ""), net)

        def score(pixels, truth, items):
            flat = (-1, *pixels.shape[-3:])
            return distance(pixels.reshape(flat), truth.reshape(flat)).reshape(len(pixels), -1).mean(1)

        return score

    return open


def _clip(networks: Networks) -> Score:
    cosine = features.clip_score(networks.weights.get("clip_score", ""))
    return lambda pixels, truth, items: cosine(pixels, [item.condition["caption"] for item in items])


def _pic(networks: Networks) -> Score:
    similarity = features.pic(networks.weights.get("dreamsim", ""), networks.protocols.get("dreamsim", ""))
    return lambda pixels, truth, items: similarity(pixels)


def _prompts(networks: Networks) -> Score:
    return lambda pixels, truth, items: scene_prompts.correct(pixels, [item.extra for item in items])


def _caption(measure: str) -> Callable[[Networks], Score]:
    def score(pixels, truth, items):
        return caption_agreement(pixels, [make_scene(item.condition["scene"]) for item in items])[measure]

    return lambda networks: score


Metric = SetMetric | SampleMetric
_FUNCTIONS = {"fd": (frechet, True), "kid": (kernel.kid, True), "precision": (precision_recall.precision, False),
              "recall": (precision_recall.recall, False)}  # fmt: skip
METRICS: dict[str, Metric] = {
    "fid": SetMetric("inception", frechet),
    "kid": SetMetric("inception", kernel.kid),
    "precision": SetMetric("inception", precision_recall.precision, lower=False),
    "recall": SetMetric("inception", precision_recall.recall, lower=False),
    "cmmd": SetMetric("clip", kernel.cmmd),
    "fvd": SetMetric("i3d", frechet),
    "kvd": SetMetric("i3d", kernel.kvd),
    "clip": SampleMetric(_clip, needs="caption", protocol="clip_score"),
    "lpips": SampleMetric(_lpips("vgg"), truth=True, lower=True, protocol="vgg"),
    "lpips_alex": SampleMetric(_lpips("alex"), truth=True, lower=True, protocol="alex"),
    "psnr": SampleMetric(_reconstruction("psnr"), truth=True),
    "ssim": SampleMetric(_reconstruction("ssim"), truth=True),
    "flow_error": SampleMetric(_reconstruction("flow_error"), truth=True, lower=True),
    "pic": SampleMetric(_pic, protocol="dreamsim"),
    "scenes": SampleMetric(_prompts, needs="caption", categories=True),
}
METRICS |= {
    f"{name}_{network}": SetMetric(network, function, lower)
    for name, (function, lower) in _FUNCTIONS.items()
    for network in ("dinov2", "vgg16", "scene_vit")
}
METRICS |= {f"caption_{measure}": SampleMetric(_caption(measure), needs="scene") for measure in MEASURES}


def find(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of these names. Raises ValueError for one that is unknown."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metric {name!r} is unknown: choose of {', '.join(METRICS)}")
    return {name: METRICS[name] for name in names}


def name_with_count(name: str, count: int) -> str:
    """The name of a SetMetric's score of so many samples: fid5k, fd_dinov2@2048. Scores of other numbers are other metrics."""
    number = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    return f"{name}@{number}" if name[-1].isdigit() else f"{name}{number}"


def described(metric: Metric) -> dict[str, Any]:
    """What a score's value means, for files."""
    made: dict[str, Any] = {"better": "lower" if metric.lower else "higher"}
    if isinstance(metric, SampleMetric) and metric.protocol:
        made["network"] = metric.protocol
    return made
