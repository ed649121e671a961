"""The interface of a task to the trainer: what a batch means, which network trains on it, its losses, and how another task's
weights become its own.

A new task is one module of this package that assigns a subclass of `Task` to `TASK`, and one file in configs/. Diffusion tasks
derive from `denoising.Denoising`; how they sample is a separate interface, `sampling.Sampling`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

import jax

from lumos_jax import config
from lumos_jax.encoders import Placement
from lumos_jax.tasks.sampling import Sampling

Batch = Mapping[str, jax.Array]  # arrays with B rows each


@dataclasses.dataclass(frozen=True)
class Handoff:
    """What may differ between a network and the one that it starts from (invariant 4): patterns (fnmatch) over parameter paths.
    Every other parameter must be on both sides, in the same shape.

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

    def rules(
        self, ours: Mapping[str, tuple], theirs: Mapping[str, tuple], same_condition: bool
    ) -> dict[str, tuple[str, ...]]:
        """Paths for `checkpoints.transfer`: reinitialise, drop, widen.

        ours, theirs: path -> shape of every parameter. same_condition: whether both are conditioned on the same features.
        """

        def named(paths: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
            return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]

        differ = {path for path in ours if path in theirs and ours[path] != theirs[path]}
        anew = [path for path in named(ours, self.new) if path not in theirs]
        anew += [path for path in named(ours, self.refit) if path in differ or not same_condition]
        dropped = [path for path in named(theirs, self.gone) if path not in ours]
        return {"reinitialise": tuple(anew), "drop": tuple(dropped), "widen": tuple(named(differ, self.widened))}


class Task:
    """Base class; subclasses are frozen dataclasses and hashable. The parameters of frozen networks travel beside a task, as
    the tree `frozen`.

    Attributes:
      name: as in config.task.name.
      settings_class: of the group config.task: config.Task, or a dataclass derived from it with settings of its own.
      sample_type: the config.data.sample_type that it needs; empty for any.
      evaluator: which of train.evaluator.EVALUATORS measures it on held-out records.
      sampling_class: how it samples; None for a task whose network generates nothing.
      uncacheable: why nothing of its frozen networks can be cached; empty if `encode` can.
      network: what is trained: `init`, `trainable` and `logical_axes`, as of models.Network.
      latent_shape: of a task that samples: ([F,] h, w, c) of what its network denoises.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[config.Task]] = config.Task
    sample_type: ClassVar[str] = ""
    evaluator: ClassVar[str]
    sampling_class: ClassVar[type[Sampling] | None] = None
    uncacheable: ClassVar[str] = ""
    network: Any
    latent_shape: tuple[int, ...]

    @classmethod
    def build(cls, settings: config.Settings, place: Placement | None) -> tuple[Task, Any]:
        """The task and the parameters of its frozen networks; arguments and errors as of `tasks.make_task`."""
        raise NotImplementedError

    @property
    def identity(self) -> Mapping[str, str]:
        """Names and content hashes of the frozen networks, by settings group; compared when a run is resumed."""
        return {}

    @property
    def host(self) -> Callable | None:
        """A picklable HostBatch -> HostBatch that runs where records are decoded, as a tokenizer; None for nothing."""
        return None

    def describe(self) -> Mapping[str, str]:
        """Lines of the run's introduction, by heading."""
        return {}

    @property
    def sampling(self) -> Sampling | None:
        return self.sampling_class and self.sampling_class(self, self.latent_shape)

    # Training.

    def example(self, frozen: Any, batch: Batch, keys: Mapping[str, jax.Array]) -> Any:
        """Network inputs and targets of a batch, with every random choice made: a tree of arrays with B rows each, `weight`
        (B,) among them. keys: one key per name of train.rngs.STEP_STREAMS."""
        raise NotImplementedError

    def losses(self, params: Any, ema: Any, example: Any, total: jax.Array, gather: Any) -> dict[str, jax.Array]:
        """Sums over the rows of `example`, of which `loss` is minimized and the others are reported. Each row counts by its
        weight over `total`, the weight of all micro-batches, so that these add up to the batch. `gather` as for
        `models.Network.apply`."""
        raise NotImplementedError

    def post_update(self, params: Any, sums: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        """Post-update hook for non-gradient parameters: (parameters after the optimizer's step, sums of `losses`) -> the
        parameters, and the sums that are metrics."""
        return params, sums

    # Starting from another run's weights.

    def handoff(self) -> Handoff:
        """What may differ between this network and the one that it starts from."""
        return Handoff()

    def check_prior(self, ours: config.Model, theirs: config.Model, paths: Collection[str]) -> None:
        """Raises ValueError if a prior with parameters of these paths does not fit for a reason that `handoff` cannot express.
        ours, theirs: config.model of both runs."""

    # What others can load.

    @classmethod
    def trained_encoders(cls, settings: config.Settings, params: Any) -> dict[str, tuple[Any, Any]]:
        """The encoders that a run with these settings has trained: kind, of encoders.frozen.KINDS -> (network, parameters);
        empty for a task that trains a prior."""
        return {}

    # Caching what the frozen networks make of records.

    @property
    def ragged(self) -> Mapping[str, str]:
        """Arrays of `encode` that a cache cuts to each record's own length -> the mask (B, L) in the batch that gives it."""
        return {}

    def encode(self, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        """What the frozen networks make of a batch, as a cache keeps it and `example` takes it in place of images: float32
        `feature` (B, L, C) (and `feature_detailed` of a second caption), and `latent` moments (B, h, w, 2 c) or, where pixels
        are the latents, the uint8 `image` itself."""
        raise ValueError(self.uncacheable)

    def without_encoders(self, frozen: Any) -> Any:
        """`frozen` without the parameters that only `encode` needs: enough for batches from a cache."""
        return frozen
