"""From declarations to commands: settings of each run, a digest of those that matter, directories, and what is done."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
import sys
from typing import Any

from benchmarks.study.results import Result, Results
from benchmarks.study.spec import Evaluation, Run, Scale
from lumos_jax import config
from lumos_jax.config import flatten_settings
from lumos_jax.config import io as config_io
from lumos_jax.encoders import frozen
from lumos_jax.evaluation import lists
from lumos_jax.scenes.scene import VERSION

ROOT = pathlib.Path(__file__).parents[2]
_WARMUP, _EMA_SHARE = 0.1, 0.08  # of a run's steps: the longest warm-up, and the horizon of the EMA
# Settings that change no number of a result.
_INERT = (
    "mesh.",
    "checkpoint.",
    "log.",
    "init_from",
    "data.workers",
    "train.profile_at",
    "optimizer.ema_memory",
    "eval.sheet",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Where runs and results are, and at which scale. Nothing here trains.

    Attributes:
      workdir: of runs, samples, references and logs.
    """

    scale: Scale
    workdir: pathlib.Path
    results: Results

    # Settings.

    def variant(self, run: Run) -> str:
        """What --config has behind the colon."""
        return ",".join(filter(None, (self.scale.size, run.variant)))

    @functools.cache  # noqa: B019 (one study a process)
    def _recipe(self, run: Run, changes: tuple[tuple[str, Any], ...] = ()) -> dict[str, Any]:
        """The settings of the config file, changed, by field."""
        module = importlib.import_module(run.config.removesuffix(".py").replace("/", "."))
        made = module.get_config(self.variant(run))
        made.update_from_flattened_dict(dict(changes))
        return _flat(config_io.resolve(made))

    def fields(self, run: Run, seed: int, rate: float) -> dict[str, Any]:
        """What differs from the config file, by field, without the prior's path."""
        scale, recipe = self.scale, self._recipe(run)
        made = {
            "train.steps": run.steps,
            "train.seed": seed,
            "data.seed": seed,
            "optimizer.learning_rate": rate,
            # Runs are short: the recipe's own values, where these are not too long for it.
            "optimizer.warmup_steps": min(recipe["optimizer.warmup_steps"], max(1, int(_WARMUP * run.steps))),
            "optimizer.ema_decay": min(recipe["optimizer.ema_decay"], round(1 - 1 / max(2, _EMA_SHARE * run.steps), 5)),
            "eval.every": run.steps if run.rate else max(1, run.steps // scale.points),
            "eval.num_examples": scale.examples,
            "eval.num_scored": 0 if run.rate else scale.scored,
            "eval.steps": scale.sampling_steps,
            "eval.sheet": (4, 1),
            "checkpoint.every": max(1, run.steps // 4),
            "checkpoint.keep": 1,
            "log.every": max(1, run.steps // 20),
        }
        return made | dict(run.changes)

    @functools.cache  # noqa: B019
    def _settings(self, run: Run, rate: float) -> dict[str, Any]:
        """Those of seed 0 that matter and are not the defaults, by field."""
        made = self._recipe(run, tuple(self.fields(run, 0, rate).items()))
        default = _flat(config_io.from_dict(config_io.default_config(made["task.name"]).to_dict()))
        return {
            name: value for name, value in made.items() if default.get(name) != value and not name.startswith(_INERT)
        }

    def identity(self, run: Run, seed: int) -> dict[str, Any] | None:
        """`digest`, and the `settings` that it is of; None while the learning rate, or that of a prior, is not chosen."""
        rate = self.rate(run)
        prior = None if run.prior is None else self.identity(run.prior, seed)
        if rate is None or (run.prior is not None and prior is None):
            return None
        settings = self._settings(run, rate) | {"train.seed": seed, "data.seed": seed, "scenes": VERSION}
        weights = settings.get("encoder.weights", "")
        if weights.partition("-")[0] == "scenes":
            settings["encoder"] = _content(settings.get("encoder.kind", "vit"), weights)
        text = json.dumps({"settings": settings, "prior": prior and prior["digest"]}, sort_keys=True)
        return json.loads(text) | {"digest": hashlib.sha256(text.encode()).hexdigest()[:16], "rate": rate}

    # Learning rates.

    def trials(self, run: Run) -> list[Run]:
        """Short runs, one for each learning rate that is tried."""
        steps = min(self.scale.trial_steps, run.steps)
        return [dataclasses.replace(run.tuned, steps=steps, rate=rate, rate_of=None) for rate in self.scale.rates]

    def tried(self, run: Run) -> dict[float, float]:
        """Learning rate -> held-out loss after the trial, of those that are done."""
        done = {trial.rate: self.result(trial, 0) for trial in self.trials(run)}
        return {rate: last_point(result)["held_out_loss"] for rate, result in done.items() if result is not None}

    def rate(self, run: Run) -> float | None:
        """The learning rate; None while trials are missing."""
        if run.rate is not None:
            return run.rate
        tried = self.tried(run)
        return min(tried, key=tried.get) if len(tried) == len(self.scale.rates) else None

    # What is there.

    def result(self, run: Run, seed: int) -> Result | None:
        """Of today's settings."""
        identity = self.identity(run, seed)
        return None if identity is None else self.results.get(run.name, seed, identity)

    def directory(self, run: Run, seed: int) -> pathlib.Path:
        """Of the run, of these settings and no others."""
        return self.workdir / f"{run.name}-seed{seed}-{self.identity(run, seed)['digest'][:8]}"

    def trained(self, run: Run, seed: int) -> bool:
        """Whether its last checkpoint is there."""
        return (self.directory(run, seed) / "checkpoints" / str(run.steps)).is_dir()

    # Evaluations.

    def evaluations(self, run: Run, guidance: float | None) -> tuple[Evaluation, ...]:
        """Those of a finished run, with its own guidance or another."""
        if guidance is None:
            return self.scale.evaluations.get(run.task, ())
        return tuple(dataclasses.replace(one, guidance=guidance) for one in self.scale.sweeps[run.task])

    def protocol(self, evaluation: Evaluation) -> dict[str, Any]:
        """What its scores depend on, besides the run: plain values, as JSON gives them back."""
        networks = {network: num for network, num in self.scale.references.items() if uses(evaluation, network)}
        return json.loads(json.dumps(dataclasses.asdict(evaluation) | {"references": networks}))

    def scored(self, result: Result | None, evaluation: Evaluation) -> dict[str, Any] | None:
        """The entry of a result's `evaluations`; None if it is not there, or of another protocol."""
        entry = None if result is None else result["evaluations"].get(key_of(evaluation))
        return entry if entry is not None and entry["protocol"] == self.protocol(evaluation) else None

    # Commands.

    def training(self, run: Run, seed: int) -> list[str]:
        """The command that trains a run, or continues it."""
        fields = self.fields(run, seed, self.rate(run))
        fields["init_from"] = "" if run.prior is None else self.directory(run.prior, seed)
        changes = [f"--config.{name}={value}" for name, value in fields.items()]
        files = [f"--config={ROOT / run.config}:{self.variant(run)}", f"--workdir={self.directory(run, seed)}"]
        return [sys.executable, "-m", "lumos_jax.main", *files, *changes]

    def prompts(self, evaluation: Evaluation) -> pathlib.Path:
        """The list of a subset of prompts, written if it is not there."""
        path = self.workdir / "lists" / f"{evaluation.items}-{evaluation.stride}.jsonl"
        if not path.exists():
            chosen = lists.make_list(evaluation.items).items[:: lists.PER_PROMPT * evaluation.stride]
            lists.ItemList(path.stem, chosen).save(path)
        return path


def uses(evaluation: Evaluation, network: str) -> bool:
    """Whether it needs reference statistics of a network."""
    return ("fvd" if network == "i3d" else f"fd_{network}") in evaluation.metrics


def key_of(evaluation: Evaluation) -> str:
    """Its name in a result."""
    return evaluation.items if evaluation.guidance is None else f"{evaluation.items}, guidance {evaluation.guidance:g}"


def last_point(result: Result) -> dict[str, float]:
    """Held-out measurements at the last step."""
    return result["curve"][max(result["curve"], key=int)]


def _flat(settings: config.Settings) -> dict[str, Any]:
    return flatten_settings(config_io.to_dict(settings))


@functools.cache
def _content(kind: str, weights: str) -> str:
    """A hash of an encoder that comes with the package, which may be trained anew."""
    return frozen.load(frozen.KIND_OF[kind], weights).identity.rpartition("@")[2]
