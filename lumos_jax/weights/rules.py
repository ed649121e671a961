"""Names on disk <-> parameter paths: one table of rules read both ways, with a full account.

A rule says that the array `name` of a state dict lands at `path` of a parameter tree, after a named transform. `{i}` stands
for the layer's number: such arrays are stacked along a leading layers axis. `{rest}` stands for anything, in rules that drop.
Several rules may share one path (q, k and v that become one fused kernel): their arrays are concatenated along `join`, in the
order of the table.

Every array of both sides is accounted for: loaded by a rule, or dropped by a named one; everything else is an error that lists
both sides. All of it works on shapes alone, so a conversion can be proved at full size without allocating it. NumPy only.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      name: the array's name, with `{i}` for the layer, `{rest}` for anything.
      path: where it lands, as "blocks/attn/qkv/kernel"; "" drops it.
      transform: "same", "linear" (out, in) -> (in, out), "conv" (out, in, h, w) -> (h, w, in, out), "patch" (out, in, h, w) ->
        (h w in, out), "squeeze" (drops leading axes of length one), "conv1x1" (out, in, 1, 1) or (out, in) -> (in, out).
      join: the axis of the transformed array along which rules of one path are concatenated.
      why: for a dropped name, the reason that the account prints.
    """

    name: str
    path: str
    transform: str = "same"
    join: int | None = None
    why: str = ""


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _permute(axes: Sequence[int]) -> Callable:
    return lambda a: a.transpose(axes)


def _patch(a):
    out, inner, height, width = a.shape
    return a.transpose(2, 3, 1, 0).reshape(height * width * inner, out)


_TRANSFORMS: Mapping[str, Callable] = {
    "same": lambda a: a,
    "linear": _permute((1, 0)),
    "conv": _permute((2, 3, 1, 0)),
    "patch": _patch,
    "squeeze": lambda a: a.reshape(_squeeze(a.shape)),
    "conv1x1": lambda a: a.reshape(a.shape[:2]).transpose(1, 0),
}


def _inverse(transform: str, a: np.ndarray, like: tuple[int, ...]) -> np.ndarray:
    """Undoes a transform; `like` is the shape on disk."""
    if transform == "linear":
        return a.transpose(1, 0)
    if transform == "conv":
        return a.transpose(3, 2, 0, 1)
    if transform == "patch":
        out, inner, height, width = like
        return a.reshape(height, width, inner, out).transpose(3, 2, 0, 1)
    if transform == "conv1x1":
        return a.transpose(1, 0).reshape(like)
    return a.reshape(like)


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every array: names loaded, names dropped with the reason, and parameter counts."""

    loaded: Mapping[str, str]  # name on disk -> path
    dropped: Mapping[str, str]  # name on disk -> why
    parameters: int
    dropped_parameters: int

    def table(self) -> str:
        """A few lines for people."""
        lines = [f"loaded  {len(self.loaded):>5} arrays {self.parameters:>13,} parameters"]
        lines.append(f"dropped {len(self.dropped):>5} arrays {self.dropped_parameters:>13,} parameters")
        lines += [f"  {name}: {why}" for name, why in self.dropped.items()]
        return "\n".join(lines)


class _Shape:
    """Enough of an array to go through a transform by shape alone, by way of a zero-stride view."""

    def __new__(cls, shape):
        return np.broadcast_to(np.zeros((), np.int8), shape)


def _match(rules: Sequence[Rule], name: str) -> tuple[Rule, int | None] | None:
    for rule in rules:
        pattern = re.escape(rule.name).replace(r"\{i\}", r"(\d+)").replace(r"\{rest\}", ".*")
        found = re.fullmatch(pattern, name)
        if found:
            return rule, int(found.group(1)) if found.groups() else None
    return None


def _nearest(name: str, names) -> str:
    near = difflib.get_close_matches(name, list(names), n=2, cutoff=0.5)
    return f" (near: {', '.join(near)})" if near else ""


def convert(
    state: Mapping[str, Any],
    rules: Sequence[Rule],
    target: Mapping[str, Sequence[int]],
    *,
    origin: str,
    place: Callable[[str, np.ndarray], Any] | None = None,
):
    """State dict -> {path: array}, with an account.

    Everything is judged by shapes first; then the arrays of one path at a time are read, transformed, stacked and handed to
    `place`, so that of values that read themselves when asked for (`encoders.files.Lazy`) only one path is ever held twice.

    Args:
      state: name -> array (or what NumPy makes one of, with a shape), or name -> shape (a sequence of ints) to prove a table
        without data.
      rules: the table; the first rule that fits a name counts.
      target: path -> shape of every parameter that the network has.
      origin: what the state dict is, for messages.
      place: (path, array) -> what is kept of it: in another dtype, say, or on devices. None keeps the arrays.

    Returns:
      ({path: numpy array, or what `place` made of it, or zero-stride int8 views when given shapes}, Account)

    Raises:
      ValueError: names that no rule covers, parameters that nothing fills, shapes that differ: all of them, with near names.
    """
    parts: dict[str, dict[tuple[int, int | None], np.ndarray]] = {}
    sources: dict[str, dict[tuple[int, int | None], tuple[str, str]]] = {}  # the same with (name, transform)
    loaded, dropped, problems = {}, {}, []
    order = {id(rule): number for number, rule in enumerate(rules)}
    dropped_parameters = 0
    for name, value in state.items():
        array = _Shape(tuple(value.shape if hasattr(value, "shape") else value))
        found = _match(rules, name)
        if found is None:
            known = [rule.name for rule in rules if rule.path in target or not rule.path]
            problems.append(f"  {name} {tuple(array.shape)}: no rule{_nearest(re.sub('[0-9]+', '{i}', name), known)}")
            continue
        rule, layer = found
        if not rule.path:
            dropped[name] = rule.why
            dropped_parameters += math.prod(array.shape)
            continue
        if rule.path not in target:
            problems.append(f"  {name}: this network has no {rule.path}")
            continue
        try:
            key = order[id(rule)], layer
            parts.setdefault(rule.path, {})[key] = _TRANSFORMS[rule.transform](array)
            sources.setdefault(rule.path, {})[key] = name, rule.transform
        except ValueError:
            problems.append(f"  {name}: shape {tuple(array.shape)} is not what rule {rule.transform!r} expects")
            continue
        loaded[name] = rule.path
    params, count = {}, 0
    for path, shape in target.items():
        if path not in parts:
            wanted = [rule.name for rule in rules if rule.path == path]
            near = _nearest(wanted[0] if wanted else path, state)
            problems.append(f"  {path} {tuple(shape)}: nothing fills it; expected {' or '.join(wanted)}{near}")
            continue
        try:
            params[path] = _assemble(parts[path], rules)
        except ValueError as error:
            problems.append(f"  {path}: {error}")
            continue
        count += math.prod(shape)
        if params[path].shape != tuple(shape):
            problems.append(f"  {path}: {params[path].shape} there, {tuple(shape)} here")
    if problems:
        shown = "\n".join(problems[:40]) + (f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise ValueError(f"the weights of {origin} do not fit this network:\n{shown}")
    if all(hasattr(value, "shape") for value in state.values()):
        for path in params:
            array = _read(state, sources[path], rules, params[path].shape)
            params[path] = array if place is None else place(path, array)
    return params, Account(loaded, dropped, count, dropped_parameters)


def _read(
    state: Mapping[str, Any], sources: Mapping[tuple[int, int | None], tuple[str, str]], rules, shape
) -> np.ndarray:
    """The array of one path, whose parts `_assemble` has judged by shape; filled layer by layer, so that it is held once."""
    numbers = sorted({rule for rule, _ in sources})
    layers = sorted({layer for _, layer in sources if layer is not None})

    def joined(layer):
        pieces = []
        for number in numbers:
            name, transform = sources[number, layer]
            pieces.append(_TRANSFORMS[transform](np.asarray(state[name])))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=rules[numbers[0]].join)

    if not layers:
        return joined(None)
    array = np.empty(shape, joined(layers[0]).dtype)
    for place, layer in enumerate(layers):
        array[place] = joined(layer)
    return array


def _assemble(parts: Mapping[tuple[int, int | None], np.ndarray], rules: Sequence[Rule]) -> np.ndarray:
    """Joins the rules of one path and stacks its layers, by shape alone.

    Raises:
      ValueError: layers that are missing, incomplete or of several shapes.
    """
    numbers = sorted({rule for rule, _ in parts})
    layers = sorted({layer for _, layer in parts if layer is not None})
    if layers and layers != list(range(len(layers))):
        raise ValueError(f"layers {layers} are not consecutive from 0")

    def joined(layer):
        missing = [rules[n].name for n in numbers if (n, layer) not in parts]
        if missing:
            raise ValueError(f"layer {layer} lacks {', '.join(missing)}")
        pieces = [parts[n, layer] for n in numbers]
        if len(pieces) == 1:
            return pieces[0]
        join = rules[numbers[0]].join
        shape = list(pieces[0].shape)
        shape[join] = sum(piece.shape[join] for piece in pieces)
        return _Shape(tuple(shape))

    if not layers:
        return joined(None)
    stack = [joined(layer) for layer in layers]
    if len({array.shape for array in stack}) > 1:
        raise ValueError("layers differ in shape")
    return _Shape((len(stack), *stack[0].shape))


def export(
    params: Mapping[str, np.ndarray], rules: Sequence[Rule], like: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """{path: array} -> state dict: the inverse of `convert`, bit for bit.

    Args:
      params: path -> array.
      rules: the table that `convert` used.
      like: name on disk -> shape of every array that the file is to hold, dropped ones left out.

    Raises:
      ValueError: a name that no rule covers.
    """
    state = {}
    starts: dict[tuple[str, int | None], int] = {}
    for name, shape in sorted(like.items(), key=lambda item: _order(rules, item[0])):
        found = _match(rules, name)
        if found is None or not found[0].path:
            raise ValueError(f"no rule writes {name}")
        rule, layer = found
        array = params[rule.path] if layer is None else params[rule.path][layer]
        if rule.join is not None:
            width = _TRANSFORMS[rule.transform](_Shape(tuple(shape))).shape[rule.join]
            start = starts.get((rule.path, layer), 0)
            starts[rule.path, layer] = start + width
            array = np.take(array, range(start, start + width), axis=rule.join)
        state[name] = np.ascontiguousarray(_inverse(rule.transform, np.asarray(array), tuple(shape)))
    return {name: state[name] for name in like}


def _order(rules: Sequence[Rule], name: str) -> int:
    found = _match(rules, name)
    return -1 if found is None else rules.index(found[0])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, leaf = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree
