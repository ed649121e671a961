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
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lumos_jax import config
from lumos_jax.checkpoints import CheckpointError, Checkpoints, transfer
from lumos_jax.checkpoints.manager import DIRECTORY
from lumos_jax.config import io as config_io
from lumos_jax.encoders import same_content
from lumos_jax.tasks import denoising, releases
from lumos_jax.train import finetune, rngs, sharding
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.state import TrainState
from lumos_jax.weights.rules import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Start:
    """A run's first state.

    Attributes:
      state, step: on the mesh, and how many steps it has taken.
      memory: of the loop, from the checkpoint.
      origin: a sentence about where the state is from.
    """

    state: TrainState
    step: int
    memory: dict[str, Any]
    origin: str


def start(
    experiment: Experiment, workdir: pathlib.Path, checkpoints: Checkpoints, fingerprints: Mapping[str, str]
) -> Start:
    """Takes the first of the list in the module's docstring that exists.

    Args:
      experiment: of the run.
      workdir: where the account of a hand-off is saved.
      checkpoints: the run's own.
      fingerprints: of the data and the frozen networks.

    Raises:
      ValueError: a setting or a fingerprint differs from the checkpoint's, so that resuming would not be exact; or the
        hand-off does not fit.
      CheckpointError: there are checkpoints, and none of them can be restored.
    """
    if checkpoints.steps():
        return _restore_newest(experiment, checkpoints, fingerprints)
    if experiment.settings.init_from:
        return _hand_off(experiment, workdir, fingerprints)
    return Start(experiment.init_state(), 0, {}, f"from scratch, seed {experiment.settings.train.seed}")


# Resume.


def _restore_newest(experiment: Experiment, checkpoints: Checkpoints, fingerprints: Mapping[str, str]) -> Start:
    """Restores the newest checkpoint that is whole, the same in all processes; moves damaged ones aside, with a warning.

    Raises:
      CheckpointError: none can be restored. Nothing is moved then, and nothing starts from scratch.
    """
    damaged: list[int] = []
    for step in checkpoints.steps():
        restored, problem = _try_to_restore(experiment, checkpoints, step, fingerprints)
        if problem is not None:
            print(f"warning: {problem}", file=sys.stderr, flush=True)
        if restored is None:
            damaged.append(step)
            continue
        if damaged:
            aside = checkpoints.set_aside(damaged)
            origin = f"{restored.origin}, as {', '.join(map(str, damaged))} cannot be restored (moved to {aside})"
            restored = dataclasses.replace(restored, origin=origin)
            if jax.process_index() == 0:
                print(f"warning: {origin}", file=sys.stderr, flush=True)
        return restored
    raise CheckpointError(
        f"none of the {len(damaged)} checkpoint(s) in {checkpoints.directory} can be restored. To start from scratch all "
        "the same, move that directory away or use another --workdir"
    )


def _try_to_restore(
    experiment: Experiment, checkpoints: Checkpoints, step: int, fingerprints: Mapping[str, str]
) -> tuple[Start | None, CheckpointError | None]:
    """Restores and verifies a checkpoint, in a second try after a second if need be. (None, why) if it is damaged in any
    process."""
    for delay in (1.0, None):  # storage may fail for a moment
        restored, problem = None, None
        try:
            restored, meta = _restore(experiment, checkpoints, step, fingerprints)
        except CheckpointError as error:
            problem = error
        if sharding.all_agree(problem is None):
            try:
                checkpoints.verify(step, vars(restored.state), meta)
                return restored, None
            except CheckpointError as error:  # about the content, so in all processes
                problem = error
        if delay:
            time.sleep(delay)
    return None, problem


def _restore(
    experiment: Experiment, checkpoints: Checkpoints, step: int, fingerprints: Mapping[str, str]
) -> tuple[Start, dict[str, Any]]:
    """Returns the checkpoint's meta too. Raises ValueError if continuing it would not be exact."""
    settings, meta = experiment.settings, checkpoints.meta(step)
    if meta.get("imported"):
        raise ValueError(
            f"{checkpoints.directory.parent} holds weights imported from {meta['imported']}, not a run: train from them with "
            f"--config.init_from={checkpoints.directory.parent} and another --workdir"
        )
    changed = config_io.frozen_differences(config_io.from_saved(meta["settings"]), settings)
    for name, now in fingerprints.items():
        before, field = meta["fingerprints"].get(name), f"{name}.fingerprint"
        same = before is not None and same_content(before, now)  # a file may have another name
        if not same and field not in settings.checkpoint.allow_change:
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


# Hand-off.


@dataclasses.dataclass(frozen=True)
class _Prior:
    """What config.init_from names: weights, or their shapes and a function that reads them, and what they were trained with.

    encoder: identity of the encoder of their condition; None if not known.
    """

    params: Any
    read: Callable[[], Any]
    settings: config.Settings
    encoder: str | None


def _hand_off(experiment: Experiment, workdir: pathlib.Path, fingerprints: Mapping[str, str]) -> Start:
    """The first state from the weights of another run or a release, with an account of every parameter."""
    settings, task, ours = experiment.settings, experiment.task, experiment.abstract_state.params
    prior = _open_prior(experiment)
    shapes = _shapes(prior.params)
    task.check_prior(settings.model, prior.settings.model, shapes)
    same = _same_condition(settings, prior.settings, fingerprints.get("encoder"), prior.encoder)
    named = task.handoff().rules(_shapes(ours), shapes, same)
    rules = {
        "origin": settings.init_from,
        "reinitialise": (f"{finetune.LORA}/*", *named["reinitialise"]),
        "drop": named["drop"],
        "adapt": {path: functools.partial(task.network.widen_input, path) for path in named["widen"]},
    }
    transfer(prior.params, ours, **rules)  # by shapes: what does not fit is refused before gigabytes are read
    theirs = prior.read()
    null = denoising.null_embedding(theirs, named["drop"])
    if null is not None:
        rules["adapt"]["time/fc2/bias"] = lambda bias: bias + null
    params, account = transfer(theirs, ours, **rules)
    params = {name: part for name, part in params.items() if name != finetune.LORA}
    params = _init_missing(task.network, settings.train.seed, params)
    if jax.process_index() == 0:
        account.save(workdir / "handoff.json")
    return Start(experiment.init_state(params), 0, {}, account.table())


def _open_prior(experiment: Experiment) -> _Prior:
    """Raises ValueError if config.init_from is neither a run with a checkpoint nor a release."""
    origin = experiment.settings.init_from
    directory = pathlib.Path(origin).expanduser()
    if not (directory / DIRECTORY).is_dir():
        try:
            prior = releases.load(origin, "config.init_from", heads=getattr(experiment.task.network, "heads", 0))
        except ValueError as error:
            raise ValueError(
                f"config.init_from={origin} is neither a run (there is no checkpoint in it) nor a released prior: {error}"
            ) from error
        return _Prior(prior.params, lambda: prior.params, prior.settings, None)
    checkpoints = Checkpoints(directory)
    step = checkpoints.latest()
    if step is None:
        raise ValueError(f"config.init_from={origin}: there is no checkpoint in {checkpoints.directory}")
    meta = checkpoints.meta(step)

    def read():
        weights = finetune.read_weights(checkpoints, step, "ema", sharding.replicated(experiment.mesh))
        checkpoints.close()
        return weights

    shapes = finetune.weight_shapes(checkpoints, step)
    return _Prior(shapes, read, config_io.from_saved(meta["settings"]), meta["fingerprints"].get("encoder"))


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def _same_condition(ours: config.Settings, theirs: config.Settings, identity: str | None, other: str | None) -> bool:
    """Whether two runs condition on the same features, as far as is known: imported weights do not name their encoder."""
    alike = (ours.encoder.kind, ours.encoder.output) == (theirs.encoder.kind, theirs.encoder.output)
    return alike and (identity is None or other is None or same_content(identity, other))


def _init_missing(dit, seed: int, params: Any) -> Any:
    """Initializes the parameters that `transfer` left as shapes."""
    flat = flatten(params)
    anew = [path for path, leaf in flat.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if anew:
        init = jax.jit(lambda: {path: flatten(dit.init(rngs.key(seed, "init")))[path] for path in anew})
        flat |= init()
    return unflatten(flat)
