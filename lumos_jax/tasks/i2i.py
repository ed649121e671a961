"""Image to image: reproduce an image from the frozen self-supervised feature of that same image (paper section 3.1)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from lumos_jax.models import Condition
from lumos_jax.tasks import denoising
from lumos_jax.tasks.base import Batch
from lumos_jax.tasks.sampling import FeatureSampling, Host, Sampling


class ImageToImageSampling(FeatureSampling):
    """Rows of an image and samples of its feature."""

    def truth(self, host: Host) -> np.ndarray | None:
        """The image itself, which the prior reproduces from its features; None where a cache keeps no images."""
        return host.get("image")


@dataclasses.dataclass(frozen=True)
class ImageToImage(denoising.Denoising):
    """The I2I task; batches hold `image`, or `latent` and `feature` of a cache."""

    name: ClassVar[str] = "i2i"
    sampling_class: ClassVar[type[Sampling]] = ImageToImageSampling

    def condition(self, frozen: Any, batch: Batch) -> Condition:
        return Condition(tokens=self.image_features(frozen, batch))


TASK = ImageToImage
