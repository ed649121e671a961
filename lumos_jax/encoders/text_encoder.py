"""The frozen text encoder: captions -> token ids and mask, on the host -> condition tokens, on the device."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config
from lumos_jax.encoders import frozen
from lumos_jax.encoders.clip_text import LEGACY_EOS, ClipText
from lumos_jax.encoders.frozen import ON_HOST, Placement
from lumos_jax.encoders.t5 import T5Encoder
from lumos_jax.encoders.vit import SIZES
from lumos_jax.weights import files

SCENES = "scenes"  # config.encoder.tokenizer: the tokenizer of scene captions that comes with the package
SCENE_TOKENIZER = pathlib.Path(__file__).parent.parent / "scenes" / "tokenizer"

_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")  # any of them will do
_TOKENIZER_WANTED = (*_TOKENIZER_FILES, "merges.txt", "config.json", "tokenizer_config.json", "special_tokens_map.json",
                     "added_tokens.json")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text network with its choice of tokens.

    Attributes:
      settings: config.encoder.
      identity: where the weights are from and a hash of them.
      place: how its parameters are laid out over devices.
    """

    network: T5Encoder | ClipText
    settings: config.Encoder
    identity: str
    place: Placement = ON_HOST

    @property
    def tokens(self) -> int:
        """L, condition tokens a text."""
        return 1 if self.settings.output == "pooled" else self.settings.max_tokens

    @property
    def dim(self) -> int:
        """C, features a token."""
        return self.network.projection if self.settings.output == "pooled" else self.network.width

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids (B, max_tokens) and mask (nonzero where a token counts) -> (B, L, C) float32.

        Features are not normalized. At masked positions they mean nothing: whoever attends to them needs the mask too.
        """
        tokens = self.network.apply(params, ids, mask, self.place.gather)
        if self.settings.output == "pooled":
            tokens = self.network.pool(self.place.gather({"projection": params["projection"]}), ids, tokens)[:, None]
        return tokens.astype(jnp.float32)


def make_text_encoder(
    encoder: config.Encoder, place: Placement | None = None, dtype: str = "float32"
) -> tuple[TextEncoder, Any]:
    """The encoder that config.encoder names, and its parameters; `place` and `dtype` as for `frozen.load`.
    Raises ValueError: weights that cannot be found, read or fitted; an output or a length that they do not have."""
    if encoder.kind not in config.TEXT_KINDS:
        raise ValueError(f"config.encoder.kind={encoder.kind!r} reads no text: {' and '.join(config.TEXT_KINDS)} do")
    kind, random = frozen.KIND_OF[encoder.kind], functools.partial(_random_network, encoder)
    network, params, identity = frozen.load(kind, encoder.weights, random=random, dtype=dtype, place=place)
    if encoder.output == "pooled" and not getattr(network, "projection", 0):
        raise ValueError(f"config.encoder.output=pooled: {encoder.weights} has no text_projection; set output=all")
    if isinstance(network, ClipText) and encoder.max_tokens > network.positions:
        raise ValueError(
            f"config.encoder.max_tokens={encoder.max_tokens} exceeds the {network.positions} positions of {encoder.weights}"
        )
    return TextEncoder(network, encoder, identity, place or ON_HOST), params


def _random_network(encoder: config.Encoder) -> T5Encoder | ClipText:
    tokenizer = load_tokenizer(encoder.tokenizer, "config.encoder.tokenizer")
    if encoder.kind == "clip_text":
        return clip_text_of(encoder.size, tokenizer, encoder.max_tokens)
    width, depth, heads = _sides(encoder.size)  # the MLP's share of the width is that of T5 v1.1 XXL
    return T5Encoder(width, depth, heads, width // heads, 5 * width // 2, _vocabulary(tokenizer))


def clip_text_of(size: str, tokenizer: Any, max_tokens: int) -> ClipText:
    """A CLIP text encoder of that size, as config.encoder.size, for the ids of a tokenizer; its projection keeps the width."""
    width, depth, heads = _sides(size)
    eos = tokenizer.eos_token_id
    return ClipText(width, depth, heads, 4 * width, _vocabulary(tokenizer), max_tokens, width, eos)


def _sides(size: str) -> tuple[int, int, int]:
    return config.custom_size(size) or SIZES[size.partition("/")[0]]


def _vocabulary(tokenizer: Any) -> int:
    """Rows of an embedding table: the tokenizer's ids, rounded up to a multiple of 64."""
    return -(-len(tokenizer) // 64) * 64


def make_tokenizer(encoder: config.Encoder, made: TextEncoder) -> Any:
    """The tokenizer that config.encoder names, checked against the network of the encoder `made`, which reads its ids.
    Raises ValueError: there is none, or it has ids that the network does not know."""
    if not encoder.tokenizer and encoder.weights.startswith("random:"):
        raise ValueError(f"config.encoder.tokenizer is empty, and {encoder.weights} has none beside it: set {SCENES!r} "
                         "or a directory")  # fmt: skip
    field = "config.encoder.tokenizer" if encoder.tokenizer else "config.encoder.weights"
    tokenizer, network = load_tokenizer(encoder.tokenizer or encoder.weights, field), made.network
    if len(tokenizer) > network.vocabulary:  # XLA would clamp them to the last row, and say nothing
        raise ValueError(
            f"the tokenizer of {field} has {len(tokenizer)} ids, the network of {encoder.weights} only {network.vocabulary}"
        )
    if encoder.output == "pooled" and network.eos not in (tokenizer.eos_token_id, LEGACY_EOS):
        raise ValueError(
            f"the tokenizer of {field} ends a text with id {tokenizer.eos_token_id}, but {encoder.weights} pools at "
            f"{network.eos}"
        )
    return tokenizer


def load_tokenizer(path: str, field: str) -> Any:
    """A transformers tokenizer. path: "scenes", a directory (or a weights file in one), or a hub id, of the setting `field`.
    Raises ValueError: there is no tokenizer, it cannot be read, or it has no padding token."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is as it should be
    import transformers  # seconds to import, and only text needs it

    folder = SCENE_TOKENIZER if path == SCENES else files.locate(path, field, _TOKENIZER_WANTED)
    folder = folder if folder.is_dir() else folder.parent
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ValueError(
            f"{field}={path!r}: no tokenizer in {folder} (none of {', '.join(_TOKENIZER_FILES)}); set "
            "config.encoder.tokenizer to the directory that has it"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the libraries below raise whatever they like
        raise ValueError(f"{field}={path!r}: the tokenizer in {folder} cannot be read ({error})") from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{field}={path!r}: the tokenizer in {folder} has no padding token")
    return tokenizer


def tokenize(tokenizer: Any, captions: Sequence[str], max_tokens: int) -> dict[str, np.ndarray]:
    """Captions -> {"tokens": int32 (B, max_tokens), "token_mask": bool (B, max_tokens)}, padded on the right, cut to length.

    The mask is true for the text and its end-of-text token. Cutting keeps the end-of-text token.
    """
    if not captions:
        return {"tokens": np.zeros((0, max_tokens), np.int32), "token_mask": np.zeros((0, max_tokens), bool)}
    padding = {"padding": "max_length", "padding_side": "right", "max_length": max_tokens, "truncation": True}
    made = tokenizer(list(captions), return_attention_mask=True, **padding)
    return {"tokens": np.asarray(made["input_ids"], np.int32), "token_mask": np.asarray(made["attention_mask"], bool)}
