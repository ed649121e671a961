"""What a run looks at as it trains, on the same held-out records every time: numbers, a sentence about them, and a sheet.

A diffusion task is judged by its held-out loss, with its condition and with the null condition, and by samples; a task that
learns features, by what the nearest neighbours of its features have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from lumos_jax import data, evaluation
from lumos_jax.tasks import pictures, sampling
from lumos_jax.train import rngs, sharding
from lumos_jax.train.scoring import Scorer
from lumos_jax.train.state import TrainState


class Evaluator(Protocol):
    def measure(self, state: TrainState) -> tuple[dict[str, float], str]:
        """Metrics of the EMA weights, and a sentence for people."""
        ...

    def sheet(self, state: TrainState) -> np.ndarray:
        """One picture (H, W, 3) uint8."""
        ...


def make_evaluator(run) -> Evaluator | None:
    """The evaluator that suits the run's task (a train.loop.Run); None if config.eval.every is 0."""
    if not run.settings.eval.every:
        return None
    return Denoised(run) if hasattr(run.task, "dit") else Neighbours(run)


def to_mesh(mesh, host: Mapping[str, np.ndarray], rows, size: int):
    """What the device needs of a host batch, on the device."""
    return sharding.global_batch(mesh, sharding.of_the_task(host) | {"weight": host["weight"]}, rows, size)


def _read_batches(run, ids: list[int]) -> list[Any]:
    """These records, eval.batch_size at a time, on the mesh."""
    size = run.settings.eval.batch_size
    rows = sharding.local_rows(run.mesh, size)
    batches = []
    for first in range(0, len(ids), size):
        local = data.read_batch(run.settings.data, run.source, [ids[first + row] for row in rows], run.task.host)
        batches.append(to_mesh(run.mesh, local, rows, size))
    return batches


class Denoised:
    """The held-out denoising loss and sheets of samples."""

    def __init__(self, run):
        self.run, settings = run, run.settings
        gather = sharding.make_gather(run.mesh, settings.model.dtype)
        ids = data.holdout_records(settings.data, run.source)
        self.batches = _read_batches(run, ids[: settings.eval.num_examples])
        everywhere = sharding.replicated(run.mesh)
        self.loss_step = evaluation.make_held_out_step(
            run.task, lambda index: rngs.streams(settings.train.seed, "eval", index), gather, everywhere
        )
        self.host = data.read_batch(settings.data, run.source, ids[: settings.eval.rows], run.task.host)
        self.shown = sharding.of_the_task(self.host)
        show = jax.jit(run.task.source_pictures, out_shardings=everywhere)
        self.sources = np.asarray(show(run.frozen, self.shown))
        keys = (rngs.key(settings.train.seed, "sheet/noise"), rngs.key(settings.train.seed, "sheet/sampler"))
        options = sampling.options_of(settings.eval)
        self.draw = jax.jit(
            lambda params, frozen, batch: sampling.draw_for_batch(
                run.task, params, frozen, batch, keys, settings.eval.samples, options, gather
            ),
            out_shardings=everywhere,
        )
        self.scorer = Scorer(run, gather) if settings.eval.num_scored else None

    def weights(self, state: TrainState) -> Any:
        """The network's EMA weights: frozen parameters as they are, adapters merged."""
        average = self.run.experiment.ema(state)
        return self.run.plan.averaged(state.params, average)

    def measure(self, state: TrainState) -> tuple[dict[str, float], str]:
        weights = self.weights(state)
        values = evaluation.held_out_loss(self.loss_step, weights, self.run.frozen, self.batches)
        told = f"held-out loss {values['held_out_loss']:.4f}"
        if "held_out_margin" in values:  # there is a condition
            told += (
                f", with the null condition {values['held_out_null_loss']:.4f}, margin {values['held_out_margin']:+.4f}; with "
                f"another's condition {values['held_out_shuffled_loss']:.4f}, {values['held_out_shuffled_margin']:+.4f}"
            )
        if self.scorer is not None:
            scores = self.scorer(weights)
            values |= scores
            named = ", ".join(f"{name.removeprefix('score_')} {value:.4g}" for name, value in scores.items())
            told += f"; samples: {named or 'nothing is known to score them by'}"
        return values, told

    def sheet(self, state: TrainState) -> np.ndarray:
        """Samples as the task shows them."""
        drawn = np.asarray(self.draw(self.weights(state), self.run.frozen, self.shown))
        return self.run.task.sheet(self.host, self.sources, drawn)


class Neighbours:
    """Held-out records by the nearest of `eval.knn_bank_size` others, in features of the trained and of a random network."""

    def __init__(self, run):
        self.run, settings = run, run.settings
        ids = data.holdout_records(settings.data, run.source)[
            : settings.eval.knn_bank_size + settings.eval.num_examples
        ]
        self.images = data.read_batch(settings.data, run.source, ids)["image"]
        self.batches = _read_batches(run, ids)
        self.truth = data.truth_of(settings.data, run.source, ids)
        self.features_of = jax.jit(run.task.features, out_shardings=sharding.replicated(run.mesh))
        start = jax.jit(run.task.network.init)(rngs.key(settings.train.seed, "init"))
        self.of_chance = self._scores(self._features(start))

    def _features(self, params: Any) -> np.ndarray:
        return np.concatenate([np.asarray(self.features_of(params, batch["image"])) for batch in self.batches])

    def _scores(self, features: np.ndarray) -> dict[str, float]:
        bank = self.run.settings.eval.knn_bank_size
        return evaluation.neighbour_accuracy(features[:bank], features[bank:], self.truth, bank)

    def measure(self, state: TrainState) -> tuple[dict[str, float], str]:
        scores = self._scores(self._features(self.run.experiment.ema(state)))
        values = {f"neighbour_{name}": score for name, score in scores.items()}
        values |= {f"random_neighbour_{name}": score for name, score in self.of_chance.items()}
        if not scores:
            return values, "this source does not know its ground truth: judge by the sheet of nearest neighbours"
        told = ", ".join(
            f"{name} {score:.1%} (random ViT {self.of_chance[name]:.1%})" for name, score in scores.items()
        )
        return values, f"nearest neighbours agree on {told}"

    def sheet(self, state: TrainState) -> np.ndarray:
        """Rows of (held-out picture | nearest in the bank | second ...)."""
        average, bank = self.run.experiment.ema(state), self.run.settings.eval.knn_bank_size
        features = self._features(average)
        rows, columns = self.run.settings.eval.rows, self.run.settings.eval.samples
        nearest = evaluation.nearest(features[:bank], features[bank : bank + rows], columns)
        shown = np.concatenate([self.images[bank : bank + rows, None], self.images[:bank][nearest]], axis=1)
        return pictures.sheet(shown)
