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

from lumos_jax import config, data
from lumos_jax.checkpoints import CheckpointError, Checkpoints, transfer
from lumos_jax.checkpoints.manager import DIRECTORY
from lumos_jax.config import io as config_io
from lumos_jax.encoders import same_content
from lumos_jax.tasks import denoising, releases
from lumos_jax.train import finetune, sharding
from lumos_jax.train.experiment import Experiment
from lumos_jax.train.state import TrainState
from lumos_jax.weights.rules import flatten, shapes_of, unflatten


@dataclasses.dataclass(frozen=True)
class Start:
    """A run's first state."""

    state: TrainState  # on the mesh
    step: int  # how many steps it has taken
    memory: dict[str, Any]  # of the loop, from the checkpoint
    origin: str  # a sentence about where the state is from


def start(
    experiment: Experiment, workdir: pathlib.Path, checkpoints: Checkpoints, fingerprints: Mapping[str, str]
) -> Start:
    """Takes the first of the list in the module's docstring that exists. The account of a hand-off is saved in `workdir`.

    fingerprints: of the data and the frozen networks.

    Raises:
      ValueError: a setting or a fingerprint differs from the checkpoint's, or the hand-off does not fit.
      CheckpointError: there are checkpoints, and none of them can be restored.
    """
    if checkpoints.steps():
        return _restore_newest(experiment, checkpoints, fingerprints)
    if experiment.settings.init_from:
        return _hand_off(experiment, workdir, fingerprints.get("encoder"))
    return Start(experiment.init_state(), 0, {}, f"from scratch, seed {experiment.settings.train.seed}")


# Resume.


def _restore_newest(experiment: Experiment, checkpoints: Checkpoints, fingerprints: Mapping[str, str]) -> Start:
    """Restores the newest checkpoint that is whole, the same in all processes; moves damaged ones aside, with a warning.

    Raises CheckpointError if none can be restored. Nothing is moved then, and nothing starts from scratch.
    """
    damaged: list[int] = []
    for step in checkpoints.steps():
        try:
            state, memory = _restore(experiment, checkpoints, step, fingerprints)
        except CheckpointError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            damaged.append(step)
            continue
        origin = f"continues at step {step}"
        if damaged:
            aside = checkpoints.set_aside(damaged)
            origin += f", as {', '.join(map(str, damaged))} cannot be restored (moved to {aside})"
            if jax.process_index() == 0:
                print(f"warning: {origin}", file=sys.stderr, flush=True)
        return Start(state, step, memory, origin)
    raise CheckpointError(
        f"none of the {len(damaged)} checkpoint(s) in {checkpoints.directory} can be restored. To start from scratch all "
        "the same, move that directory away or use another --workdir"
    )


def _restore(experiment: Experiment, checkpoints: Checkpoints, step: int, fingerprints: Mapping[str, str]):
    """(state, memory) of a checkpoint, in a second try if need be: storage may fail for a moment.

    Raises ValueError if continuing it would not be exact, and CheckpointError, in all processes, if it is damaged in any.
    """
    problem = CheckpointError(f"checkpoint {step} cannot be read by another process")
    for attempt in range(2):
        time.sleep(attempt)
        state = None
        try:
            meta = checkpoints.meta(step)
            _check_unchanged(experiment.settings, checkpoints.directory.parent, meta, fingerprints)
            state = checkpoints.restore(step, vars(experiment.abstract_state))
        except CheckpointError as error:
            problem = error
        if sharding.all_agree(state is not None):
            try:
                checkpoints.verify(step, state, meta)
                return TrainState(**state), meta["memory"]
            except CheckpointError as error:  # about the content, so in all processes
                problem = error
    raise problem


def _check_unchanged(settings: config.Settings, workdir: pathlib.Path, meta: Mapping, fingerprints: Mapping) -> None:
    """Raises ValueError if continuing from a checkpoint with this meta would not be exact."""
    if meta.get("imported"):
        raise ValueError(
            f"{workdir} holds weights imported from {meta['imported']}, not a run: train from them with "
            f"--config.init_from={workdir} and another --workdir"
        )
    changed = config_io.frozen_differences(config_io.from_saved(meta["settings"]), settings)
    for name, now in fingerprints.items():
        before, field = meta["fingerprints"].get(name), f"{name}.fingerprint"
        # Files of data and of networks may have other names.
        same = before is not None and (data.same_fingerprint if name == "data" else same_content)(before, now)
        if not same and field not in settings.checkpoint.allow_change:
            changed[field] = (before, now)
    if changed:
        lines = "\n".join(f"  {name}: {old!r} then, {new!r} now" for name, (old, new) in changed.items())
        names = ",".join(repr(name) for name in changed)
        accept = f'accept the difference with --config.checkpoint.allow_change="({names},)"'
        if any(name.startswith(("finetune.", "align.")) for name in changed):
            accept = f"start another run with --config.init_from={workdir}"
        raise ValueError(
            f"the checkpoint of this run was made with other settings, so continuing it would not be exact:\n{lines}\n"
            f"Set them back, use another --workdir, or {accept}"
        )


# Hand-off.


def _hand_off(experiment: Experiment, workdir: pathlib.Path, encoder: str | None) -> Start:
    """From the weights of another run or a release; `encoder`: identity of the encoder of this run's condition."""
    settings, task, ours = experiment.settings, experiment.task, experiment.abstract_state.params
    prior, read, prior_settings, prior_encoder = _open_prior(experiment)
    shapes = shapes_of(flatten(prior))
    task.check_prior(settings.model, prior_settings.model, shapes)
    # Imported weights do not name their encoder.
    same = (settings.encoder.kind, settings.encoder.output) == (
        prior_settings.encoder.kind,
        prior_settings.encoder.output,
    )
    same &= encoder is None or prior_encoder is None or same_content(encoder, prior_encoder)
    named = task.handoff().rules(shapes_of(flatten(ours)), shapes, same)
    rules = {
        "origin": settings.init_from,
        "reinitialise": (f"{finetune.LORA}/*", *named["reinitialise"]),
        "drop": named["drop"],
        "adapt": {path: functools.partial(task.network.widen_input, path) for path in named["widen"]},
    }
    transfer(prior, ours, **rules)  # by shapes: what does not fit is refused before gigabytes are read
    theirs = read()
    null = denoising.null_embedding(theirs, named["drop"])
    if null is not None:
        rules["adapt"]["time/fc2/bias"] = lambda bias: bias + null
    params, account = transfer(theirs, ours, **rules)
    flat = flatten(finetune.without_adapters(params))
    loaded = unflatten({path: leaf for path, leaf in flat.items() if not isinstance(leaf, jax.ShapeDtypeStruct)})
    if jax.process_index() == 0:
        account.save(workdir / "handoff.json")
    return Start(experiment.init_state(loaded), 0, {}, account.table())


def _open_prior(experiment: Experiment) -> tuple[Any, Callable[[], Any], config.Settings, str | None]:
    """What config.init_from names: weights or their shapes, what reads them, settings that they were trained with, and the
    identity of the encoder of their condition, if known. Raises ValueError if it is neither a run with a checkpoint nor a
    release."""
    origin = experiment.settings.init_from
    directory = pathlib.Path(origin).expanduser()
    if not (directory / DIRECTORY).is_dir():
        try:
            prior = releases.load(origin, "config.init_from", heads=getattr(experiment.task.network, "heads", 0))
        except ValueError as error:
            raise ValueError(
                f"config.init_from={origin} is neither a run (there is no checkpoint in it) nor a released prior: {error}"
            ) from error
        return prior.params, lambda: prior.params, prior.settings, None
    checkpoints = Checkpoints(directory)
    try:
        step = checkpoints.find()
    except ValueError as error:
        raise ValueError(f"config.init_from={origin}: {error}") from error
    meta = checkpoints.meta(step)

    def read():
        weights = finetune.read_weights(checkpoints, step, "ema", sharding.replicated(experiment.mesh))
        checkpoints.close()
        return weights

    shapes = finetune.without_adapters(checkpoints.shapes(step, "params"))
    return shapes, read, config_io.from_saved(meta["settings"]), meta["fingerprints"].get("encoder")
