"""Features and scores of single images, with the weights that packages carry."""

import json

import jax
import numpy as np
import pytest

from lumos_jax.evaluation import features

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 40, 48, 3), np.uint8)


def test_features_depend_neither_on_the_batch_nor_on_its_padding():
    network = features.open_network("scene_vit", rows=1)  # 8 devices
    assert (network.dim, network.kind, network.batch_size) == (128, "image", 8)
    assert json.loads(json.dumps(network.protocol)) == network.protocol
    whole = network(IMAGES)
    assert whole.shape == (20, 128)
    assert whole.dtype == np.float32
    assert np.ptp(whole, axis=0).min() > 0.01
    parts = list(network.stream(np.split(IMAGES, [3, 3, 12])))
    assert [len(part) for part in parts] == [3, 0, 9, 8]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    again = features.open_network("scene_vit", rows=64, devices=jax.devices()[:1])
    assert again.sha256 == network.sha256
    np.testing.assert_allclose(again(IMAGES), whole, rtol=1e-5, atol=1e-5)


def test_what_is_no_batch_of_images_is_refused():
    network = features.open_network("scene_vit", rows=1)
    for wrong in (IMAGES / 255, IMAGES[0], IMAGES[..., :1], IMAGES[None]):
        with pytest.raises(ValueError, match=r"give uint8 \(B, H, W, 3\)"):
            network(wrong)
    with pytest.raises(ValueError, match=r"choose .*vgg16"):
        features.open_network("vgg19")
    with pytest.raises(ValueError, match="no protocol '128': choose 64, 224"):
        features.open_network("vgg16", protocol="128")


@pytest.mark.parametrize(("name", "official"), [("dinov2", "dinov2_vitl14_pretrain.pth"), ("clip", "patch14-336")])
def test_networks_that_nothing_carries_name_their_file(name, official):
    with pytest.raises(ValueError, match=f"--network-weights={name}=PATH.*{official}"):
        features.open_network(name)
    with pytest.raises(ValueError, match="no such file"):
        features.open_network(name, weights="missing/weights.pth")


@pytest.mark.parametrize(("net", "known"), [("alex", 0.81395), ("vgg", 0.45384)])
def test_lpips_of_black_and_white_is_the_original_implementation_s(net, known):
    black = np.zeros((1, 64, 64, 3), np.uint8)
    lpips = features.lpips(net=net, rows=1)
    np.testing.assert_allclose(lpips(black, black + np.uint8(255)), [known], atol=1e-5)
    np.testing.assert_allclose(lpips(black, black), [0], atol=1e-7)
    with pytest.raises(ValueError, match="one shape"):
        lpips(black, black[:, :32])
