"""What a declaration of the study is made of: runs, how they are scored, and what a figure compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, for every seed. Equal runs of two figures are one run.

    Attributes:
      title: what it is; `name` adds what else tells runs apart.
      task: how its samples are scored, a key of Scale.evaluations; empty: not at all.
      config: the file, to which Scale.size is added; `variant`: of configs/ablations.
      steps: of training.
      prior: whose weights it starts from, of the same seed; None: from scratch.
      changes: (field, value) pairs of config.
      rate_of: the run whose trials choose its learning rate; None: its own.
      rate: its learning rate, of a trial; None: chosen by trials.
    """

    title: str
    task: str
    config: str
    steps: int
    variant: str = ""
    prior: Run | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    rate_of: Run | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        words = [*self.title.lower().split(), self.steps, *(["rate", f"{self.rate:g}"] if self.rate else [])]
        return "-".join(map(str, words))

    @property
    def tuned(self) -> Run:
        """The run whose trials choose the learning rate."""
        return self if self.rate_of is None else self.rate_of.tuned


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Samples of a finished run and their scores, by `lumos_jax.evaluate`.

    Attributes:
      items: of lumos_jax.evaluation.lists.SETS; of `scenes-geneval` one sample a prompt, every `stride`-th prompt.
      num: how many; 0 with a stride.
      metrics: of lumos_jax.evaluation.metrics.METRICS.
      frames: of clips; 0: images.
      stride: between frames of a clip, or between prompts.
      guidance: scale; None: that of the run.
    """

    items: str
    num: int
    metrics: tuple[str, ...]
    frames: int = 0
    stride: int = 1
    guidance: float | None = None


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    Attributes:
      size: of the configs, behind the colon.
      steps: of the runs, by task; `prior_steps` those of all priors.
      rates: learning rates that are tried for each start, over `trial_steps`.
      points: evaluations on the way, besides those at step 0.
      examples, scored: held-out records of these whose loss is measured, and that are sampled and scored.
      sampling_steps: of the sampler.
      evaluations: of finished runs, by task; `sweeps`: the same where guidance is varied.
      references: network -> images or clips of its reference statistics.
      noises, dropouts, guidances: what figures 2a, 12 and 12 vary.
      shares: of figure 2b, scenes -> variant of configs/ablations/data_scale.py.
    """

    size: str
    prior_steps: int
    steps: Mapping[str, int]
    rates: tuple[float, ...]
    trial_steps: int
    points: int
    examples: int
    scored: int
    sampling_steps: int
    evaluations: Mapping[str, tuple[Evaluation, ...]]
    sweeps: Mapping[str, tuple[Evaluation, ...]]
    references: Mapping[str, int]
    noises: tuple[float, ...]
    dropouts: tuple[float, ...]
    guidances: tuple[float, ...]
    shares: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of a panel's table: a run, or one of its points on an axis.

    Attributes:
      line: what is compared.
      x: place on the panel's axis; None where there is none.
      guidance: of its samples; None: that of the run.
    """

    line: str
    run: Run
    x: float | None = None
    guidance: float | None = None

    @property
    def label(self) -> str:
        return self.line if self.x is None else f"{self.line}, {self.x:,}"


@dataclasses.dataclass(frozen=True)
class Claim:
    """That samples of one cell, (line, x), have better `scores` than those of another."""

    text: str
    better: tuple[str, float | None]
    than: tuple[str, float | None]
    scores: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One table and one row of plots.

    Attributes:
      scores: of samples of the finished runs, the columns.
      curve: names of `metrics.jsonl`, shown over training steps.
      base: the line that others are compared with, at equal x.
      axis: what x is; empty where cells have none. log: whether its scale is logarithmic.
    """

    title: str
    cells: tuple[Cell, ...]
    scores: tuple[str, ...]
    base: str
    curve: tuple[str, ...] = ()
    axis: str = ""
    log: bool = False
    claims: tuple[Claim, ...] = ()

    def cell(self, place: tuple[str, float | None]) -> Cell:
        """The one at (line, x)."""
        return next(cell for cell in self.cells if (cell.line, cell.x) == place)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the paper."""

    key: str
    title: str
    panels: tuple[Panel, ...]

    def cells(self) -> Iterator[Cell]:
        for panel in self.panels:
            yield from panel.cells
