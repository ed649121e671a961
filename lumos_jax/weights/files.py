"""Weights as people have them: a directory, one file, or a hub id -> state dict and config.json.

A file is .safetensors, .npz, or PyTorch's (.pth, .pt, .bin, .tar, .ckpt; `torch_files`). Where a directory or a hub repository
has safetensors, these are taken and PyTorch's files are neither fetched nor opened.
"""

from __future__ import annotations

import json
import pathlib
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lumos_jax import fileio
from lumos_jax.weights import torch_files

_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".tar", ".ckpt")
_WANTED = ("config.json", "*.safetensors", "*.safetensors.index.json")
_WANTED_TORCH = ("config.json", "pytorch_model*.bin*", "diffusion_pytorch_model*.bin*")
_WANTED_RELEASE = ("*.pth", "*.safetensors", "transformer/*.safetensors", "transformer/config.json")


def locate(weights: str, field: str, wanted: Sequence[str] = _WANTED) -> pathlib.Path:
    """The local path of `weights`, fetched from the hub if it is a hub id: its files that match one of `wanted`.
    Raises ValueError: there is no such file, or the hub cannot be reached; says how to give a local path."""
    path = pathlib.Path(weights).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights) or path.suffix in (".pkl", *_SUFFIXES):
        raise ValueError(f"{field}={weights!r}: no such file or directory")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(weights, allow_patterns=list(wanted)))
        if wanted is _WANTED and not any(folder.glob("*.safetensors")):
            folder = pathlib.Path(huggingface_hub.snapshot_download(weights, allow_patterns=list(_WANTED_TORCH)))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{field}={weights!r} is no local path, and as a hub id it cannot be fetched ({type(error).__name__}). Without a "
            f"network, fetch it elsewhere (huggingface-cli download {weights} --local-dir DIR) and set {field}=DIR"
        ) from error


def read(path: pathlib.Path, stem: str, shapes_only: bool = False) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads a state dict, and the config.json in the directory if `path` is one.

    Args:
      path: directory, or a file with one of _SUFFIXES; with `shapes_only` also a .json of name -> shape.
      stem: the usual file name in a directory, without ending ("model", "diffusion_pytorch_model").
      shapes_only: read no arrays: name -> shape.

    Raises:
      ValueError: nothing readable there, a damaged file, or one that `torch_files` refuses.
    """
    if not path.is_dir():
        return read_file(path, shapes_only), None
    if not (path / "config.json").exists():
        raise ValueError(f"{path} has no config.json, which says the network's shape")
    state = {}
    for file in _shards(path, stem):
        state |= read_file(file, shapes_only)
    return state, read_json(path / "config.json")


def _shards(path: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """The files of a directory's state dict: one, or those that an index lists."""
    torch_stem = stem if stem.endswith("pytorch_model") else f"pytorch_{stem}"
    choices = (f"{stem}.safetensors", f"{torch_stem}.bin")
    for name in choices:
        index = path / f"{name}.index.json"
        if (path / name).exists():
            return [path / name]
        if not index.exists():
            continue
        shard_of = read_json(index).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise ValueError(f"{index} has no weight_map, which says the file of each array")
        shards = sorted(set(shard_of.values()))
        if missing := [shard for shard in shards if not (path / shard).exists()]:
            raise ValueError(f"{path} lacks {', '.join(missing)}, which {index.name} lists")
        return [path / shard for shard in shards]
    raise ValueError(f"{path} has none of {', '.join(f'{name}, {name}.index.json' for name in choices)}")


def read_file(path: pathlib.Path, shapes_only: bool = False, prefer: Sequence[str] = ()) -> dict[str, Any]:
    """One file's state dict; arguments and errors as of `read`, `prefer` as of `torch_files.load`."""
    if path.suffix == ".json" and shapes_only:
        try:
            return {name: tuple(map(int, shape)) for name, shape in read_json(path).items()}
        except TypeError:
            raise ValueError(f"{path} does not map names to shapes, as lists of whole numbers") from None
    if path.suffix not in _SUFFIXES:
        kinds = ", ".join(_SUFFIXES)
        raise ValueError(f"{path}: weights are a directory or a {kinds} file, not {path.suffix or 'this'}")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    try:  # PyTorch's are views of the mapped file: shapes alone cost nothing
        state = readers[path.suffix](path) if path.suffix in readers else torch_files.load(path, prefer)
    except OSError as error:
        raise fileio.failure(error, f"{path} cannot be read: {error}") from error
    return {name: tuple(value.shape) for name, value in state.items()} if shapes_only else state


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise fileio.failure(error, f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not names and what they stand for")
    return found


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, cut short or no .npz of plain arrays: {error}") from error


def _read_safetensors(path: pathlib.Path) -> dict[str, Lazy]:
    import safetensors

    try:
        file = safetensors.safe_open(path, "numpy")
        return {name: Lazy(file, name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


class Lazy:
    """An array of a safetensors file that is read at each conversion to NumPy, and not kept."""

    def __init__(self, file: Any, name: str):
        self._file, self._name, self.shape = file, name, tuple(file.get_slice(name).get_shape())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._file.get_tensor(self._name), dtype)


def save_safetensors(state: Mapping[str, np.ndarray], path: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """Writes arrays by name, and what the file says about itself."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode  # as the umask says; the library makes a new file that only its owner can read
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path, dict(metadata))
    path.chmod(mode)


def read_release(
    source: str, field: str, shapes_only: bool = False
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """A state dict that is alone in its file or directory, a safetensors file's metadata, and the config.json beside it.

    Of a PyTorch training checkpoint the EMA is taken, which is what priors sample with.

    Args:
      source: a file as `read` takes it, a directory that holds one (diffusers' `transformer/` is searched), or a hub id.
      field: the setting it is from, for messages.

    Raises:
      ValueError: there is no such file, or several; as `locate` and `read`.
    """
    import safetensors

    path = locate(source, field, _WANTED_RELEASE)
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        found = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:5])
            raise ValueError(f"{field}={source!r} holds {len(found)} files of weights ({names}); name the one to read")
        (path,) = found
    state = read_file(path, shapes_only, torch_files.EMA_KEYS)
    metadata, beside = {}, path.with_name("config.json")
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    return state, metadata, read_json(beside) if beside.exists() else {}
