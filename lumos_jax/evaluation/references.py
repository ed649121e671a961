"""Statistics of a reference set of images or clips, in files that this and other packages read.

An .npz file holds `mu` (D,) and `sigma` (D, D) float64, which pytorch-fid, clean-fid, ADM and EDM read too, and what must agree
before samples are compared with it:

    num, ddof             images, and what their covariance was divided by: num - ddof
    network, network_sha256, protocol (JSON: layer, resize, crop ...)    of the features
    layer, resize, crop   of the protocol, as strings of their own
    codec, image_size, list_digest, source (JSON)                        of the images
    features              float32 (n, D) of all images, or of n evenly spaced ones: KID, CMMD, precision and recall need them

Of others' files these are read: ADM's .npz (mu, sigma, and mu_s, sigma_s of spatial features), pytorch-fid's and EDM's (mu,
sigma), EDM2's .pkl ({"num_images", "fid": {"mu", "sigma"}, "fd_dinov2": ...}). They tell no weights and no resize, which is
warned of.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from lumos_jax import fileio
from lumos_jax.evaluation import pickles

MOST_FEATURES = 10_000  # kept in a file
_EDM2 = {"fid": "inception", "fd_dinov2": "dinov2"}
_PARTS = ("layer", "resize", "crop")  # of a protocol


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of a reference set.

    Attributes:
      mean, covariance: (D,), (D, D) float64.
      num: images or clips; 0 where the file does not tell.
      network, network_sha256, protocol: of the features; a hash is empty, and a protocol None, where the file does not tell.
      ddof: the covariance was divided by num - ddof.
      images: of the set: source, codec, image_size, list_digest, as far as known.
      features: float32 (n, D), or None.
      path: of the file.
    """

    mean: np.ndarray
    covariance: np.ndarray
    num: int
    network: str
    network_sha256: str = ""
    protocol: Mapping[str, Any] | None = None
    ddof: int = 1
    images: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    features: np.ndarray | None = None
    path: str = "the reference"

    def __post_init__(self):
        dim = len(np.atleast_1d(self.mean))
        if np.shape(self.mean) != (dim,) or np.shape(self.covariance) != (dim, dim):
            raise ValueError(
                f"{self.path}: mu {np.shape(self.mean)} and sigma {np.shape(self.covariance)} do not match"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError(f"{self.path}: mu or sigma holds NaN or infinity")

    @functools.cached_property
    def root(self) -> np.ndarray:
        """R (D, r) with R R^T the covariance, r its rank."""
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    def all_features(self, metric: str) -> np.ndarray:
        """Raises ValueError if the file has none; `metric` says what needs them."""
        if self.features is None:
            raise ValueError(
                f"{metric} needs features of the reference images, and {self.path} has mu and sigma alone: make it with "
                "`lumos_jax.evaluate statistics`"
            )
        return self.features

    def save(self, path: str | pathlib.Path) -> None:
        protocol = dict(self.protocol or {})
        arrays = {
            "mu": self.mean, "sigma": self.covariance, "num": self.num, "ddof": self.ddof, "network": self.network,
            "network_sha256": self.network_sha256, "protocol": json.dumps(protocol),
        }  # fmt: skip
        arrays |= {name: str(protocol.get(name, "")) for name in _PARTS}
        arrays |= {name: str(self.images.get(name, "")) for name in ("codec", "image_size", "list_digest")}
        arrays["source"] = json.dumps(dict(self.images))
        if self.features is not None:
            arrays["features"] = np.asarray(self.features, np.float32)
        with fileio.replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()})

    def check(self, network: Any) -> list[str]:
        """Warnings about features of `network` (a features.FeatureNetwork) compared with these statistics.

        Raises:
          ValueError: they are of another network, other weights, or another resize, crop, layer ...; names the field.
        """
        if self.network != network.name or len(self.mean) != network.dim:
            raise ValueError(
                f"{self.path} has statistics of network {self.network} ({len(self.mean)} features), not of {network.name} "
                f"({network.dim})"
            )
        if self.protocol is None:
            return [
                f"{self.path} tells neither weights nor resize: they are taken to be those of {network.name}, "
                f"{json.dumps(network.protocol)}"
            ]
        found = {"network_sha256": self.network_sha256, **self.protocol}
        wanted = {"network_sha256": network.sha256, **json.loads(json.dumps(network.protocol))}
        for field in {**wanted, **found}:
            if found.get(field) != wanted.get(field):
                raise ValueError(
                    f"{self.path} cannot be the reference: its {field} is {found.get(field)!r}, and that of the samples' "
                    f"features is {wanted.get(field)!r}; make it again with `lumos_jax.evaluate statistics`"
                )
        return []


def read(path: str | pathlib.Path, network: str) -> Reference | None:
    """The statistics that a file has for features of a network; None if they are another network's.

    Raises:
      ValueError: the file cannot be read, or is of no known layout.
      OSError: storage fails.
    """
    try:
        data = pathlib.Path(path).expanduser()
        if data.suffix == ".pkl":
            return _read_edm2(pickles.read_arrays(data.read_bytes()), str(path), network)
        with np.load(data, allow_pickle=False) as file:
            # ADM keeps all features of its reference images (arr_0: the images themselves), gigabytes that are not needed.
            arrays = {name: file[name] for name in file.files if not name.startswith("arr_")}
    except OSError as error:
        raise fileio.failure(error, f"{path} cannot be read: {error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file of statistics: {error}") from error
    if not {"mu", "sigma"} <= set(arrays):
        raise ValueError(
            f"{path} is no file of statistics: it has {', '.join(arrays) or 'nothing'}, and not mu and sigma"
        )
    if "network" not in arrays:  # of pytorch-fid, clean-fid, ADM or EDM, all of FID's Inception
        mean, covariance = (np.float64(arrays[name]) for name in ("mu", "sigma"))
        return Reference(mean, covariance, 0, "inception", path=str(path)) if network == "inception" else None
    if str(arrays["network"]) != network:
        return None
    return Reference(
        arrays["mu"], arrays["sigma"], int(arrays["num"]), network, str(arrays["network_sha256"]),
        json.loads(str(arrays["protocol"])), int(arrays["ddof"]), json.loads(str(arrays["source"])),
        arrays.get("features"), str(path),
    )  # fmt: skip


def _read_edm2(content: Any, path: str, network: str) -> Reference | None:
    known = {ours: content.get(name) for name, ours in _EDM2.items()} if isinstance(content, dict) else {}
    if not any(known.values()):
        raise ValueError(f"it holds none of {', '.join(_EDM2)}")
    if not known.get(network):
        return None
    mean, covariance = (np.float64(known[network][name]) for name in ("mu", "sigma"))
    return Reference(mean, covariance, int(content.get("num_images", 0)), network, path=path)
