"""Weights as people have them: a directory, a .safetensors or .npz file, or a hub id -> state dict and config.

Pickles (.pth, .bin, .pt) can run code when they are opened, so they are refused with the way to convert them.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.numpy import load_file

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
_WANTED = ("config.json", "*.safetensors", "*.safetensors.index.json")


def locate(weights: str, field: str, wanted: Sequence[str] = _WANTED) -> pathlib.Path:
    """The local path of `weights`, fetched from the hub if it is a hub id: its files that match one of `wanted`.

    Raises:
      ValueError: there is no such file, or the hub cannot be reached; says how to give a local path.
    """
    path = pathlib.Path(weights).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights) or path.suffix in (".safetensors", ".npz", *_PICKLES):
        raise ValueError(f"{field}={weights!r}: no such file or directory")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(weights, allow_patterns=list(wanted)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{field}={weights!r} is no local path, and as a hub id it cannot be fetched ({type(error).__name__}). Without a "
            f"network, fetch it elsewhere (huggingface-cli download {weights} --local-dir DIR) and set {field}=DIR"
        ) from error


def read(path: pathlib.Path, stem: str) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Reads a state dict, and the config.json beside it if `path` is a directory.

    Args:
      path: directory, .safetensors or .npz file.
      stem: the usual file name in a directory, without ending ("model", "diffusion_pytorch_model").

    Raises:
      ValueError: nothing readable there, a damaged file, or a pickle.
    """
    if path.is_dir():
        return _read_directory(path, stem)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays), None
    if path.suffix == ".safetensors":
        return _read_safetensors(path), None
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path} is a pickle, which could run code when opened; convert it once with PyTorch: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    raise ValueError(f"{path}: weights are a directory, a .safetensors or an .npz file, not {path.suffix or 'this'}")


def _read_directory(path: pathlib.Path, stem: str):
    config_path = path / "config.json"
    if not config_path.exists():
        raise ValueError(f"{path} has no config.json, which says the network's shape")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if single.exists():
        return _read_safetensors(single), config
    if index.exists():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [shard for shard in shards if not (path / shard).exists()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}, which {index.name} lists")
        state: dict[str, np.ndarray] = {}
        for shard in shards:
            state.update(_read_safetensors(path / shard))
        return state, config
    pickles = [p.name for p in path.iterdir() if p.suffix in _PICKLES]
    if pickles:
        raise ValueError(f"{path} has only {', '.join(pickles)}: pickles are not read; fetch or make {single.name}")
    raise ValueError(f"{path} has neither {single.name} nor {index.name}")


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def content_hash(flat: Mapping[str, np.ndarray]) -> str:
    """A short hash of names, shapes and values: what makes two networks the same."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(flat):
        array = np.ascontiguousarray(flat[path])
        digest.update(f"{path}{array.shape}{array.dtype}".encode())
        digest.update(array.view(np.uint8).reshape(-1) if array.size else b"")
    return digest.hexdigest()
