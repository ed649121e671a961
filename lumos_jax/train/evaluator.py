"""Evaluation during training, on the same held-out records every time: metrics, a sentence about them, and a sheet of images.

A diffusion task is measured by its held-out loss and by samples; a task that learns features of images, by the labels of their
nearest neighbors; one that learns features of images and captions, by retrieval. A task names its evaluator in
`Task.evaluator`. `measure` gives metrics of the EMA weights and a sentence for people, `sheet` one image (H, W, 3) uint8.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lumos_jax import config, data, evaluation
from lumos_jax.tasks import media
from lumos_jax.train import rngs, sharding
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.state import TrainState


def make_evaluator(experiment: Experiment, source: data.Source) -> Evaluator | None:
    """The evaluator of the task; None if config.eval.every is 0. Raises ValueError if no held-out record can be decoded."""
    if not experiment.settings.eval.every:
        return None
    return EVALUATORS[experiment.task.evaluator](experiment, source)


def _read(experiment: Experiment, source: data.Source, ids: Sequence[int], places: Sequence[int]) -> dict[str, Any]:
    """The records at these places of `ids`, as a host batch; rows past the end have weight 0."""
    chosen = [ids[place % len(ids)] for place in places]
    batch = data.read_batch(experiment.settings.data, source, chosen, experiment.task.host)
    return batch | {"weight": batch["weight"] * (np.array(places) < len(ids))}


def _read_batches(experiment: Experiment, source: data.Source, ids: Sequence[int]) -> list[Any]:
    """These records, `micro_batch` at a time, on the mesh. Raises ValueError if not one can be decoded."""
    settings = experiment.settings
    size, batches, readable, problem = settings.micro_batch, [], False, ""
    rows = experiment.local_rows(size)
    for first in range(0, len(ids), size):
        local = _read(experiment, source, ids, [first + row for row in rows])
        readable |= bool(local["weight"].any())
        problem = problem or next(filter(None, map(str, local["problem"])), "")
        batches.append(experiment.device_batch(local, size))
    if sharding.all_agree(not readable):
        raise _none_readable(settings, len(ids), problem)
    return batches


def _none_readable(settings: config.Settings, count: int, problem: str) -> ValueError:
    return ValueError(
        f"none of the {count} held-out records of config.data.source={settings.data.source} can be decoded ({problem}): "
        "repair the data, or set config.eval.every=0 to train without evaluation"
    )


def _decoded(experiment: Experiment, source: data.Source, ids: Sequence[int]) -> tuple[dict[str, Any], np.ndarray]:
    """The host batch of those records that can be decoded, which every process has whole, and their places in `ids`.
    Raises ValueError if there are none."""
    settings = experiment.settings
    host = data.read_batch(settings.data, source, ids, experiment.task.host)
    decoded = np.flatnonzero(host["weight"])
    if not len(decoded):
        raise _none_readable(settings, len(ids), next(filter(None, map(str, host["problem"])), ""))
    return {name: array[decoded] for name, array in host.items()}, decoded


def _repeated_batches(experiment: Experiment, arrays: Mapping[str, np.ndarray]) -> list[Any]:
    """Rows of arrays, `micro_batch` at a time, on the mesh; the first ones again where the last batch lacks rows."""
    size, count = experiment.settings.micro_batch, len(next(iter(arrays.values())))
    rows = np.array(experiment.local_rows(size))
    return [
        sharding.global_batch(
            experiment.mesh, {name: array[(first + rows) % count] for name, array in arrays.items()}, size
        )
        for first in range(0, count, size)
    ]


def make_sampler(experiment: Experiment, stream: str, count: int) -> Any:
    """The jitted (params, frozen, batch[, index]) -> `count` samples a row, uint8 (B, count, [F,] H, W, 3), from noise of
    (seed, stream, index)."""
    settings, sampling, gather = experiment.settings, experiment.task.sampling, experiment.gather

    def generate(params, frozen, batch, index=None):
        keys = tuple(rngs.key(settings.train.seed, f"{stream}/{name}", index) for name in ("noise", "sampler"))
        return sampling.generate_batch(params, frozen, batch, keys, count, settings.eval, gather)

    return jax.jit(generate, out_shardings=sharding.replicated(experiment.mesh))


class DenoisingEvaluator:
    """The held-out denoising loss, scores of samples, and sheets of samples."""

    def __init__(self, experiment: Experiment, source: data.Source):
        self.experiment, settings = experiment, experiment.settings
        self.sampling = experiment.task.sampling
        ids = data.holdout_records(settings.data, source)
        self.batches = _read_batches(experiment, source, ids[: settings.eval.num_examples])
        replicated = sharding.replicated(experiment.mesh)
        streams = functools.partial(rngs.streams, settings.train.seed, "eval")
        self.loss_step = evaluation.make_held_out_step(experiment.task, streams, experiment.gather, replicated)
        self.host = data.read_batch(settings.data, source, ids[: settings.eval.sheet[0]], experiment.task.host)
        self.shown = sharding.device_arrays(self.host)
        source_images = jax.jit(self.sampling.source_images, out_shardings=replicated)
        self.sources = np.asarray(source_images(experiment.frozen, self.shown))
        self.generate = make_sampler(experiment, "sheet", settings.eval.sheet[1])
        self.scorer = Scorer(experiment, source) if settings.eval.num_scored else None

    def measure(self, state: TrainState) -> tuple[dict[str, float], str]:
        params = self.experiment.ema_weights(state)
        values = evaluation.held_out_loss(self.loss_step, params, self.experiment.frozen, self.batches)
        summary = f"held-out loss {values['held_out_loss']:.4f}"
        if "held_out_margin" in values:  # there is a condition
            summary += (
                f", with the null condition {values['held_out_null_loss']:.4f}, margin {values['held_out_margin']:+.4f}; with "
                f"another's condition {values['held_out_shuffled_loss']:.4f}, {values['held_out_shuffled_margin']:+.4f}"
            )
        if self.scorer is not None:
            scores = self.scorer(params)
            values |= scores
            named = ", ".join(f"{name.removeprefix('score_')} {value:.4g}" for name, value in scores.items())
            summary += f"; samples: {named or 'no ground truth to score them by'}"
        return values, summary

    def sheet(self, state: TrainState) -> np.ndarray:
        samples = self.generate(self.experiment.ema_weights(state), self.experiment.frozen, self.shown)
        return self.sampling.sheet(self.host, self.sources, np.asarray(samples))


class Scorer:
    """Scores samples of the first `eval.num_scored` held-out records by what is known to be true of them: `score_*`.

    One sample a record, from the same noise every time, so that the curve changes only because the network does. Images of
    features, novel views and clips are compared with the true ones (PSNR, SSIM, optical flow); images of captions of the
    embedded scenes are scored by the solids that are found in them.
    """

    def __init__(self, experiment: Experiment, source: data.Source):
        self.experiment, self.source, settings = experiment, source, experiment.settings
        self.sampling = experiment.task.sampling
        size = settings.micro_batch
        ids = data.holdout_records(settings.data, source)[: settings.eval.num_scored]
        # Every process reads all of them, to score the samples that all of them get.
        places = [range(first, first + size) for first in range(0, len(ids), size)]
        self.hosts = [_read(experiment, source, ids, batch) for batch in places]
        if not all(map(self._has_truth, self.hosts)):
            self.hosts = []
        self._generate = make_sampler(experiment, "scored", 1)

    def __call__(self, params: Any) -> dict[str, float]:
        """Mean scores of these weights, by name; empty if the truth is not known."""
        experiment, size = self.experiment, self.experiment.settings.micro_batch
        values: dict[str, list[float]] = {}
        for index, host in enumerate(self.hosts):
            batch = sharding.global_batch(experiment.mesh, sharding.device_arrays(host), size)
            samples = np.asarray(self._generate(params, experiment.frozen, batch, index))[:, 0]
            for name, scores in self._scores(host, samples).items():
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


class NeighborEvaluator:
    """The last `eval.num_examples` held-out records by the nearest of the others, in features of the trained network and of a
    random one.

    Its task has `features`(params, image uint8 (B, H, W, 3)) -> (B, D).
    """

    def __init__(self, experiment: Experiment, source: data.Source):
        self.experiment, settings = experiment, experiment.settings
        ids = data.holdout_records(settings.data, source)
        bank = len(ids) - settings.eval.num_examples
        if bank < 1:
            raise ValueError(
                f"config.data.holdout={settings.data.holdout} leaves no record beside config.eval.num_examples="
                f"{settings.eval.num_examples} to look for neighbors among: raise it"
            )
        host, decoded = _decoded(experiment, source, ids)
        self.bank = int((decoded < bank).sum())
        self.images = host["image"]  # every process has all of them, for the sheet
        self.labels = {name: labels[decoded] for name, labels in data.truth_of(source, ids).items()}
        self.batches = _repeated_batches(experiment, {"image": self.images})
        task = experiment.task
        self.features_of = jax.jit(task.features, out_shardings=sharding.replicated(experiment.mesh))
        untrained = jax.jit(task.network.init)(rngs.key(settings.train.seed, "init"))
        self.random_scores = self._scores(self._features(untrained))

    def _features(self, params: Any) -> np.ndarray:
        features = [np.asarray(self.features_of(params, batch["image"])) for batch in self.batches]
        return np.concatenate(features)[: len(self.images)]

    def _scores(self, features: np.ndarray) -> dict[str, float]:
        return evaluation.neighbor_accuracy(features[: self.bank], features[self.bank :], self.labels)

    def measure(self, state: TrainState) -> tuple[dict[str, float], str]:
        scores = self._scores(self._features(self.experiment.ema_weights(state)))
        values = {f"neighbour_{name}": score for name, score in scores.items()}
        values |= {f"random_neighbour_{name}": score for name, score in self.random_scores.items()}
        if not scores:
            return values, "this source has no ground truth: look at the sheet of nearest neighbors"
        summary = ", ".join(
            f"{name} {score:.1%} (random ViT {self.random_scores[name]:.1%})" for name, score in scores.items()
        )
        return values, f"nearest neighbors agree on {summary}"

    def sheet(self, state: TrainState) -> np.ndarray:
        """Rows of (held-out image | nearest in the bank | second ...)."""
        features, bank = self._features(self.experiment.ema_weights(state)), self.bank
        rows, columns = self.experiment.settings.eval.sheet
        indices = evaluation.nearest(features[:bank], features[bank : bank + rows], columns)
        shown = np.concatenate([self.images[bank : bank + rows, None], self.images[:bank][indices]], axis=1)
        return media.image_grid(shown)


class RetrievalEvaluator:
    """How often the nearest caption of a held-out image is its own, and the nearest image of a caption, among
    `eval.num_examples` of them.

    Its task has `embed`(params, batch) -> {"image", "text"} (B, P) of length 1.
    """

    def __init__(self, experiment: Experiment, source: data.Source):
        self.experiment, settings = experiment, experiment.settings
        ids = data.holdout_records(settings.data, source)[: settings.eval.num_examples]
        self.host, _ = _decoded(experiment, source, ids)
        self.batches = _repeated_batches(experiment, sharding.device_arrays(self.host))
        self.embed = jax.jit(experiment.task.embed, out_shardings=sharding.replicated(experiment.mesh))

    def _features(self, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        """(images, texts), (N, P) each."""
        params = self.experiment.ema_weights(state)
        found = [jax.tree.map(np.asarray, self.embed(params, batch)) for batch in self.batches]
        count = len(self.host["caption"])
        return tuple(np.concatenate([each[name] for each in found])[:count] for name in ("image", "text"))

    def measure(self, state: TrainState) -> tuple[dict[str, float], str]:
        images, texts = self._features(state)
        values = evaluation.retrieval_accuracy(images, texts, self.host["caption"])
        shares = f"{values['text_retrieval']:.1%} of images, {values['image_retrieval']:.1%} of captions"
        return values, f"the nearest of {len(images)} is the right one for {shares}"

    def sheet(self, state: TrainState) -> np.ndarray:
        """Rows of (held-out image | nearest to its caption | second ...), the caption above."""
        images, texts = self._features(state)
        rows, columns = self.experiment.settings.eval.sheet
        found = evaluation.nearest(images, texts[:rows], columns)
        shown = np.concatenate([self.host["image"][:rows, None], self.host["image"][found]], axis=1)
        return media.image_grid(shown, titles=list(self.host["caption"][:rows]))


Evaluator = DenoisingEvaluator | NeighborEvaluator | RetrievalEvaluator
EVALUATORS = {"denoising": DenoisingEvaluator, "neighbors": NeighborEvaluator, "retrieval": RetrievalEvaluator}
