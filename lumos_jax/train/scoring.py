"""Scores of samples of held-out records against what is known to be true of them: `score_*` in the metrics of a run.

One sample a record, from the same noise every time, so that the curve changes only because the network does. Images of
features, novel views and clips are compared with the true ones (PSNR, SSIM, optical flow); images of captions of the embedded
scenes are scored by the solids that are found in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lumos_jax import data, evaluation
from lumos_jax.train import rngs, sharding
from lumos_jax.train.experiment import Experiment


class Scorer:
    """Samples and scores the first `eval.num_scored` held-out records of a run."""

    def __init__(self, experiment: Experiment, source: data.Source):
        self.experiment, self.source, settings = experiment, source, experiment.settings
        self.sampling = experiment.task.sampling
        size = settings.eval.batch_size
        ids = data.holdout_records(settings.data, source)[: settings.eval.num_scored]
        # Every process reads all of them, to score the samples that all of them get.
        self.hosts = [
            data.read_batch(settings.data, source, ids[first : first + size], experiment.task.host)
            for first in range(0, len(ids), size)
        ]
        if not all(map(self._has_truth, self.hosts)):
            self.hosts = []

        def generate(params, frozen, batch, index):
            keys = tuple(rngs.key(settings.train.seed, f"scored/{name}", index) for name in ("noise", "sampler"))
            return self.sampling.generate_batch(params, frozen, batch, keys, 1, settings.eval, experiment.gather)[:, 0]

        self._generate = jax.jit(generate, out_shardings=sharding.replicated(experiment.mesh))

    def __call__(self, params: Any) -> dict[str, float]:
        """Mean scores of these weights, by name; empty if the truth is not known."""
        experiment, size = self.experiment, self.experiment.settings.eval.batch_size
        rows = experiment.local_rows(size)
        samples = []
        for index, host in enumerate(self.hosts):
            local = {name: array[rows] for name, array in sharding.device_arrays(host).items()}
            batch = sharding.global_batch(experiment.mesh, local, rows, size)
            samples.append(np.asarray(self._generate(params, experiment.frozen, batch, index)))
        values: dict[str, list[float]] = {}
        for host, images in zip(self.hosts, samples, strict=True):
            for name, scores in self._scores(host, images).items():
                values.setdefault(name, []).extend(scores[host["weight"] > 0])
        return {f"score_{name}": float(np.mean(scores)) for name, scores in values.items() if scores}

    def _has_truth(self, host: Mapping[str, np.ndarray]) -> bool:
        caption_of_scene = "caption" in host and self.experiment.settings.data.source == "scenes"
        return caption_of_scene or self.sampling.truth(host) is not None

    def _scores(self, host: Mapping[str, np.ndarray], samples: np.ndarray) -> dict[str, np.ndarray]:
        """A value a row."""
        truth = self.sampling.truth(host)
        if truth is not None:
            return evaluation.reconstruction_scores(samples, truth)
        return evaluation.caption_agreement(samples, data.scenes_of(self.source, host["record"]))
