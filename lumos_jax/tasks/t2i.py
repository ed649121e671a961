"""Text to image: an image from its caption, which a frozen text encoder reads (paper section 3.2).

The condition is one feature per token of the caption, of which cross-attention sees those that are not padding, or one pooled
feature. An I2I prior hands over everything but what reads its condition: the first Linear of the condition embedder and the
null table are initialized anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config, encoders
from lumos_jax.data import aspect
from lumos_jax.models import Condition
from lumos_jax.tasks import denoising
from lumos_jax.tasks.base import Batch, Handoff
from lumos_jax.tasks.sampling import Conditions, Host, Load, Sampling

KINDS = ("", "_detailed")  # suffixes of the arrays of a raw and a detailed caption, where a batch has both
_LOCK = threading.Lock()  # its padding is state of a tokenizer, which two threads must not share


def tokenize(tokenizer: Any, max_tokens: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds `tokens` int32 (B, L) and `token_mask` bool (B, L) of the captions to a HostBatch.

    A batch with `caption_detailed` has `tokens_detailed` and `token_mask_detailed` besides. An empty caption is the
    end-of-text token alone; one that is too long is cut, its end-of-text token kept.
    """
    made = {}
    for kind in KINDS:
        if f"caption{kind}" in batch:
            with _LOCK:
                found = encoders.tokenize(tokenizer, batch[f"caption{kind}"].tolist(), max_tokens)
            made |= {f"{name}{kind}": array for name, array in found.items()}
    return batch | made


class CaptionSampling(Sampling):
    """A row of samples a prompt."""

    needs = ("caption",)

    @classmethod
    def add_flags(cls, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument("--prompts", nargs="+", required=True, metavar="TEXT", help="the texts to condition on")
        text = "pixels, of a run that trained in several sizes; default: the square"
        parser.add_argument("--size", metavar="HEIGHTxWIDTH", help=text)

    def with_flags(self, args: argparse.Namespace) -> Sampling:
        if args.size is None:
            return self
        if not self.task.buckets:
            raise ValueError(
                f"--size={args.size} is for runs with config.data.aspect_ratios; this one trained in one size"
            )
        bucket, square = self._bucket(args.size), self._bucket(None).height
        h, w, channels = self.latent_shape
        shape = (bucket.height * h // square, bucket.width * w // square, channels)
        return dataclasses.replace(self, latent_shape=shape)

    def sample_inputs(self, args: argparse.Namespace, load: Load) -> dict[str, np.ndarray]:
        return self._captions(args.prompts, args.size)

    def inputs(self, conditions: Conditions, load: Load) -> dict[str, np.ndarray]:
        """With config.data.aspect_ratios, in the square size."""
        return self._captions([condition["caption"] for condition in conditions], None)

    def _captions(self, texts: Sequence[str], size: str | None) -> dict[str, np.ndarray]:
        batch = {"caption": np.array(texts, object)}
        if not self.task.buckets:
            return batch
        bucket = self._bucket(size)
        row = np.array([bucket.height, bucket.width, bucket.ratio], np.float32)
        return batch | {"size": np.tile(row, (len(texts), 1))}

    def _bucket(self, size: str | None) -> aspect.Bucket:
        """The bucket of that --size; None takes the square one."""
        buckets = self.task.buckets
        if size is None:
            return buckets[aspect.square(buckets)]
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size.lower())
        if found is None:
            raise ValueError(f"--size={size}: give HEIGHTxWIDTH in pixels")
        height, width = map(int, found.groups())
        near = buckets[int(aspect.nearest(buckets, np.array([height / width]))[0])]
        if (height, width) != (near.height, near.width):
            raise ValueError(
                f"--size={size} is none of the {len(buckets)} sizes that this run trained in; the size with the nearest "
                f"ratio is {near.height}x{near.width}"
            )
        return near

    def sheet(self, host: Host, sources: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """As of Sampling, the caption above each row."""
        return super().sheet(host, sources, samples, titles=list(host["caption"]))


@dataclasses.dataclass(frozen=True)
class TextToImage(denoising.Denoising):
    """The T2I task.

    tokenizer: of the text encoder; None where shapes alone are wanted. buckets: the sizes of images, of which a batch has one;
    empty if all are square. With buckets the condition has (height, width, ratio): of the original image and its bucket in
    training, of the bucket in sampling.
    """

    name: ClassVar[str] = "t2i"
    sample_type: ClassVar[str] = "captioned"
    sampling_class: ClassVar[type[Sampling]] = CaptionSampling
    tokenizer: Any = dataclasses.field(compare=False)
    buckets: tuple[aspect.Bucket, ...] = ()

    @classmethod
    def build(cls, settings: config.Settings, place: encoders.Placement | None) -> tuple[TextToImage, dict[str, Any]]:
        if settings.encoder.kind not in config.TEXT_KINDS:
            raise ValueError(
                f"config.encoder.kind={settings.encoder.kind} reads no captions: set it to {' or '.join(config.TEXT_KINDS)}"
            )
        encoder, params = encoders.make_text_encoder(settings.encoder, place, settings.model.dtype)
        shapes_only = place is not None and place.shapes_only  # and no caption is read
        tokenizer = None if shapes_only else encoders.make_tokenizer(settings.encoder, encoder)
        data = settings.data
        buckets = aspect.table(data) if data.has_buckets else ()
        fields = {"tokenizer": tokenizer, "buckets": buckets}
        network = {"vector_kind": "size" if buckets else "linear"}
        task, frozen = denoising.make(cls, settings, place, encoder, params, network=network, **fields)
        patch = data.image_size // task.latent_shape[0] * settings.model.patch_size
        if any(side % patch for bucket in buckets for side in (bucket.height, bucket.width)):
            raise ValueError(
                f"config.data.aspect_ratios={data.aspect_ratios} at {data.image_size} px gives sides that do not divide into "
                f"patches of {patch} px: change config.model.patch_size"
            )
        return task, frozen

    @property
    def host(self) -> Callable:
        return functools.partial(tokenize, self.tokenizer, self.encoder.settings.max_tokens)

    def handoff(self) -> Handoff:
        """From a prior of another condition, and without sizes."""
        return super().handoff() | Handoff(new=("vector/*",), refit=("tokens/fc1/*", "null/tokens"))

    def condition(self, frozen: Any, batch: Batch) -> Condition:
        if "feature" in batch:
            tokens = batch["feature"].astype(jnp.float32)
        else:
            tokens = self.encoder.apply(frozen["encoder"], batch["tokens"], batch["token_mask"])
        mask = None if self.encoder.settings.output == "pooled" else batch["token_mask"]
        return Condition(tokens, mask, vector=batch["size"] if self.buckets else None)

    def shuffled(self, condition: Condition) -> Condition:
        """Captions exchanged; sizes belong to the images."""
        return dataclasses.replace(super().shuffled(condition), vector=condition.vector)

    @property
    def ragged(self) -> dict[str, str]:
        if self.encoder.settings.output == "pooled":
            return {}
        return {f"feature{kind}": f"token_mask{kind}" for kind in KINDS}

    def encode_condition(self, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
        apply = functools.partial(self.encoder.apply, frozen["encoder"])
        return {f"feature{kind}": apply(batch[f"tokens{kind}"], batch[f"token_mask{kind}"]) for kind in KINDS}


TASK = TextToImage
