"""Names on disk -> parameter paths: one table of rules for a network, and a report of every name.

Arrays of the layers are stacked along a leading axis. Several rules may share one path (q, k and v that become one fused
kernel): their arrays are concatenated in the order of the table.

Every array of both sides is loaded by a rule or dropped by a named one; everything else is an error that lists both sides. All
of it works on shapes alone, so a conversion can be checked at full size without allocating it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lumos_jax import progress

MOST_PROBLEMS = 40  # listed in one error

flatten = functools.partial(traverse_util.flatten_dict, sep="/")  # nested dicts -> {"a/b/c": leaf}
unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")


def parameter_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters that `network.init(key)` would make; nothing is allocated."""
    return {path: leaf.shape for path, leaf in flatten(jax.eval_shape(network.init, jax.random.key(0))).items()}


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, of a state dict of arrays or of shapes."""
    return {name: tuple(getattr(value, "shape", value)) for name, value in state.items()}


def has_data(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds arrays, and not shapes."""
    return all(hasattr(value, "shape") for value in state.values())


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      name: the array's name on disk, with `{i}` for the layer's number, `{rest}` for anything, in rules that drop.
      path: where it lands in the parameters, as "blocks/attn/qkv/kernel"; "" drops it.
      transform: a key of _TRANSFORMS.
      join: the axis of the transformed array along which rules of one path are concatenated.
      why: for a dropped name, the reason that the report prints.
    """

    name: str
    path: str
    transform: str = "same"
    join: int | None = None
    why: str = ""

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        return re.compile(re.escape(self.name).replace(r"\{i\}", r"(\d+)").replace(r"\{rest\}", ".*"))


def linear(name: str, path: str, transform: str = "linear") -> list[Rule]:
    """PyTorch's weight and bias -> `path` followed by "kernel" and "bias"."""
    return [Rule(f"{name}.weight", f"{path}kernel", transform), Rule(f"{name}.bias", f"{path}bias")]


def dropped(why: str, *names: str) -> list[Rule]:
    """Rules that drop arrays, and say why."""
    return [Rule(name, "", why=why) for name in names]


def _squeeze(a: np.ndarray) -> np.ndarray:
    return _squeeze(a[0]) if a.ndim > 1 and len(a) == 1 else a


def _patch(a: np.ndarray) -> np.ndarray:
    out, inner, height, width = a.shape
    return a.transpose(2, 3, 1, 0).reshape(height * width * inner, out)


_TRANSFORMS: Mapping[str, Callable] = {
    "same": lambda a: a,
    "linear": lambda a: a.transpose(1, 0),  # (out, in) -> (in, out)
    "conv": lambda a: a.transpose(*range(2, a.ndim), 1, 0),  # (out, in, [t,] h, w) -> ([t,] h, w, in, out)
    "patch": _patch,  # (out, in, h, w) -> (h w in, out)
    "squeeze": _squeeze,  # drops leading dims of length one
}
_INVERSES: Mapping[str, Callable] = {  # (array, patch size) -> array
    "same": lambda a, _: a,
    "linear": lambda a, _: a.transpose(1, 0),
    "patch": lambda a, side: a.reshape(side, side, -1, a.shape[-1]).transpose(3, 2, 0, 1),
}


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What became of every array: names loaded, names dropped with the reason, and parameter counts."""

    loaded: Mapping[str, str]  # name on disk -> path
    dropped: Mapping[str, str]  # name on disk -> why
    parameters: int
    dropped_parameters: int

    def table(self) -> str:
        """A few lines for people."""
        counts = (("loaded ", self.loaded, self.parameters), ("dropped", self.dropped, self.dropped_parameters))
        lines = [f"{what} {len(names):>5} arrays {count:>13,} parameters" for what, names, count in counts]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.dropped.items())])


# Prefixes that wrappers put before a network's names -> names that stand beside it without: of DistributedDataParallel,
# torch.compile, Lightning modules and EMA wrappers; of DINO's and MoCo-v3's training; of Hugging Face's classifiers.
WRAPPERS: Mapping[str, tuple[str, ...]] = {
    "module.": ("n_averaged",),
    **dict.fromkeys(("_orig_mod.", "model.", "ema.", "ema_model."), ()),
    "backbone.": ("head.",),
    "base_encoder.": ("momentum_encoder.", "predictor."),
    **dict.fromkeys(("vit.", "dinov2."), ("classifier.",)),
}


def strip_wrappers(state: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Strips the prefixes of wrappers from names, and logs which. Raises ValueError if names with and without are mixed."""
    stripped, state = "", dict(state)
    while prefix := next((p for p in WRAPPERS if any(name.startswith(p) for name in state)), ""):
        have = [name for name in state if name.startswith(prefix)]
        beside = [name for name in state if not name.startswith(prefix)]
        if lack := [name for name in beside if not name.startswith(WRAPPERS[prefix])]:
            raise ValueError(
                f"{origin} mixes names with and without {prefix!r}: {', '.join(have[:3])} ... but {', '.join(lack[:3])} ...; "
                "keep those of one network"
            )
        if twice := sorted({name.removeprefix(prefix) for name in have} & set(beside)):
            raise ValueError(f"{origin} has {', '.join(twice[:3])} twice, with and without {prefix!r}")
        state = {name.removeprefix(prefix): value for name, value in state.items() if name != "n_averaged"}
        stripped += prefix
    if stripped:
        logging.getLogger(__name__).warning("%s: stripped the prefix %r from its names", origin, stripped)
    return state


def keep(path: str, array: np.ndarray) -> np.ndarray:
    """Places an array where it is."""
    return array


def convert(
    state: Mapping[str, Any],
    rules: Sequence[Rule],
    target: Mapping[str, Sequence[int]],
    *,
    origin: str,
    place: Callable[[str, np.ndarray], Any] = keep,
) -> tuple[dict[str, Any], ImportReport]:
    """State dict -> {path: array}, with a report.

    Everything is judged by shapes first. Then the arrays of one path at a time are read, transformed, stacked and placed, so
    that of values that read themselves when asked for (`files.Lazy`) only one path is ever held twice.

    Args:
      state: name -> array (or what NumPy makes one of, with a shape), or name -> shape to check a table without data.
      rules: the table; the first rule that fits a name counts.
      target: path -> shape of every parameter that the network has.
      origin: what the state dict is, for messages.
      place: (path, array) -> what is kept of it: in another dtype, say, or on devices.

    Returns:
      ({path: numpy array, or what `place` made of it, or zero-stride int8 views when given shapes}, report)

    Raises:
      ValueError: names that no rule covers, parameters that nothing fills, shapes that differ: all of them, with near names.
    """
    shapes = shapes_of(state)
    parts: dict[str, _Parts] = {path: {} for path in target}
    loaded, dropped, problems = {}, {}, []
    for name, shape in shapes.items():
        found = next(((n, rule, m) for n, rule in enumerate(rules) if (m := rule.pattern.fullmatch(name))), None)
        if found is None:
            known = [rule.name for rule in rules if rule.path in target or not rule.path]
            problems.append(f"{name} {shape}: no rule{_nearest(re.sub('[0-9]+', '{i}', name), known)}")
            continue
        number, rule, match = found
        if not rule.path:
            dropped[name] = rule.why
        elif rule.path not in target:
            problems.append(f"{name}: this network has no {rule.path}")
        else:
            loaded[name] = rule.path
            try:
                there = _TRANSFORMS[rule.transform](np.broadcast_to(np.int8(0), tuple(shape))).shape
            except ValueError:
                problems.append(f"{name}: shape {shape} is not what rule {rule.transform!r} expects")
                continue
            layer = int(match[1]) if match.groups() else None
            parts[rule.path].setdefault(layer, {})[number] = name, there
    for path, shape in target.items():
        try:
            _check(path, tuple(shape), parts[path], rules, state)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        if (more := len(problems) - MOST_PROBLEMS) > 0:
            problems[MOST_PROBLEMS:] = [f"... and {more} more"]
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"the weights of {origin} do not fit this network:\n{listed}")
    if has_data(state):
        bar = progress.bar(target.items(), unit="parameter")
        params = {path: place(path, _read(parts[path], rules, state, shape)) for path, shape in bar}
    else:
        params = {path: np.broadcast_to(np.int8(0), tuple(shape)) for path, shape in target.items()}
    count, left = (sum(map(math.prod, some)) for some in (target.values(), (shapes[name] for name in dropped)))
    return params, ImportReport(loaded, dropped, count, left)


# Of one path: layer (None where there are none) -> number of the rule -> (name on disk, shape after the transform).
_Parts = dict[int | None, dict[int, tuple[str, tuple[int, ...]]]]


def _check(path: str, shape: tuple, parts: _Parts, rules: Sequence[Rule], state: Mapping[str, Any]) -> None:
    """Raises ValueError unless a path's arrays, joined and stacked, have its shape."""
    if not parts:
        wanted = [rule.name for rule in rules if rule.path == path]
        # Of a table of several families, what this file's family has.
        wanted = [n for n in wanted if any(name.partition(".")[0] == n.partition(".")[0] for name in state)] or wanted
        near = _nearest(wanted[0] if wanted else path, state)
        raise ValueError(f"{path} {shape}: nothing fills it; expected {' or '.join(wanted)}{near}")
    numbers = sorted({number for layer in parts.values() for number in layer})
    layers = sorted(parts.keys() - {None})
    if layers != list(range(len(layers))):
        raise ValueError(f"{path}: layers {layers} are not consecutive from 0")
    stack = set()
    for layer in layers or [None]:
        if missing := [rules[number].name for number in numbers if number not in parts[layer]]:
            raise ValueError(f"{path}: layer {layer} lacks {', '.join(missing)}")
        shapes = [list(parts[layer][number][1]) for number in numbers]
        if len(shapes) > 1:
            join = rules[numbers[0]].join
            shapes[0][join] = sum(shape[join] for shape in shapes)
        stack.add(tuple(shapes[0]))
    if len(stack) > 1:
        raise ValueError(f"{path}: layers differ in shape")
    there = (len(layers), *stack.pop()) if layers else stack.pop()
    if there != shape:
        raise ValueError(f"{path}: {there} there, {shape} here")


def _read(parts: _Parts, rules: Sequence[Rule], state: Mapping[str, Any], shape: Sequence[int]) -> np.ndarray:
    """A path's array, filled layer by layer, so that it is held once."""

    def joined(layer: int | None) -> np.ndarray:
        named = [(rules[number], name) for number, (name, _) in sorted(parts[layer].items())]
        pieces = [_TRANSFORMS[rule.transform](np.asarray(state[name])) for rule, name in named]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=named[0][0].join)

    first = joined(min(parts))
    if None in parts:
        return first
    array = np.empty(shape, first.dtype)
    for layer in range(len(parts)):
        array[layer] = joined(layer) if layer else first
    return array


def _nearest(name: str, names) -> str:
    near = difflib.get_close_matches(name, list(names), n=2, cutoff=0.5)
    return f" (near: {', '.join(near)})" if near else ""


def export(params: Mapping[str, np.ndarray], rules: Sequence[Rule], patch_size: int) -> dict[str, np.ndarray]:
    """{path: array} -> state dict, in the order of the table: the inverse of `convert` for rules without joins, bit for bit."""
    state = {}
    for rule in rules:
        if rule.path in params:
            for i, array in enumerate(params[rule.path] if "{i}" in rule.name else [params[rule.path]]):
                array = _INVERSES[rule.transform](np.asarray(array), patch_size)
                state[rule.name.format(i=i)] = np.ascontiguousarray(array)
    return state
