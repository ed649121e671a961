"""Samples of the numbered items of an evaluation list: their host batches, and the compiled program that samples them.

The noise of item i is folded from (seed, i), of stochastic samplers too, so that a sample depends on weights, settings, seed
and i, and not on the batch, the devices or the processes that it is made on.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lumos_jax import config, data, fileio
from lumos_jax.data.base import CorruptRecord
from lumos_jax.data.decode import decode_square
from lumos_jax.data.sources.scenes import ScenesSource
from lumos_jax.data.sources.videos import VideosSource
from lumos_jax.evaluation.lists import FIRST_SCENE, Item, ItemList
from lumos_jax.tasks.sampling import Sampling
from lumos_jax.train import rngs
from lumos_jax.train.experiment import Experiment


def make_generate(experiment: Experiment, sampling: Sampling, seed: int) -> Callable:
    """(params, frozen, device arrays of a batch, item numbers (B,)) -> uint8 (B, [F,] H, W, 3), to be compiled."""
    settings, gather = experiment.settings.eval, experiment.gather

    def generate(params: Any, frozen: Any, batch: Any, numbers: jax.Array) -> jax.Array:
        def keys(name):
            return jax.vmap(jax.random.fold_in, (None, 0))(rngs.key(seed, f"evaluate/{name}"), numbers)

        both = (keys("noise"), keys("sampler"))
        return sampling.generate_batch(params, frozen, batch, both, 1, settings, gather)[:, 0]

    return generate


def held_out_list(settings: config.Data, num: int | None = None) -> ItemList:
    """The run's held-out records. Raises ValueError if there are fewer than `num`."""
    source = data.make_source(settings)
    records = data.holdout_records(settings, source)
    if num is not None and num > len(records):
        raise ValueError(f"{num} held-out records are wanted, and config.data.holdout={settings.holdout}")
    extra = {"data": source.fingerprint()}
    items = [
        Item(f"{record:09d}", {"record": record}, source.describe(record), extra=extra) for record in records[:num]
    ]
    return ItemList("held-out", tuple(items))


class ItemReader:
    """Item numbers (B,) -> (host batch, its true or reference images (B, ...) or None).

    Attributes:
      paired: whether a sample should equal its reference, not only resemble such images.

    Raises:
      ValueError: items that this run's task cannot condition on, files that cannot be read.
    """

    def __init__(self, experiment: Experiment, sampling: Sampling, items: ItemList):
        self.settings, self.task = experiment.settings.data, experiment.task
        self.sampling, self.items, self.root = sampling, items.items, pathlib.Path(items.root).expanduser()
        names = set(items.items[0].condition)
        self.kind = next((kind for kind in ("scene", "record", "video") if kind in names), "")
        wanted = {self.kind} if self.kind else set(sampling.needs)
        lacking = next((item for item in items.items if not wanted <= set(item.condition)), None)
        if lacking is not None:
            raise ValueError(
                f"item {lacking.id!r} of {items.name} has {', '.join(lacking.condition) or 'no condition'}, and this run's "
                f"task, {self.task.name}, needs {' and '.join(sorted(wanted))}"
            )
        if self.kind == "scene":
            world = self.settings.scenes
            turn, turntable = math.radians(world.max_view_angle), world.motion == "turntable"
            size = self.settings.image_size
            self.source = ScenesSource(2 * FIRST_SCENE, size, turn=turn, turntable=turntable)
            self.settings = config.replace(self.settings, {"source": "scenes", "path": ""})
        elif self.kind == "record":
            self.source = data.make_source(self.settings)
        elif self.kind == "video":
            self.source = VideosSource(str(self.root))
            self.numbers = {name: number for number, name in enumerate(self.source.names)}
        self.paired = sampling.truth(self._read(items.items[:1])) is not None

    def protocol(self) -> dict[str, Any]:
        """What decides conditions, besides the list."""
        clip = self.settings.sample_type == "clip"
        return {
            "paired": self.paired,
            "data": self.source.fingerprint() if self.kind else "",
            "frame_stride": list(self.settings.clips.frame_stride) if clip else None,
        }

    def __call__(self, numbers: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        host = self._read([self.items[number] for number in numbers])
        truth = self.sampling.truth(host)
        reference = host.get("image") if truth is None else truth
        return (host if self.task.host is None else self.task.host(host)), reference

    def _read(self, chosen: list[Item]) -> dict[str, np.ndarray]:
        """The host batch, before the task's own work on it."""
        conditions = [item.condition for item in chosen]
        if self.kind in ("scene", "record"):
            host = data.read_batch(self.settings, self.source, [condition[self.kind] for condition in conditions])
            if not host["weight"].all():
                raise ValueError(str(next(filter(None, host["problem"]))))
            if "caption" in host and "caption" in conditions[0]:
                host["caption"] = np.array([condition["caption"] for condition in conditions], object)
            return host
        if self.kind == "video":
            return self._clips(chosen)
        host = self.sampling.inputs(conditions, self._load)
        if "target" in conditions[0]:
            host["image"] = np.stack([self._load(condition["target"]) for condition in conditions])
        return host

    def _load(self, path: str) -> np.ndarray:
        return data.load_image(self.root / path, self.settings.image_size)

    def _clips(self, chosen: list[Item]) -> dict[str, np.ndarray]:
        size, frames, rates = self.settings.image_size, {}, {}
        for item in chosen:
            where = item.condition
            if where["frames"] != self.sampling.latent_shape[0]:
                raise ValueError(
                    f"this set is of {where['frames']} frames a clip, and this run's are of {self.sampling.latent_shape[0]}"
                )
            try:
                clip = self.source.clip(
                    self.numbers[where["video"]], where["frames"], where["stride"], where["share"], size
                )
            except OSError as error:
                raise fileio.failure(error, f"{self.root / where['video']} cannot be read: {error}") from error
            except (CorruptRecord, KeyError) as error:
                raise ValueError(f"{self.root / where['video']} cannot be read: {error}") from error
            frames[item.id] = np.stack([decode_square(frame, size) for frame in clip.frames])
            rates[item.id] = clip.fps
        conditions = [{"image": item.id, "fps": rates[item.id]} for item in chosen]
        host = self.sampling.inputs(conditions, lambda id: frames[id][0])
        return host | {"frames": np.stack([frames[item.id] for item in chosen])}
