"""Files of reference statistics: ours, and those of other packages."""

import dataclasses
import pickle

import numpy as np
import pytest

from lumos_jax.evaluation import references
from lumos_jax.evaluation.references import Reference


@dataclasses.dataclass
class Network:
    """What statistics are checked against, as `features.open_network` gives it."""

    name: str = "scene_vit"
    dim: int = 6
    sha256: str = "ab12"
    protocol: dict = dataclasses.field(default_factory=lambda: {"resize": "squash 32 bicubic", "layer": "cls"})


def make(**changed) -> Reference:
    features = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    network = Network()
    images = {"source": "scenes", "image_size": 32, "codec": "none", "crop": "center", "list_digest": "77"}
    values = {
        "mean": features.mean(0, dtype=np.float64), "covariance": np.cov(features, rowvar=False), "num": 50,
        "network": network.name, "network_sha256": network.sha256, "protocol": network.protocol, "images": images,
        "features": features,
    }  # fmt: skip
    return Reference(**{**values, **changed})


def test_own_files_are_read_as_written(tmp_path):
    path, written = tmp_path / "ref.npz", make()
    written.save(path)
    found = references.read(path, "scene_vit")
    assert found.check(Network()) == []
    for field in ("mean", "covariance", "features"):
        np.testing.assert_array_equal(getattr(found, field), getattr(written, field))
    assert (found.num, found.ddof, found.images) == (50, 1, written.images)
    np.testing.assert_allclose(found.root @ found.root.T, found.covariance, atol=1e-12)
    assert references.read(path, "inception") is None
    with np.load(path, allow_pickle=False) as file:  # as other packages, and people, look at it
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert str(file["resize"]) == "squash 32 bicubic"
        assert str(file["codec"]) == "none"


@pytest.mark.parametrize(
    ("network", "field"),
    [
        (Network(sha256="cd34"), "network_sha256"),
        (Network(protocol={"resize": "squash 64 bicubic", "layer": "cls"}), "resize"),
        (Network(protocol={"resize": "squash 32 bicubic", "layer": "cls", "crop": "center square"}), "crop"),
        (Network(name="vgg16"), "network scene_vit"),
    ],
)
def test_statistics_of_other_features_are_refused(network, field):
    with pytest.raises(ValueError, match=f"{field}"):
        make(path="ref.npz").check(network)


@pytest.mark.parametrize("layout", ["pytorch-fid", "adm"])
def test_npz_of_others(tmp_path, layout):
    arrays = {"mu": make().mean, "sigma": make().covariance}
    if layout == "adm":
        arrays |= {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)}
    np.savez(tmp_path / "other.npz", **arrays)
    found = references.read(tmp_path / "other.npz", "inception")
    np.testing.assert_array_equal(found.covariance, arrays["sigma"])
    (warning,) = found.check(Network("inception"))
    assert "neither weights nor resize" in warning
    assert references.read(tmp_path / "other.npz", "dinov2") is None
    with pytest.raises(ValueError, match="kid needs features"):
        found.all_features("kid")


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_of_edm2(tmp_path, protocol):
    sets = {"fid": {"mu": np.zeros(6), "sigma": np.eye(6)}, "fd_dinov2": {"mu": np.ones(4), "sigma": 2 * np.eye(4)}}
    path = tmp_path / "edm2.pkl"
    path.write_bytes(pickle.dumps({"num_images": 50_000, **sets}, protocol))
    found = references.read(path, "dinov2")
    assert (found.num, found.mean.tolist(), found.network) == (50_000, [1, 1, 1, 1], "dinov2")
    assert references.read(path, "inception").covariance[0, 0] == 1
    assert references.read(path, "vgg16") is None


class Runs:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path, capsys):
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"fid": Runs()}))
    with pytest.raises(ValueError, match=r"asks for builtins\.print"):
        references.read(path, "inception")
    assert not capsys.readouterr().out


def test_damaged_files(tmp_path):
    path = tmp_path / "ref.npz"
    with pytest.raises(ValueError, match="cannot be read"):
        references.read(path, "inception")
    np.savez(path, mean=np.zeros(3))
    with pytest.raises(ValueError, match="and not mu and sigma"):
        references.read(path, "inception")
    with pytest.raises(ValueError, match="NaN"):
        make(mean=np.full(6, np.nan))
    with pytest.raises(ValueError, match="do not match"):
        make(mean=np.zeros(5))
