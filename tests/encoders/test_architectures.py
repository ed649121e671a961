import jax
import numpy as np
import pytest

from lumos_jax import config, encoders
from lumos_jax.encoders import frozen


class Shapes:
    """A placement that keeps shapes."""

    shapes_only = True

    def __call__(self, path, array):
        return array

    def gather(self, tree):
        return tree


def size_of(tree):
    leaves = jax.tree.leaves(tree)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def test_networks_of_the_hub_are_known_without_their_weights():
    """Numbers of parameters as their authors publish them."""
    encoder, params = encoders.make_encoder(config.Encoder(), Shapes())
    assert (encoder.tokens, encoder.dim, size_of(params)) == (1, 768, 85_798_656)  # DINO ViT-B/16
    autoencoder, params = encoders.make_autoencoder(config.Autoencoder(), Shapes())
    assert (autoencoder.latent_shape(256), size_of(params)) == ((32, 32, 4), 83_653_863)  # Stable Diffusion's
    t5 = config.Encoder(kind="t5", weights="google/t5-v1_1-xxl", output="all", normalize="none")
    encoder, params = encoders.make_text_encoder(t5, Shapes(), "bfloat16")
    assert (encoder.tokens, encoder.dim, size_of(params)) == (120, 4096, 4_762_310_656)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("bfloat16")}


def test_shapes_are_those_of_the_weights(tmp_path):
    """Of random weights, and of weights in a file, which are read."""
    small = config.Encoder(weights="random:0", size="32x2x2/8")
    made, params = encoders.make_encoder(small)
    planned, shapes = encoders.make_encoder(small, Shapes())
    assert planned.vit == made.vit
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), params)
    with pytest.raises(ValueError, match="no such file"):
        encoders.make_encoder(config.Encoder(weights=str(tmp_path / "absent.safetensors")), Shapes())


def test_only_a_network_of_the_right_kind_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for kind, place in (("autoencoder", Shapes()), ("image-encoder", None)):
        with pytest.raises(ValueError, match="cannot be fetched"):
            frozen.load(kind, "facebook/dino-vitb16", place=place)
