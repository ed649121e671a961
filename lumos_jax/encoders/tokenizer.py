"""Captions -> token ids and mask, on the host, by a transformers tokenizer."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lumos_jax import config
from lumos_jax.encoders.clip_text import LEGACY_EOS
from lumos_jax.weights import files

SCENES = "scenes"  # config.encoder.tokenizer: the tokenizer of scene captions that comes with the package
SCENE_TOKENIZER = pathlib.Path(__file__).parent.parent / "scenes" / "tokenizer"
SCENE_EOS = 1  # its end of text, and T5's; what random CLIP weights pool at

_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")  # any of them will do
_TOKENIZER_WANTED = (*_TOKENIZER_FILES, "merges.txt", "config.json", "tokenizer_config.json", "special_tokens_map.json",
                     "added_tokens.json")  # fmt: skip


def make_tokenizer(encoder: config.Encoder, made: Any) -> Any:
    """The tokenizer that config.encoder names, checked against the network of the TextEncoder `made`, which reads its ids.

    Raises:
      ValueError: there is none, or it has ids that the network does not know.
    """
    if not encoder.tokenizer and encoder.weights.startswith("random:"):
        raise ValueError(f"config.encoder.tokenizer is empty, and {encoder.weights} has none beside it: set {SCENES!r} "
                         "or a directory")  # fmt: skip
    field = "config.encoder.tokenizer" if encoder.tokenizer else "config.encoder.weights"
    tokenizer = load_tokenizer(encoder.tokenizer or encoder.weights, field)
    if len(tokenizer) > made.network.vocabulary:  # XLA would clamp them to the last row, and say nothing
        raise ValueError(
            f"the tokenizer of {field} has {len(tokenizer)} ids, the network of {encoder.weights} only "
            f"{made.network.vocabulary}"
        )
    eos = getattr(made.network, "eos", None)
    if encoder.output == "pooled" and eos != tokenizer.eos_token_id and eos != LEGACY_EOS:
        raise ValueError(
            f"the tokenizer of {field} ends a text with id {tokenizer.eos_token_id}, but {encoder.weights} pools at {eos}"
        )
    return tokenizer


def load_tokenizer(path: str, field: str) -> Any:
    """A transformers tokenizer.

    Args:
      path: "scenes", a directory (or a weights file in one), or a hub id.
      field: the setting it is from, for messages.

    Raises:
      ValueError: there is no tokenizer, it cannot be read, or it has no padding token.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is as it should be
    import transformers  # seconds to import, and only text needs it

    if path == SCENES:
        folder = SCENE_TOKENIZER
    else:
        folder = files.locate(path, field, _TOKENIZER_WANTED)
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
