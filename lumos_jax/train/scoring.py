"""Samples of held-out records against what is known to be true of them: `score_*` in the metrics of a run.

One sample a record, from the same noise every time, so that the curve moves for one reason only: what the network has learned.
Novel views and clips are compared with the true ones (PSNR, SSIM, optical flow); pictures of captions on the embedded scenes
are read back and compared with what the caption says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lumos_jax import data, evaluation
from lumos_jax.tasks import sampling
from lumos_jax.train import rngs, sharding

EQUAL_PSNR = 100.0  # decibels, where it would be infinite and spoil the mean


class Scorer:
    """Draws and scores the first `eval.num_scored` held-out records of a run (a train.loop.Run)."""

    def __init__(self, run, source, gather):
        self.run, self.source, settings = run, source, run.settings
        size = settings.eval.batch_size
        ids = data.holdout_records(settings.data, source)[: settings.eval.num_scored]
        # Every process reads all of them, to score the samples that all of them get.
        self.hosts = [
            data.read_batch(settings.data, source, ids[first : first + size], run.task.host)
            for first in range(0, len(ids), size)
        ]
        if not all(map(self._known, self.hosts)):
            self.hosts = []
        options = sampling.options_of(settings.eval)

        def draw(params, frozen, batch, index):
            keys = tuple(rngs.key(settings.train.seed, f"scored/{name}", index) for name in ("noise", "sampler"))
            return sampling.draw_for_batch(run.task, params, frozen, batch, keys, 1, options, gather)[:, 0]

        self._draw = jax.jit(draw, out_shardings=sharding.replicated(run.mesh))

    def __call__(self, params: Any) -> dict[str, float]:
        """The scores of these weights, by name; empty where nothing is known to be true of the source's records."""
        size = self.run.settings.eval.batch_size
        rows = sharding.local_rows(self.run.mesh, size)
        drawn = []
        for index, host in enumerate(self.hosts):
            local = {name: array[rows] for name, array in sharding.device_arrays(host).items()}
            batch = sharding.global_batch(self.run.mesh, local, rows, size)
            drawn.append(np.asarray(self._draw(params, self.run.frozen, batch, index)))
        sums: dict[str, list[float]] = {}
        for host, pictures in zip(self.hosts, drawn, strict=True):
            whole = host["weight"] > 0
            for name, values in self._scores(host, pictures).items():
                sums.setdefault(name, []).extend(values[whole])
        return {f"score_{name}": float(np.mean(values)) for name, values in sums.items()}

    def _known(self, host: Mapping[str, np.ndarray]) -> bool:
        told = "caption" in host and self.run.settings.data.source == "scenes"
        return told or self.run.task.truth(host) is not None

    def _scores(self, host: Mapping[str, np.ndarray], drawn: np.ndarray) -> dict[str, np.ndarray]:
        """A value a row."""
        truth = self.run.task.truth(host)
        if truth is not None:
            return likeness(drawn, truth)
        return evaluation.caption_agreement(drawn, data.scenes_of(self.source, host["record"]))


def likeness(drawn: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures uint8 (R, H, W, 3) or clips (R, F, H, W, 3) against the true ones, a value a row: `psnr` in decibels (100 where
    they are equal), `ssim` of pictures of 11 pixels a side or more; of clips, averaged over frames, and `flow_error`, how many
    pixels the ends of the optical flows of both are apart.
    """
    rows, flat = len(drawn), (-1, *drawn.shape[-3:])

    def by_row(measure):
        return measure(drawn.reshape(flat), truth.reshape(flat)).reshape(rows, -1)

    scores = {"psnr": np.minimum(by_row(evaluation.psnr), EQUAL_PSNR).mean(axis=1)}
    if min(drawn.shape[-3:-1]) >= evaluation.SSIM_WINDOW:
        scores["ssim"] = by_row(evaluation.ssim).mean(axis=1)
    if drawn.ndim == 5 and evaluation.has_optical_flow():
        pairs = zip(drawn, truth, strict=True)
        flows = [(evaluation.optical_flow(clip), evaluation.optical_flow(true)) for clip, true in pairs]
        scores["flow_error"] = np.array([evaluation.end_point_error(*pair) for pair in flows])
    return scores
