"""Where a run's first state comes from, in this order (invariant 6):

1. the run's own newest checkpoint, or the one before where that is damaged;
2. `config.init_from`, another run's EMA weights, its adapters merged, or released ones; our own adapters start fresh;
3. scratch, from `config.train.seed`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from lumos_jax import config
from lumos_jax.checkpoints import CheckpointError, Checkpoints, transfer
from lumos_jax.checkpoints.manager import DIRECTORY
from lumos_jax.config import io as config_io
from lumos_jax.tasks import handoffs, releases
from lumos_jax.train import finetune, rngs, sharding
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.state import TrainState
from lumos_jax.weights.rules import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Start:
    """The first state, the step it stands at, what the loop remembered, and a sentence about where it is from."""

    state: TrainState
    step: int
    memory: dict[str, Any]
    origin: str


def start(
    experiment: Experiment, workdir: pathlib.Path, checkpoints: Checkpoints, fingerprints: Mapping[str, str]
) -> Start:
    """Goes down the list in the module's docstring and takes the first that is there.

    Raises:
      ValueError: a setting or a fingerprint differs from the checkpoint's in a way that would break an exact resume; or
        the hand-off does not fit.
      CheckpointError: there are checkpoints, and none of them can be restored.
    """
    if checkpoints.steps():
        return _newest_good(experiment, checkpoints, fingerprints)
    if experiment.settings.init_from:
        return _hand_off(experiment, workdir, fingerprints)
    return Start(experiment.init_state(), 0, {}, f"from scratch, seed {experiment.settings.train.seed}")


def _newest_good(experiment: Experiment, checkpoints: Checkpoints, fingerprints) -> Start:
    """The newest checkpoint that can be restored; those after it are set aside, with a warning. All processes take the same.

    Raises:
      CheckpointError: there are checkpoints and none can be restored. Nothing is moved then, and nothing starts from scratch.
    """
    damaged: list[int] = []
    for step in checkpoints.steps():
        for wait in (1.0, None):  # storage may have failed for a moment
            begin, problem = None, None
            try:
                begin, meta = _resume(experiment, checkpoints, step, fingerprints)
            except CheckpointError as error:
                problem = error
            if sharding.all_agree(problem is None):
                try:
                    checkpoints.verify(step, vars(begin.state), meta)
                    break
                except CheckpointError as error:  # of what was read, so in all processes
                    problem = error
            begin = None
            if wait:
                time.sleep(wait)
        if problem is not None:
            print(f"warning: {problem}", file=sys.stderr, flush=True)
        if begin is not None:
            if damaged:
                aside = checkpoints.set_aside(damaged)
                origin = f"{begin.origin}, as {', '.join(map(str, damaged))} cannot be restored (moved to {aside})"
                begin = dataclasses.replace(begin, origin=origin)
                if jax.process_index() == 0:
                    print(f"warning: {origin}", file=sys.stderr, flush=True)
            return begin
        damaged.append(step)
    raise CheckpointError(
        f"none of the {len(damaged)} checkpoint(s) in {checkpoints.directory} can be restored. To start from scratch all "
        "the same, move that directory away or use another --workdir"
    )


def _resume(experiment: Experiment, checkpoints: Checkpoints, step: int, fingerprints):
    """(Start, the checkpoint's meta)."""
    settings = experiment.settings
    meta = checkpoints.meta(step)
    if meta.get("imported"):
        raise ValueError(
            f"{checkpoints.directory.parent} holds weights imported from {meta['imported']}, not a run: train from them with "
            f"--config.init_from={checkpoints.directory.parent} and another --workdir"
        )
    changed = config_io.frozen_differences(config_io.from_saved(meta["settings"]), settings)
    for name, now in fingerprints.items():
        before, field = meta["fingerprints"].get(name), f"{name}.fingerprint"
        if before != now and field not in settings.checkpoint.allow_change:
            changed[field] = (before, now)
    if changed:
        lines = "\n".join(f"  {name}: {old!r} then, {new!r} now" for name, (old, new) in changed.items())
        names = ",".join(repr(name) for name in changed)
        accept = f'accept the difference with --config.checkpoint.allow_change="({names},)"'
        if any(name.startswith("finetune.") for name in changed):
            accept = f"start another run with --config.init_from={checkpoints.directory.parent}"
        raise ValueError(
            f"checkpoint {step} of this run was made with other settings, so continuing it would not be exact:\n{lines}\n"
            f"Set them back, use another --workdir, or {accept}"
        )
    state = checkpoints.restore(step, vars(experiment.abstract_state))
    return Start(TrainState(**state), step, meta["memory"], f"continues at step {step}"), meta


def _hand_off(experiment: Experiment, workdir: pathlib.Path, fingerprints) -> Start:
    settings, task, ours = experiment.settings, experiment.task, experiment.abstract_state
    dit, origin = task.network, settings.init_from
    given = pathlib.Path(origin).expanduser()
    if given.is_dir() and (given / DIRECTORY).is_dir():
        source = Checkpoints(given)
        step = source.latest()
        if step is None:
            raise ValueError(f"config.init_from={origin}: there is no checkpoint in {source.directory}")
        meta = source.meta(step)
        theirs = finetune.weight_shapes(source, step)
        from_ = config_io.from_saved(meta["settings"])
        identity = meta["fingerprints"].get("encoder")
    else:
        source, identity = None, None
        try:
            prior = releases.load(origin, "config.init_from", heads=getattr(dit, "heads", 0))
        except ValueError as error:
            raise ValueError(
                f"config.init_from={origin} is neither a run (there is no checkpoint in it) nor a released prior: {error}"
            ) from error
        theirs, from_ = prior.params, prior.settings
    same = _same_condition(settings, from_, fingerprints.get("encoder"), identity)
    given_shapes = _shapes(theirs)
    task.check_prior(settings.model, from_.model, given_shapes)
    named = handoffs.rules(task.handoff(), _shapes(ours.params), given_shapes, same)
    rules = {
        "origin": origin,
        "reinitialise": (f"{finetune.LORA}/*", *named["reinitialise"]),
        "drop": named["drop"],
        "adapt": {path: functools.partial(dit.widen_input, path) for path in named["widen"]},
    }
    if source is not None:
        # Judged by shapes first, so that weights that do not fit are refused before gigabytes are read.
        transfer(theirs, ours.params, **rules)
        theirs = finetune.read_weights(source, step, "ema", sharding.replicated(experiment.mesh))
        source.close()
    null = handoffs.null_embedding(theirs, named["drop"])
    if null is not None:
        rules["adapt"]["time/fc2/bias"] = lambda bias: bias + null
    params, account = transfer(theirs, ours.params, **rules)
    params = {name: part for name, part in params.items() if name != finetune.LORA}
    params = _with_fresh(dit, settings.train.seed, params)
    if jax.process_index() == 0:
        account.save(workdir / "handoff.json")
    return Start(experiment.init_state(params), 0, {}, account.table())


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def _same_condition(ours: config.Settings, theirs: config.Settings, identity: str | None, other: str | None) -> bool:
    """Whether two runs condition on the same features, as far as is known: imported weights do not say whose they took."""
    alike = (ours.encoder.kind, ours.encoder.output) == (theirs.encoder.kind, theirs.encoder.output)
    return alike and (identity == other or identity is None or other is None)


def _with_fresh(dit, seed: int, params: Any) -> Any:
    """The tree with what `transfer` took from the abstract state, the parameters that start anew, as arrays."""
    flat = flatten(params)
    anew = [path for path, leaf in flat.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if anew:
        init = jax.jit(lambda: {path: flatten(dit.init(rngs.key(seed, "init")))[path] for path in anew})
        flat |= init()
    return unflatten(flat)
