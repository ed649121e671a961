"""Weights as people have them: a directory, one file, or a hub id -> state dict and config.

A file is .safetensors, .npz, or PyTorch's (.pth, .pt, .bin, .ckpt), which `torch_files` reads without running what is in it.
Where a directory or a hub repository has safetensors, these are taken and PyTorch's files are neither fetched nor opened.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lumos_jax.weights import torch_files

_TORCH = (".pth", ".pt", ".bin", ".tar", ".ckpt")
_WANTED = ("config.json", "*.safetensors", "*.safetensors.index.json")
_WANTED_ELSE = tuple(
    stem + end for stem in ("pytorch_model", "diffusion_pytorch_model") for end in ("*.bin", ".bin.index.json")
)
_WANTED_RELEASE = ("*.pth", "*.safetensors", "transformer/*.safetensors", "transformer/config.json")


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


def read(
    path: pathlib.Path, stem: str, shapes_only: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Reads a state dict, and the config.json beside it if `path` is a directory.

    Args:
      path: directory, or a .safetensors, .npz, .pth, .pt, .bin or .ckpt file; with `shapes_only` also a .json of name -> shape.
      stem: the usual file name in a directory, without ending ("model", "diffusion_pytorch_model").
      shapes_only: read no arrays: name -> shape.

    Raises:
      ValueError: nothing readable there, a damaged file, or one that `torch_files` refuses.
    """
    try:
        return _read(path, stem, shapes_only)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read(path: pathlib.Path, stem: str, shapes_only: bool):
    if path.is_dir():
        return _read_directory(path, stem, shapes_only)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, shapes_only), None
    if path.suffix == ".npz":
        return _shapes_if(shapes_only, _read_npz(path)), None
    if path.suffix in _TORCH:
        return _read_torch(path, shapes_only), None
    if path.suffix == ".json" and shapes_only:
        try:
            return {name: tuple(map(int, shape)) for name, shape in _json(path).items()}, None
        except TypeError:
            raise ValueError(f"{path} does not map names to shapes, as lists of whole numbers") from None
    raise ValueError(
        f"{path}: weights are a directory or a .safetensors, .npz, {', '.join(_TORCH[:-1])} or {_TORCH[-1]} file, not "
        f"{path.suffix or 'this'}"
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
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


def _shapes_if(shapes_only: bool, state: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: value.shape for name, value in state.items()} if shapes_only else state


def _read_torch(path: pathlib.Path, shapes_only: bool) -> dict[str, Any]:
    return _shapes_if(shapes_only, torch_files.load(path))  # views of the mapped file: shapes alone cost nothing


def _read_directory(path: pathlib.Path, stem: str, shapes_only: bool):
    config_path = path / "config.json"
    if not config_path.exists():
        raise ValueError(f"{path} has no config.json, which says the network's shape")
    config = _json(config_path)
    torch_stem = stem if stem.endswith("pytorch_model") else f"pytorch_{stem}"
    choices = [(f"{stem}.safetensors", _read_safetensors), (f"{torch_stem}.bin", _read_torch)]
    for name, read_file in choices:
        if (path / name).exists():
            return read_file(path / name, shapes_only), config
        if (path / f"{name}.index.json").exists():
            return _read_shards(path, path / f"{name}.index.json", read_file, shapes_only), config
    raise ValueError(f"{path} has none of {', '.join(f'{name}, {name}.index.json' for name, _ in choices)}")


def _read_shards(path: pathlib.Path, index: pathlib.Path, read_file: Callable, shapes_only: bool) -> dict[str, Any]:
    told = _json(index).get("weight_map")
    if not isinstance(told, dict) or not all(isinstance(shard, str) for shard in told.values()):
        raise ValueError(f"{index} has no weight_map, which says the file of each array")
    shards = sorted(set(told.values()))
    missing = [shard for shard in shards if not (path / shard).exists()]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which {index.name} lists")
    state: dict[str, Any] = {}
    for shard in shards:
        state.update(read_file(path / shard, shapes_only))
    return state


def _read_safetensors(path: pathlib.Path, shapes_only: bool = False) -> dict[str, Any]:
    try:
        file = safetensors.safe_open(path, "numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes if shapes_only else {name: Lazy(file, name, shape) for name, shape in shapes.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


class Lazy:
    """An array of a safetensors file that is read whenever NumPy asks for it, and not kept."""

    def __init__(self, file: Any, name: str, shape: tuple[int, ...]):
        self._file, self._name, self.shape = file, name, shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._file.get_tensor(self._name), dtype)


def save_safetensors(state: Mapping[str, np.ndarray], path: pathlib.Path, metadata: Mapping[str, str]) -> None:
    """Writes arrays by name, and what the file says about itself; readable as the umask says (the library's mode is 0600)."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, path, dict(metadata))
    path.chmod(mode)


def read_release(
    source: str, field: str, shapes_only: bool = False
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any] | None]:
    """A state dict that is alone in its file or directory, what a safetensors file says about itself, and its config.json.

    Args:
      source: a file as `read` takes it, a directory that holds one (diffusers' `transformer/` is looked into), or a hub id.
      field: the setting it is from, for messages.
      shapes_only: as in `read`.

    Raises:
      ValueError: there is no such file, or several; as `locate` and `read`.
    """
    path = locate(source, field, _WANTED_RELEASE)
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        found = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".npz", *_TORCH))
        if len(found) != 1:
            raise ValueError(
                f"{field}={source!r} holds {len(found)} files of weights ({', '.join(p.name for p in found[:5])}); name the "
                "one to read"
            )
        (path,) = found
    beside = path.with_name("config.json")
    described = _json(beside) if beside.exists() else None
    if path.suffix in _TORCH:  # of a training checkpoint the EMA, which is what priors sample with
        state = torch_files.load(path, prefer=torch_files.EMA_KEYS)
        return _shapes_if(shapes_only, state), {}, described
    state, _ = read(path, "", shapes_only)
    if path.suffix != ".safetensors":
        return state, {}, described
    with safetensors.safe_open(path, "numpy") as file:
        return state, file.metadata() or {}, described


def content_hash(flat: Mapping[str, np.ndarray]) -> str:
    """A short hash of names, shapes and values: what makes two networks the same."""
    digests = Digests()
    for path, array in flat.items():
        digests.add(path, array)
    return digests.total()


class Digests:
    """`content_hash` of arrays that come one by one, in any order."""

    def __init__(self):
        self._each: dict[str, str] = {}

    def add(self, path: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        digest = hashlib.blake2b(f"{path}{array.shape}{array.dtype}".encode(), digest_size=8)
        digest.update(array.view(np.uint8).reshape(-1) if array.size else b"")
        self._each[path] = digest.hexdigest()

    def total(self) -> str:
        return hashlib.blake2b(json.dumps(self._each, sort_keys=True).encode(), digest_size=8).hexdigest()
