"""Hand-off: one run's weights as another run's first parameters, with a full account (invariant 4).

Every parameter of both sides is loaded, reinitialized or dropped by a named rule; anything else is an error that lists
both sides. The account is printed and saved as handoff.json.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lumos_jax import fileio
from lumos_jax.weights.rules import flatten, unflatten


@dataclasses.dataclass(frozen=True)
class Account:
    """Which parameters were loaded, reinitialized and dropped, by path ("blocks/attn/qkv/kernel"); handoff.json's fields."""

    source: str
    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...]
    dropped: tuple[str, ...]
    adapted: tuple[str, ...]  # those of `loaded` that were changed to fit this network
    parameters: Mapping[str, int]  # numbers of scalars in each group

    def table(self) -> str:
        """The account as text: counts, and the names of what was not loaded."""
        lines = [f"hand-off from {self.source}"]
        for fate in ("loaded", "reinitialised", "dropped"):
            names = getattr(self, fate)
            lines.append(f"  {fate:<14}{len(names):>5} arrays {self.parameters[fate]:>13,} parameters")
            lines += [f"    {name}" for name in names if fate != "loaded"]
        return "\n".join([*lines, *(f"  {name} was adapted to this network" for name in self.adapted)])

    def save(self, path: str | pathlib.Path) -> None:
        fileio.save_json(dataclasses.asdict(self), path)


def transfer(
    source: Any, target: Any, *, origin: str, reinitialise: Sequence[str] = (), drop: Sequence[str] = (),
    adapt: Mapping[str, Callable[[Any], Any]] | None = None,
) -> tuple[Any, Account]:  # fmt: skip
    """Returns parameters for the target: the source's where a path and shape agree, else by the named rules.

    Args:
      source: tree of arrays (or shapes) of the other run.
      target: freshly initialized tree of arrays (or only shapes); reinitialized entries are taken from it.
      origin: name of the source, for the account.
      reinitialise: patterns (fnmatch over "a/b/c") of target parameters that are not loaded.
      drop: patterns of source parameters that are not used.
      adapt: path -> function from the source's parameter to the target's.

    Raises:
      ValueError: parameters that no rule covers, or shapes that differ; it lists all of them, of both sides.
    """

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    have, want, adapt = flatten(source), flatten(target), adapt or {}
    have |= {name: _adapted(change, have[name]) for name, change in adapt.items() if name in have}
    fresh = [name for name in want if matches(name, reinitialise)]
    dropped = [name for name in have if matches(name, drop) or name in fresh]
    loaded = [name for name in want if name in have and name not in fresh and name not in dropped]
    problems = [
        f"  {name}: {tuple(have[name].shape)} there, {tuple(want[name].shape)} here"
        for name in loaded
        if have[name].shape != want[name].shape
    ]
    problems += [f"  {name}: only here" for name in want if name not in loaded and name not in fresh]
    problems += [f"  {name}: only there" for name in have if name not in loaded and name not in dropped]
    if problems:
        raise ValueError(f"the weights of {origin} do not fit this model:\n" + "\n".join(problems))
    fates = {"loaded": (loaded, have), "reinitialised": (fresh, want), "dropped": (dropped, have)}
    counts = {fate: sum(math.prod(tree[name].shape) for name in names) for fate, (names, tree) in fates.items()}
    adapted = tuple(name for name in loaded if name in adapt)
    params = unflatten({name: have[name] if name in loaded else want[name] for name in want})
    return params, Account(origin, tuple(loaded), tuple(fresh), tuple(dropped), adapted, counts)


def _adapted(change: Callable[[Any], Any], value: Any) -> Any:
    return jax.eval_shape(change, value) if isinstance(value, jax.ShapeDtypeStruct) else change(value)
