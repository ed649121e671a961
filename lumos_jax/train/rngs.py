"""Named random streams: every key is folded from (seed, name, step) and never carried (invariant 2).

A carried key would have to be checkpointed and would change with the number of calls before it; a folded one is a pure
function of its use. With partitionable threefry the random numbers of a row do not depend on the mesh either.
"""

from __future__ import annotations

import zlib

import jax

# What one training step draws; see tasks.denoising for their use.
STEP_STREAMS = ("posterior", "timestep", "noise", "dropout", "views")


def key(seed: int, name: str, step: int | jax.Array | None = None) -> jax.Array:
    """The key of stream `name` at `step` (which may be traced); without a step, of the whole run."""
    folded = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return folded if step is None else jax.random.fold_in(folded, step)


def streams(seed: int, scope: str, step: int | jax.Array) -> dict[str, jax.Array]:
    """Keys by name for everything that one step of `scope` ("train", "eval") draws."""
    return {name: key(seed, f"{scope}/{name}", step) for name in STEP_STREAMS}
