"""Weights as people have them: a directory, one file, or a hub id -> state dict and config.

A file is .safetensors, .npz, or PyTorch's (.pth, .pt, .bin, .ckpt), which `torch_files` reads without running what is in it.
Where a directory or a hub repository has safetensors, these are taken and PyTorch's files are neither fetched nor opened.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lumos_jax.encoders import torch_files

_TORCH = (".pth", ".pt", ".bin", ".ckpt")
_WANTED = ("config.json", "*.safetensors", "*.safetensors.index.json")
_WANTED_ELSE = tuple(
    stem + end for stem in ("pytorch_model", "diffusion_pytorch_model") for end in ("*.bin", ".bin.index.json")
)


def locate(weights: str, field: str, wanted: Sequence[str] = _WANTED) -> pathlib.Path:
    """The local path of `weights`, fetched from the hub if it is a hub id: its files that match one of `wanted`.

    Raises:
      ValueError: there is no such file, or the hub cannot be reached; says how to give a local path.
    """
    path = pathlib.Path(weights).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights) or path.suffix in (".safetensors", ".npz", ".pkl", *_TORCH):
        raise ValueError(f"{field}={weights!r}: no such file or directory")
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(weights, allow_patterns=list(wanted)))
        if wanted is _WANTED and not any(folder.glob("*.safetensors")):
            patterns = ["config.json", *_WANTED_ELSE]
            folder = pathlib.Path(huggingface_hub.snapshot_download(weights, allow_patterns=patterns))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{field}={weights!r} is no local path, and as a hub id it cannot be fetched ({type(error).__name__}). Without a "
            f"network, fetch it elsewhere (huggingface-cli download {weights} --local-dir DIR) and set {field}=DIR"
        ) from error


def read(path: pathlib.Path, stem: str) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Reads a state dict, and the config.json beside it if `path` is a directory.

    Args:
      path: directory, or a .safetensors, .npz, .pth, .pt, .bin or .ckpt file.
      stem: the usual file name in a directory, without ending ("model", "diffusion_pytorch_model").

    Raises:
      ValueError: nothing readable there, a damaged file, or one that `torch_files` refuses.
    """
    if path.is_dir():
        return _read_directory(path, stem)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays), None
    if path.suffix == ".safetensors":
        return _read_safetensors(path), None
    if path.suffix in _TORCH:
        return torch_files.load(path), None
    raise ValueError(
        f"{path}: weights are a directory or a .safetensors, .npz, {', '.join(_TORCH[:-1])} or {_TORCH[-1]} file, not "
        f"{path.suffix or 'this'}"
    )


def _read_directory(path: pathlib.Path, stem: str):
    config_path = path / "config.json"
    if not config_path.exists():
        raise ValueError(f"{path} has no config.json, which says the network's shape")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    torch_stem = stem if stem.endswith("pytorch_model") else f"pytorch_{stem}"
    choices = [(f"{stem}.safetensors", _read_safetensors), (f"{torch_stem}.bin", torch_files.load)]
    for name, read_file in choices:
        if (path / name).exists():
            return read_file(path / name), config
        if (path / f"{name}.index.json").exists():
            return _read_shards(path, path / f"{name}.index.json", read_file), config
    raise ValueError(f"{path} has none of {', '.join(f'{name}, {name}.index.json' for name, _ in choices)}")


def _read_shards(path: pathlib.Path, index: pathlib.Path, read_file: Callable) -> dict[str, np.ndarray]:
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [shard for shard in shards if not (path / shard).exists()]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which {index.name} lists")
    state: dict[str, np.ndarray] = {}
    for shard in shards:
        state.update(read_file(path / shard))
    return state


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
