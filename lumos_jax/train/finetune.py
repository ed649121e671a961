"""Fine-tuning: which parameters train, all of the network or a part of it, with or without LoRA (config.finetune).

`TrainState.params` holds all parameters, and adapters under "lora" by the path of their kernel. A `Plan` splits them into
those that train and the rest. Gradients, optimizer state and EMA exist for what trains only: the EMA of a frozen parameter is
that parameter.

In training, adapters are added to the kernels of one layer at a time, inside the scanned body and before the shards are
gathered, so that with model.remat = full neither merged kernels nor their gradients exist for all layers at once. The other
policies save A B for the backward pass: one float32 copy of the adapted kernels, split over fsdp. For evaluation, sampling and
hand-offs `merge` adds them for all layers at once: one copy of the adapted kernels.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.train import lora, rngs
from lumos_jax.weights.rules import flatten, parameter_shapes, unflatten

LORA = "lora"  # the entry of the parameters that holds adapters


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which parameters train. See `make_plan`."""

    names: frozenset[str] | None = (
        None  # paths of the network's own that train; None: all (null tables are carried along)
    )
    adapted: tuple[str, ...] = ()  # paths of the kernels with adapters; adapters always train
    rank: int = 0  # of the adapters

    def split(self, params: Any) -> tuple[Any, Any]:
        """Splits parameters, or a tree like them, into (what trains, the rest); `join` undoes it."""
        if self.names is None:
            return params, {}
        flat = flatten(params)
        trained = {path: leaf for path, leaf in flat.items() if path in self.names or path.startswith(f"{LORA}/")}
        return unflatten(trained), unflatten({path: leaf for path, leaf in flat.items() if path not in trained})

    def trainable(self, network) -> Any:
        """A tree of bool like what trains: False for null tables, as `Network.trainable`."""
        return self.split(self._with(network.trainable(), lambda path, _: {"a": True, "b": True}))[0]

    def with_adapters(self, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Adds fresh adapters to the network's parameters. Keys are by path: one more leaves the others as they were."""

        def fresh(path, leaf):
            return lora.init_pair(rngs.key(seed, f"{LORA}/{path}"), path, leaf.shape, self.rank)

        return self._with(params, fresh)

    def logical_axes(self, network) -> dict[str, Any]:
        """As `Network.logical_axes`, adapters included."""
        return self._with(network.logical_axes(), lora.pair_axes)

    def _with(self, tree: Mapping[str, Any], pair: Callable[[str, Any], Any]) -> dict[str, Any]:
        """A tree like the network's parameters, with `pair`(path, leaf) for each adapted kernel under "lora"."""
        flat = flatten(tree) if self.adapted else {}
        pairs = unflatten({path: pair(path, flat[path]) for path in self.adapted})
        return {**tree, **({LORA: pairs} if pairs else {})}

    def for_apply(self, params: Mapping[str, Any], gather: Callable | None) -> tuple[Any, Callable | None]:
        """(params, gather) for `Network.apply`: gather then adds the adapters of a layer too."""
        if not self.adapted:
            return params, gather

        def add_and_gather(layer):
            block = lora.add(layer["kernels"], layer[LORA])
            return block if gather is None else gather(block)

        blocks = {"kernels": params["blocks"], LORA: params[LORA]["blocks"]}
        return without_adapters(params) | {"blocks": blocks}, add_and_gather

    def ema_weights(self, params: Any, ema: Any) -> Any:
        """The network's weights: the EMA of what trains, the rest from `params`, adapters merged."""
        return ema if self.names is None else merge(join(ema, self.split(params)[1]))


def make_plan(settings: config.Finetune, network) -> Plan:
    """The plan that config.finetune describes for a network.

    Raises:
      ValueError: a pattern that matches nothing (the nearest names are listed), a kernel that is named twice or cannot have
        adapters, or a rank that no kernel of its size has.
    """
    if not settings.trainable and not settings.lora_rank:
        return Plan()
    trainable = [path for path, on in flatten(network.trainable()).items() if on]
    names = matching(settings.trainable, trainable, "config.finetune.trainable")
    if not settings.lora_rank:
        return Plan(frozenset(names))
    adapted = matching(settings.lora_targets, filter(lora.is_kernel, trainable), "config.finetune.lora_targets")
    if twice := [path for path in adapted if path in names]:
        raise ValueError(
            f"config.finetune.trainable and lora_targets both name {', '.join(twice)}: train a kernel or its adapters"
        )
    shapes = parameter_shapes(network)
    for path in adapted:
        most = lora.max_rank(path, shapes[path])
        if settings.lora_rank > most:
            raise ValueError(
                f"config.finetune.lora_rank={settings.lora_rank} is more than {most}, the full rank of {path}, whose shape "
                f"is {shapes[path]}; lower it, or take that kernel out of config.finetune.lora_targets"
            )
    return Plan(frozenset(names), tuple(adapted), settings.lora_rank)


def matching(patterns: Iterable[str], paths: Iterable[str], field: str) -> list[str]:
    """The paths that match any pattern, in their own order. Raises ValueError, naming the field, if a pattern matches none."""
    paths = list(paths)
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            near = difflib.get_close_matches(pattern, paths, n=4, cutoff=0.3) or paths
            raise ValueError(f"{field}: {pattern!r} matches no parameter that could be; nearest: {', '.join(near)}")
    return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]


def join(some: Mapping[str, Any], others: Mapping[str, Any]) -> Mapping[str, Any]:
    """Undoes `Plan.split`; where both have a parameter, that of `others` counts."""
    return unflatten({**flatten(some), **flatten(others)}) if others else some


def without_adapters(params: Mapping[str, Any]) -> dict[str, Any]:
    """The network's own parameters."""
    return {name: part for name, part in params.items() if name != LORA}


def merge(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds adapters (under "lora") to the network's parameters and drops them."""
    if LORA not in params:
        return params
    return without_adapters(params) | {"blocks": _merge_blocks(params["blocks"], params[LORA]["blocks"])}


@jax.jit
def _merge_blocks(kernels, pairs):
    return jax.vmap(lora.add)(kernels, pairs)


def read_weights(checkpoints: Checkpoints, step: int, name: str, placement: jax.sharding.Sharding) -> Any:
    """A checkpoint's weights for the network alone: what trained from entry `name` ("ema" or "params"), the rest from
    "params", adapters merged.
    """
    stored = {entry: flatten(checkpoints.shapes(step, entry)) for entry in (name, "params")}
    rest = {path: leaf for path, leaf in stored["params"].items() if path not in stored[name]}
    parts = {}
    for entry, leaves in ((name, stored[name]), ("params", rest)):
        # An EMA stored in bfloat16 is read as float32.
        leaves = {p: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=placement) for p, leaf in leaves.items()}
        if leaves:  # imported weights have no EMA
            parts |= flatten(checkpoints.restore_subtree(step, entry, unflatten(leaves)))
    return merge(unflatten(parts))
