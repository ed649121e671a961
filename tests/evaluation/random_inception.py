"""Seeded random weights and images for FID's Inception, and what Keras makes of them.

`python -m tests.evaluation.random_inception` writes tests/goldens/inception.npz; it needs TensorFlow. The network there is
tf.keras.applications.InceptionV3 with the last average pool replaced by a maximum pool, as in FID's.
"""

import pathlib
import re

import numpy as np

GOLDEN = pathlib.Path(__file__).parent.parent / "goldens" / "inception.npz"


def images() -> np.ndarray:
    """uint8 (2, 299, 299, 3): noise on gradients, so that every frequency is there."""
    rng = np.random.default_rng(1)
    ramp = np.add.outer(np.arange(299), np.arange(299))[None, :, :, None] / 598 * 128
    return (ramp + rng.uniform(0, 127, (2, 299, 299, 3))).astype(np.uint8)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Path -> float32 array: kernels that keep the variance through ReLUs, and norms away from the identity."""
    made = {}
    for seed, (path, shape) in enumerate(sorted(shapes.items())):
        rng, leaf = np.random.default_rng(seed), path.rpartition("/")[2]
        if leaf == "kernel":
            made[path] = rng.standard_normal(shape, np.float32) * np.float32((2 / np.prod(shape[:-1])) ** 0.5)
        else:
            low, high = (0.5, 1.5) if leaf in ("scale", "variance") else (-0.2, 0.2)
            made[path] = rng.uniform(low, high, shape).astype(np.float32)
    return made


def keras_features(shapes: dict[str, tuple[int, ...]], order: list[str]) -> np.ndarray:
    """(2, 2048): Keras's features of `images`. `order`: our convolutions in the order in which Keras makes its own."""
    import keras

    last = "average_pooling2d_8"

    def replaced(layer):
        if layer.name == last:
            return keras.layers.MaxPooling2D(3, strides=1, padding="same", name=last)
        return layer.__class__.from_config(layer.get_config())

    plain = keras.applications.InceptionV3(weights=None, include_top=False, input_shape=(299, 299, 3), pooling="avg")
    model = keras.models.clone_model(plain, clone_function=replaced)
    ours = weights(shapes)
    layers = (_in_order_of_creation(model, kind) for kind in (keras.layers.Conv2D, keras.layers.BatchNormalization))
    for convolution, norm, path in zip(*layers, order, strict=True):
        scale, bias, mean, variance = (ours[f"{path}/{leaf}"] for leaf in ("scale", "bias", "mean", "variance"))
        convolution.set_weights([ours[f"{path}/kernel"] * scale])  # Keras's norms have no scale
        norm.set_weights([bias, mean * scale, variance])
    return model.predict((images() - 128.0) / 128.0, verbose=0)


def _in_order_of_creation(model, kind) -> list:
    """Keras numbers layers: conv2d, conv2d_1, conv2d_2, ..."""
    numbers = {
        layer: re.search(r"_(\d+)$", layer.name.replace("batch_", ""))
        for layer in model.layers
        if isinstance(layer, kind)
    }
    return sorted(numbers, key=lambda layer: int(numbers[layer][1]) if numbers[layer] else 0)


if __name__ == "__main__":
    from lumos_jax.evaluation.networks import inception

    convolutions = [name.removesuffix("/kernel") for name in inception.shapes() if name.endswith("/kernel")]
    features = keras_features(inception.shapes(), convolutions[1:])  # the first is the classifier
    np.savez_compressed(GOLDEN, features=features.astype(np.float32))
    print(features.shape, features.mean(), features.std())
