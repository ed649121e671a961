"""How one task's weights become another's: the named rules of a hand-off (invariant 4).

A task names by patterns what may differ between its network and the one that it starts from; `rules` resolves the patterns for
two networks. Every other parameter must be on both sides, in the same shape.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Handoff:
    """Patterns (fnmatch) over parameter paths.

    Attributes:
      new: may be absent from the prior; is initialized then.
      gone: may be absent from this network; is dropped then.
      refit: depends on the kind of condition; is initialized if that differs, or if shapes differ.
      widened: may have fewer inputs in the prior; the new ones start at zero.
    """

    new: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    refit: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()

    def __or__(self, other: Handoff) -> Handoff:
        """Whatever either of them allows."""
        return Handoff(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


# From a prior without cross-attention, whose condition, if any, is added to the timestep embedding (DiT, RCG): it gains
# cross-attention, whose output starts at zero, and loses its condition, whose null stays (see `null_embedding`).
FROM_ADALN = Handoff(new=("blocks/cross/*", "tokens/*", "null/tokens"), gone=("vector/*", "null/vector"))
# To such a prior: another condition is initialized anew, and cross-attention is dropped.
TO_ADALN = Handoff(new=FROM_ADALN.gone, gone=(*FROM_ADALN.gone, *FROM_ADALN.new), refit=FROM_ADALN.gone)


def null_embedding(params: Mapping[str, Any], dropped: Collection[str]) -> Any | None:
    """What the null condition of a prior adds to the timestep embedding (D,), if the embedder of its condition is dropped.

    Added to the last bias of the timestep MLP, it makes the network start as the prior under its null condition, which its
    blocks have learned to see, and not as the prior without any.
    """
    if "vector/table" in dropped:
        return params["vector"]["table"][-1]
    if "null/vector" in dropped:
        return params["null"]["vector"] @ params["vector"]["kernel"] + params["vector"]["bias"]
    return None


def rules(
    handoff: Handoff, ours: Mapping[str, tuple], theirs: Mapping[str, tuple], same_condition: bool
) -> dict[str, tuple[str, ...]]:
    """Paths for `checkpoints.transfer`: reinitialise, drop, widen.

    ours, theirs: path -> shape of every parameter. same_condition: whether both are conditioned on the same features.
    """

    def named(paths: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
        return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]

    differ = {path for path in ours if path in theirs and ours[path] != theirs[path]}
    anew = [path for path in named(ours, handoff.new) if path not in theirs]
    anew += [path for path in named(ours, handoff.refit) if path in differ or not same_condition]
    dropped = [path for path in named(theirs, handoff.gone) if path not in ours]
    widen = named(differ, handoff.widened)
    return {"reinitialise": tuple(anew), "drop": tuple(dropped), "widen": tuple(widen)}
