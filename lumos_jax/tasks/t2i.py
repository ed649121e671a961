"""Text to image: an image from its caption, which a frozen text encoder reads (paper section 3.2).

The tokens are one feature a token of the caption, and cross-attention sees those that are no padding; or one pooled feature.
An I2I prior hands over everything but what reads its condition: the first Linear of the condition embedder and the table
that stands for no condition start anew.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.data import aspect
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising, pictures, requests
from lumos_jax.tasks.handoffs import Handoff

KINDS = ("", "_detailed")  # endings of the names of a raw and a detailed caption, where a batch has both


class Tokenize:
    """HostBatch -> HostBatch with `tokens` int32 (B, L) and `token_mask` bool (B, L) of its captions; picklable.

    A batch with `caption_detailed` has `tokens_detailed` and `token_mask_detailed` besides. An empty caption is the
    end-of-text token alone; one that is too long is cut, its end-of-text token kept.
    """

    def __init__(self, tokenizer: Any, max_tokens: int):
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._lock = threading.Lock()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = {}
        for kind in KINDS:
            if f"caption{kind}" in batch:
                with self._lock:  # the tokenizer remembers how it pads, and must not be asked by two threads at once
                    found = encoders.tokenize(self._tokenizer, batch[f"caption{kind}"].tolist(), self._max_tokens)
                made |= {f"{name}{kind}": array for name, array in found.items()}
        return batch | made

    def __getstate__(self):
        return self._tokenizer, self._max_tokens

    def __setstate__(self, state):
        self.__init__(*state)


@dataclasses.dataclass(frozen=True)
class TextToImage(denoising.Denoising):
    """The T2I task; see tasks.base for the interface.

    tokenize: what the host does to a batch. buckets: the sizes of pictures, of which a batch has one; empty if all are square.
    Their condition has (height, width, ratio) besides: of the original picture and its bucket in training, of the bucket in
    sampling.
    """

    tokenize: Tokenize = dataclasses.field(compare=False, kw_only=True)
    buckets: tuple[aspect.Bucket, ...] = ()
    name: str = "t2i"

    @property
    def host(self) -> Callable:
        return self.tokenize

    def handoff(self) -> Handoff:
        return super().handoff() | Handoff(
            new=("vector/*",),  # of a prior without sizes
            refit=("tokens/fc1/*", "null/tokens"),
        )

    def prepare(self, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Condition]:
        return self.latents(frozen, batch, key), self.condition(frozen, batch)

    def condition(self, frozen: Any, batch: Mapping[str, jax.Array]) -> Condition:
        if "feature" in batch:
            tokens = batch["feature"].astype(jnp.float32)
        else:
            tokens = self.encoder.apply(frozen["encoder"], batch["tokens"], batch["token_mask"])
        mask = None if self.encoder.output == "pooled" else batch["token_mask"]
        return Condition(tokens, mask, vector=batch["size"] if self.buckets else None)

    def shuffled(self, condition: Condition) -> Condition:
        """Captions exchanged; sizes belong to the pictures."""
        return dataclasses.replace(super().shuffled(condition), vector=condition.vector)

    @property
    def ragged(self) -> dict[str, str]:
        if self.encoder.output == "pooled":
            return {}
        return {f"feature{kind}": f"token_mask{kind}" for kind in KINDS}

    def encode(self, frozen: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        features = {
            f"feature{kind}": self.encoder.apply(frozen["encoder"], batch[f"tokens{kind}"], batch[f"token_mask{kind}"])
            for kind in KINDS
        }
        return self.encode_pictures(frozen, batch) | features

    def source_pictures(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The records' pictures; of captions alone, pictures without pixels."""
        if "image" in batch or "latent" in batch:
            return super().source_pictures(frozen, batch)
        return jnp.zeros((batch["tokens"].shape[0], 0, 0, 3), jnp.uint8)

    def sheet(self, host: Mapping[str, np.ndarray], sources: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Rows of (record's picture, where there is one | sample | sample ...), the caption above each."""
        rows = drawn if not sources.size else np.concatenate([sources[:, None], drawn], axis=1)
        return pictures.sheet(rows, titles=list(host["caption"]))

    def request(self, asked: Mapping[str, Any], load: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        requests.check(asked, ("prompts",), ("size",) if self.buckets else ())
        batch = {"caption": np.array(asked["prompts"], object)}
        if not self.buckets:
            return batch
        bucket = self._bucket(asked["size"]) if "size" in asked else self.buckets[aspect.square(self.buckets)]
        size = np.array([bucket.height, bucket.width, bucket.ratio], np.float32)
        return batch | {"size": np.tile(size, (len(batch["caption"]), 1))}

    def _bucket(self, size: str) -> aspect.Bucket:
        sides = size.lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise ValueError(f"--size={size}: give HEIGHTxWIDTH in pixels")
        height, width = map(int, sides)
        near = self.buckets[int(aspect.nearest(self.buckets, np.array([height / width]))[0])]
        if (height, width) != (near.height, near.width):
            raise ValueError(
                f"--size={size} is none of the {len(self.buckets)} sizes that this run trained in; of the nearest ratio is "
                f"{near.height}x{near.width}"
            )
        return near

    def for_request(self, asked: Mapping[str, Any]) -> TextToImage:
        if "size" not in asked or not self.buckets:
            return self
        bucket, base = self._bucket(asked["size"]), self.buckets[aspect.square(self.buckets)].height
        h, w, channels = self.latent_shape
        return dataclasses.replace(self, latent_shape=(bucket.height * h // base, bucket.width * w // base, channels))


def make_t2i(settings: config.Settings, place: encoders.Placement | None = None) -> tuple[TextToImage, dict[str, Any]]:
    """The task and its frozen parameters {"encoder", "autoencoder"}, loaded as the settings name them.

    Raises:
      ValueError: an encoder that reads no text, records without captions, or as `make_i2i`.
    """
    if settings.encoder.kind not in config.TEXT_KINDS:
        raise ValueError(
            f"config.encoder.kind={settings.encoder.kind} reads no captions: set it to {' or '.join(config.TEXT_KINDS)}"
        )
    if settings.data.sample_type != "captioned":
        raise ValueError(f"config.data.sample_type={settings.data.sample_type} has no captions: set it to captioned")
    encoder, encoder_params = encoders.make_text_encoder(settings.encoder, place)
    shapes_only = place is not None and place.shapes_only  # and no caption is read
    tokenizer = None if shapes_only else encoders.make_tokenizer(settings.encoder, encoder)
    tokenize = Tokenize(tokenizer, encoder.max_tokens)
    data, buckets = settings.data, ()
    if data.buckets:
        buckets = aspect.make_buckets(data.image_size, data.bucket_step, data.bucket_ratios)
    task, frozen = denoising.make(
        TextToImage, settings, place, encoder, encoder_params,
        network={"vector_kind": "size" if buckets else "linear"}, tokenize=tokenize, buckets=buckets,
    )  # fmt: skip
    patch = data.image_size // task.latent_shape[0] * settings.model.patch_size
    if any(side % patch for bucket in buckets for side in (bucket.height, bucket.width)):
        raise ValueError(
            f"config.data.bucket_step={data.bucket_step} gives sides that are not whole patches of {patch} px: "
            f"set it to a multiple of {patch}"
        )
    return task, frozen
