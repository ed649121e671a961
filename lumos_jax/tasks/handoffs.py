"""How one task's weights become another's: the named rules of a hand-off (invariant 4).

A task names what may differ between its network and the one that it starts from; `rules` settles the names for the two networks
at hand. What is not named must be on both sides, in the same shape.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping


@dataclasses.dataclass(frozen=True)
class Handoff:
    """Patterns (fnmatch) over parameter paths.

    Attributes:
      new: may be absent there; starts anew then.
      gone: may be absent here; is dropped then.
      refit: means something else there when the conditions are of other kinds; starts anew then, or if shapes differ.
      widened: may have fewer inputs there; the new ones start at zero.
    """

    new: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    refit: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()


def rules(
    handoff: Handoff,
    ours: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, tuple[int, ...]],
    same_condition: bool,
) -> dict[str, tuple[str, ...]]:
    """Paths for `checkpoints.transfer`: reinitialise, drop, widen.

    Args:
      handoff: the task's.
      ours, theirs: path -> shape of every parameter.
      same_condition: whether both networks are conditioned on the same features.
    """

    def named(paths: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
        return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]

    differ = {path for path in ours if path in theirs and ours[path] != theirs[path]}
    anew = [path for path in named(ours, handoff.new) if path not in theirs]
    anew += [path for path in named(ours, handoff.refit) if path in differ or not same_condition]
    dropped = [path for path in named(theirs, handoff.gone) if path not in ours]
    widen = named(differ, handoff.widened)
    return {"reinitialise": tuple(anew), "drop": tuple(dropped), "widen": tuple(widen)}
