"""What a task is, to the trainer; and what a diffusion task is besides, to the held-out loss and the samplers.

They see tasks through these interfaces only; a new task is one file in this folder, one line in `tasks.make_task` and one file
in configs/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lumos_jax.diffusion import Process
from lumos_jax.models import Condition, Network
from lumos_jax.tasks.handoffs import Handoff


class Task(Protocol):
    """Frozen and hashable. Parameters of frozen encoders travel beside it, as the tree `frozen`.

    Attributes:
      name: as in config.task.name.
      network: what is trained: `init`, `trainable` and `logical_axes`, as of models.Network.
      identity: names and content hashes of the frozen networks; compared when a run is resumed.
      host: what is done to a batch where it is decoded, picklable; None for nothing.
    """

    name: str
    network: Any
    identity: Mapping[str, str]
    host: Callable | None

    def describe(self) -> Mapping[str, str]:
        """Lines of the run's introduction, by heading."""
        ...

    def handoff(self) -> Handoff:
        """What may differ between this network and one that it starts from."""
        ...

    def example(self, frozen: Any, batch: Mapping[str, jax.Array], keys: Mapping[str, jax.Array]) -> Any:
        """A batch with everything random about it drawn: a tree of arrays with B rows each, `weight` (B,) among them.

        keys: one key per name of train.rngs.STEP_STREAMS.
        """
        ...

    def losses(self, params: Any, average: Any, example: Any, total: jax.Array, gather: Any) -> dict[str, jax.Array]:
        """Sums over the rows of `example`, of which `loss` is minimised and the others are reported.

        Each row counts by its weight over `total`, that of the whole batch, so that micro-batches add up to the batch.

        params: float32 parameters. average: their running average. gather: as for `models.Network.apply`.
        """
        ...

    def settle(self, params: Any, sums: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        """After an update: what of `params` follows the batch rather than the gradient, and the sums that are metrics."""
        ...


class DiffusionTask(Task, Protocol):
    """A task whose network denoises latents.

    Attributes:
      dit: the network.
      process: the diffusion process.
      latent_shape: ([F,] h, w, c) of x0.
      condition_dropout: probability in [0, 1] of the null condition in training.
      ragged: what of `encode` a cache cuts to a record's own length -> the mask in the batch that tells it.
    """

    dit: Network
    process: Process
    latent_shape: tuple[int, ...]
    condition_dropout: float
    ragged: Mapping[str, str]

    def draw_drop(self, key: jax.Array, size: int) -> dict[str, jax.Array]:
        """For each name of models.PARTS, (size,) bool: the rows of a training batch that lose that part."""
        ...

    def shuffled(self, condition: Condition) -> Condition:
        """The rows' conditions exchanged, to see by the held-out loss whether they matter."""
        ...

    def guidance(self, scale: float) -> float | np.ndarray:
        """What a guidance scale means here: that scale, or several that broadcast to (B, *latent_shape)."""
        ...

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """uint8 `image`, and what else a record has -> what the frozen encoders make of it, as a cache keeps it for every
        record: float32 `feature` (B, L, C) (and `feature_detailed` of a second caption), and `latent` moments (B, h, w, 2 c)
        or, where pixels are the latents, the uint8 `image` itself."""
        ...

    def without_encoders(self, frozen: Any) -> Any:
        """`frozen` without the parameters that only `encode` needs: enough for batches that hold what it gives."""
        ...

    def prepare(self, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Condition]:
        """uint8 `image` (B, H, W, 3), or what `encode` makes of it, in any floating dtype -> x0 (B, h, w, c) float32 and its
        Condition; `key` draws the posterior."""
        ...

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        """The Condition alone, for sampling."""
        ...

    def source_pictures(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The batch's pictures, uint8 (B, H, W, 3), to be shown: decoded from the latents' mean where there is no `image`."""
        ...

    def decode(self, frozen: Any, latent: jax.Array) -> jax.Array:
        """(B, [F,] h, w, c) -> pixels (B, [F,] H, W, 3) float32 in [-1, 1]."""
        ...

    def sheet(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """One picture (H, W, 3) uint8 of a batch as it was read, its `source_pictures`, and n samples a row (R, n, ...)."""
        ...

    def truth(self, host: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """What samples of each row of a batch as it was read should show, uint8 (R, [F,] H, W, 3), where that is known."""
        ...

    def request(self, asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """The batch that the command line of `lumos_jax.sample` describes, one row a condition.

        Args:
          asked: the flags that were given, by name.
          load: path of an image -> (S, S, 3) uint8.

        Raises:
          ValueError: a flag is missing, or is not for this task.
        """
        ...

    def for_request(self, asked: Mapping[str, Any]) -> DiffusionTask:
        """The task as it draws what the command line describes, as clips of another length; raises ValueError as `request`."""
        ...

    def save(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray, out: str) -> Sequence[str]:
        """Writes samples as `sheet` shows them, or as clips; returns the files."""
        ...
