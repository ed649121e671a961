"""Where a run's first state comes from, in this order (invariant 6):

1. the run's own newest checkpoint;
2. `config.init_from`, another run's EMA weights, its adapters merged, or released ones; our own adapters start fresh;
3. scratch, from `config.train.seed`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from lumos_jax import config, config_io
from lumos_jax.checkpoints import Checkpoints, transfer
from lumos_jax.checkpoints.manager import DIRECTORY
from lumos_jax.tasks import releases
from lumos_jax.train import finetune, sharding
from lumos_jax.train.state import TrainState, make_state


@dataclasses.dataclass(frozen=True)
class Start:
    """The first state, the step it stands at, what the loop remembered, and a sentence about where it is from."""

    state: TrainState
    step: int
    memory: dict[str, Any]
    origin: str


def start(settings: config.Settings, workdir: pathlib.Path, checkpoints: Checkpoints, dit, optimizer, mesh,
          fingerprints: dict[str, str]) -> Start:  # fmt: skip
    """Goes down the list in the module's docstring and takes the first that is there.

    Raises:
      ValueError: a setting or a fingerprint differs from the checkpoint's in a way that would break an exact resume; or
        the hand-off does not fit.
    """
    newest = checkpoints.latest()
    if newest is not None:
        return _resume(settings, checkpoints, newest, dit, optimizer, mesh, fingerprints)
    if settings.init_from:
        return _hand_off(settings, workdir, dit, optimizer, mesh)
    _, state = make_state(settings, dit, optimizer, mesh)
    return Start(state, 0, {}, f"from scratch, seed {settings.train.seed}")


def _resume(settings, checkpoints: Checkpoints, step: int, dit, optimizer, mesh, fingerprints) -> Start:
    meta = checkpoints.meta(step)
    if meta.get("imported"):
        raise ValueError(
            f"{checkpoints.directory.parent} holds weights imported from {meta['imported']}, not a run: train from them with "
            f"--config.init_from={checkpoints.directory.parent} and another --workdir"
        )
    changed = config_io.frozen_differences(config_io.from_dict(meta["settings"]), settings)
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
    abstract, _ = make_state(settings, dit, optimizer, mesh, abstract_only=True)
    state = checkpoints.restore(step, vars(abstract))
    return Start(TrainState(**state), step, meta["memory"], f"continues at step {step}")


def _hand_off(settings, workdir, dit, optimizer, mesh) -> Start:
    ours, _ = make_state(settings, dit, optimizer, mesh, abstract_only=True)
    rules = {"origin": settings.init_from, "reinitialise": (f"{finetune.LORA}/*",)}
    given = pathlib.Path(settings.init_from).expanduser()
    if given.is_dir() and (given / DIRECTORY).is_dir():
        source = Checkpoints(given)
        step = source.latest()
        if step is None:
            raise ValueError(f"config.init_from={settings.init_from}: there is no checkpoint in {source.directory}")
        # Judged by shapes first, so that weights that do not fit are refused before gigabytes are read.
        transfer(finetune.weight_shapes(source, step), ours.params, **rules)
        theirs = finetune.read_weights(source, step, "ema", sharding.replicated(mesh))
        source.close()
    else:
        try:
            theirs = releases.load(settings.init_from, "config.init_from", heads=dit.heads).params
        except ValueError as error:
            raise ValueError(
                f"config.init_from={settings.init_from} is neither a run (there is no checkpoint in it) nor a released prior: "
                f"{error}"
            ) from error
    params, account = transfer(theirs, ours.params, **rules)
    if jax.process_index() == 0:
        account.save(workdir / "handoff.json")
    params = {name: part for name, part in params.items() if name != finetune.LORA}
    _, state = make_state(settings, dit, optimizer, mesh, params=params)
    return Start(state, 0, {}, account.table())
