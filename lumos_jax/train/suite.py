"""The metrics of `lumos_jax.evaluate score` during training: config.eval.suite, every eval.suite_every steps.

EMA weights make the samples of a fixed list, as `lumos_jax.evaluate sample` does, always from the same noise: of the set
`scenes` where a run trains on scenes, else of its held-out records. Metrics of sets compare them with the true images of as
many further items, so that no sample is compared with its own image. All processes sample on one mesh and score all samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lumos_jax.evaluation import intervals, lists, metrics, scoring
from lumos_jax.evaluation.job import padded_batches, read_ahead
from lumos_jax.train import sharding
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.items import ItemReader, held_out_list, make_generate
from lumos_jax.train.state import TrainState


def make_suite(experiment: Experiment) -> Suite | None:
    """None if config.eval.suite is empty. Raises ValueError for metrics that this run cannot have."""
    return Suite(experiment) if experiment.settings.eval.suite else None


def parse(suite: Sequence[str]) -> dict[str, tuple[metrics.Metric, int]]:
    """("fd_vgg16@2k", ...) -> for each its metric and its number of samples. Raises ValueError for another form."""
    found = {}
    for text in suite:
        match = re.fullmatch(r"(\w+)@(\d+)(k?)", text)
        if match is None:
            raise ValueError(f"config.eval.suite has {text!r}: write METRIC@SAMPLES, as fd_vgg16@2k")
        found[text] = (metrics.find([match[1]])[match[1]], int(match[2]) * (1000 if match[3] else 1))
    return found


class Suite:
    """Scores of EMA samples."""

    def __init__(self, experiment: Experiment):
        settings, sampling = experiment.settings, experiment.task.sampling
        if sampling is None:
            raise ValueError(f"config.eval.suite scores samples, and task {experiment.task.name} generates none")
        self.experiment, self.chosen = experiment, parse(settings.eval.suite)
        self.count = max(count for _, count in self.chosen.values())
        of_sets = {metric.network for metric, _ in self.chosen.values() if isinstance(metric, metrics.SetMetric)}
        wanted = 2 * self.count if of_sets else self.count
        scenes = settings.data.source == "scenes"
        self.items = lists.make_list("scenes", num=wanted) if scenes else held_out_list(settings.data, wanted)
        self.reader = ItemReader(experiment, sampling, self.items)
        fields = ("network_weights", "network_protocol")
        given = (getattr(settings.eval, field) for field in fields)
        opened = metrics.Networks.parse(*given, tuple(f"config.eval.{field}" for field in fields))
        self.networks = {name: opened.open(name) for name in of_sets}
        self._check(clips=len(sampling.latent_shape) == 4)
        truth = list(self._truth()) if of_sets else []
        self.references = {
            name: scoring.make_reference(network, truth, self.count, {}) for name, network in self.networks.items()
        }
        self.scores = {
            name: metric.open(opened)
            for name, (metric, _) in self.chosen.items()
            if isinstance(metric, metrics.SampleMetric)
        }
        generate = make_generate(experiment, sampling, settings.train.seed)
        self._generate = jax.jit(generate, out_shardings=sharding.replicated(experiment.mesh))

    def _check(self, clips: bool) -> None:
        """Raises ValueError for a metric that samples of this run cannot have."""
        for name, (metric, count) in self.chosen.items():
            scoring.check_needs(name, metric, self.items, self.reader.paired)
            if isinstance(metric, metrics.SampleMetric):
                if metric.categories:
                    raise ValueError(f"config.eval.suite has {name!r}, which needs prompts: use lumos_jax.evaluate")
                continue
            kind = self.networks[metric.network].kind
            if (kind == "clip") != clips:
                raise ValueError(
                    f"config.eval.suite has {name!r}, whose network takes {kind}s, and this run makes others"
                )
            if count < intervals.LEAST:
                raise ValueError(f"config.eval.suite has {name!r}: it needs {intervals.LEAST} samples or more")

    def measure(self, state: TrainState) -> tuple[dict[str, float], str]:
        """suite_NAME and suite_NAME_error (the standard error) of each metric, and a sentence."""
        pixels, truth = self._samples(self.experiment.ema_weights(state))
        features = {name: network(pixels) for name, network in self.networks.items()}
        values, parts = {}, []
        for name, (metric, count) in self.chosen.items():
            if isinstance(metric, metrics.SetMetric):
                estimate = metric.function(features[metric.network][:count], self.references[metric.network])
            else:
                items = self.items.items[:count]
                own = self.scores[name](pixels[:count], None if truth is None else truth[:count], items)
                estimate = metric.estimate(np.asarray(own, np.float64), items)
            values |= {f"suite_{name}": estimate.value, f"suite_{name}_error": estimate.error}
            parts.append(f"{name} {estimate.value:.4g} +- {1.96 * estimate.error:.2g}")
        return values, f"suite: {', '.join(parts)}"

    def _samples(self, params: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """(samples, true images or None) of the list's first `count` items."""
        experiment, size = self.experiment, self.experiment.settings.micro_batch
        pixels, truth = [], []
        batches = list(padded_batches(range(self.count), size))
        read = read_ahead(self.reader, [numbers for numbers, _ in batches])
        for (numbers, count), (host, reference) in zip(batches, read, strict=True):
            arrays = sharding.device_arrays(host) | {"number": numbers}
            batch = sharding.global_batch(experiment.mesh, arrays, size)
            made = self._generate(params, experiment.frozen, batch, batch.pop("number"))
            pixels.append(np.asarray(made)[:count])
            truth += [] if reference is None else [reference[:count]]
        return np.concatenate(pixels), np.concatenate(truth) if truth else None

    def _truth(self) -> Iterator[np.ndarray]:
        """The true images of the list's other items, in batches."""
        size = self.experiment.settings.micro_batch
        for numbers, count in padded_batches(range(self.count, len(self.items)), size):
            _, images = self.reader(numbers)
            if images is None:
                raise ValueError(
                    f"config.eval.suite compares with true images, and config.data.source="
                    f"{self.experiment.settings.data.source} has none"
                )
            yield images[:count]
