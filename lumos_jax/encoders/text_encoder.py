"""The frozen text encoder: captions -> token ids, on the host -> condition tokens, on the device."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lumos_jax import config
from lumos_jax.encoders import architectures
from lumos_jax.encoders.clip_text import ACTIVATIONS, LEGACY_EOS, ClipText
from lumos_jax.encoders.t5 import T5Encoder
from lumos_jax.encoders.vit import SIZES
from lumos_jax.weights import files, frozen_files, text_names
from lumos_jax.weights import rules as name_rules
from lumos_jax.weights.placement import Placement, Take, gather_of

SCENES = "scenes"  # config.encoder.tokenizer: the tokenizer of scene captions that comes with the package
SCENE_TOKENIZER = pathlib.Path(__file__).parent.parent / "scenes" / "tokenizer"
SCENE_EOS = 1  # its end of text, and T5's; what random CLIP weights pool at

_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")  # any of them will do
_TOKENIZER_WANTED = (*_TOKENIZER_FILES, "merges.txt", "config.json", "tokenizer_config.json", "special_tokens_map.json",
                     "added_tokens.json")  # fmt: skip
_T5_MAX_DISTANCE = 128  # configs written before transformers 4.15 do not say it; it never was anything else

Network = T5Encoder | ClipText


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text network with its choice of tokens.

    Attributes:
      kind: "t5" | "clip_text".
      output: "all", a feature a token, or "pooled" (clip_text), one projected feature a text.
      max_tokens: length of the token ids, padding included.
      dtype: of the parameters and of the computation.
      identity: where the weights are from and a hash of them.
      place: how its parameters are laid out over devices; None: on one, or whole on each.
    """

    network: Network
    kind: str
    output: str
    max_tokens: int
    dtype: str
    identity: str
    place: Placement | None = None

    @property
    def tokens(self) -> int:
        """L, condition tokens a text."""
        return 1 if self.output == "pooled" else self.max_tokens

    @property
    def dim(self) -> int:
        """C, features a token."""
        return self.network.projection if self.output == "pooled" else self.network.width

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids (B, max_tokens) and mask (nonzero where a token counts) -> (B, L, C) float32.

        Features are not normalised. At masked positions they mean nothing: whoever attends to them needs the mask too.
        """
        gather = gather_of(self.place)
        tokens = self.network.apply(params, ids, mask, gather)
        if self.output == "pooled":
            tokens = self.network.pool(gather({"projection": params["projection"]}), ids, tokens)[:, None]
        return tokens.astype(jnp.float32)


def make_text_encoder(encoder: config.Encoder, place: Placement | None = None) -> tuple[TextEncoder, Any]:
    """The encoder that config.encoder names, and its parameters in the compute dtype.

    Args:
      encoder: config.encoder.
      place: puts each array on devices as it is read; the host then never holds more than this one array of the network
        (T5-XXL has 4.8 billion parameters). None keeps them on the host.

    Raises:
      ValueError: weights that cannot be found, read or fitted; an output or a length that they do not have.
    """
    if encoder.kind not in config.TEXT_KINDS:
        raise ValueError(f"config.encoder.kind={encoder.kind!r} reads no text: {' and '.join(config.TEXT_KINDS)} do")
    take = Take(encoder.dtype, place)
    if take.shapes_only and encoder.weights.startswith("random:"):
        network = _random_network(encoder)
    else:
        network = architectures.known(encoder.weights, take, Network)
    if network is not None:
        params = architectures.shapes(network.init, take)
    elif encoder.weights.startswith("random:"):
        network, params = _random(encoder)
        params = name_rules.unflatten({path: take(path, a) for path, a in name_rules.flatten(params).items()})
    else:
        network, params = {"t5": load_t5, "clip_text": load_clip_text}[encoder.kind](encoder.weights, take)
    if encoder.output == "pooled" and not getattr(network, "projection", 0):
        raise ValueError(f"config.encoder.output=pooled: {encoder.weights} has no text_projection; set output=all")
    if isinstance(network, ClipText) and encoder.max_tokens > network.positions:
        raise ValueError(
            f"config.encoder.max_tokens={encoder.max_tokens} exceeds the {network.positions} positions of {encoder.weights}"
        )
    identity = take.identity(encoder.weights)
    return TextEncoder(
        network, encoder.kind, encoder.output, encoder.max_tokens, encoder.dtype, identity, place
    ), params


def _random(encoder: config.Encoder) -> tuple[Network, Any]:
    network = _random_network(encoder)
    seed = int(encoder.weights.removeprefix("random:"))
    return network, jax.tree.map(np.asarray, jax.jit(network.init)(jax.random.key(seed)))


def _random_network(encoder: config.Encoder) -> Network:
    if encoder.vocabulary < 1:
        raise ValueError("config.encoder.vocabulary must say how many token ids a text encoder of random weights knows")
    sizes = (encoder.width, encoder.depth, encoder.heads)
    width, depth, heads = sizes if encoder.size == "custom" else SIZES[encoder.size]
    if encoder.kind == "t5":  # the MLP's share of the width is that of T5 v1.1 XXL
        return T5Encoder(width, depth, heads, width // heads, 5 * width // 2, encoder.vocabulary)
    length = encoder.max_tokens
    return ClipText(width, depth, heads, 4 * width, encoder.vocabulary, length, width, SCENE_EOS)


def load_t5(weights: str, take: Take | None = None) -> tuple[T5Encoder, Any]:
    """A pre-trained T5 v1.1 or Flan-T5, encoder alone or whole (the decoder is dropped), with Hugging Face names.

    Raises:
      ValueError: as `files.locate`, `files.read` and `name_rules.convert` do; or another architecture.
    """
    return _load(weights, "t5", T5Encoder, convert_t5, take)


def load_clip_text(weights: str, take: Take | None = None) -> tuple[ClipText, Any]:
    """A pre-trained CLIP text tower with Hugging Face names: alone, with its projection, or beside the image tower.

    Raises:
      ValueError: as `files.locate`, `files.read` and `name_rules.convert` do; or another architecture.
    """
    return _load(weights, "clip-text", ClipText, convert_clip_text, take)


def _load(weights: str, kind: str, network_class, convert, take: Take | None) -> tuple[Any, Any]:
    path = files.locate(weights, "config.encoder.weights")
    network, flat = frozen_files.load_any(
        path, kind, network_class, lambda: convert(*files.read(path, "model"), weights, take), take
    )
    return network, name_rules.unflatten(flat)


def convert_t5(state: Mapping[str, Any], told: Mapping[str, Any] | None, origin: str, take: Take | None = None):
    """A state dict (arrays, or shapes alone) and its config.json -> (T5Encoder, {path: array}, account)."""
    network = t5_of(told, origin)
    both = [state[name] for name in (text_names.SHARED, text_names.COPY) if name in state]
    if len(both) == 2 and not np.array_equal(*both):
        raise ValueError(f"{origin}: {text_names.SHARED} and {text_names.COPY} differ; in T5 they are one array")
    rules = text_names.t5_rules(state)
    return network, *name_rules.convert(state, rules, parameter_shapes(network), origin=origin, place=take)


def convert_clip_text(state: Mapping[str, Any], told: Mapping[str, Any] | None, origin: str, take: Take | None = None):
    """A state dict (arrays, or shapes alone) and its config.json -> (ClipText, {path: array}, account)."""
    state = text_names.with_text_prefix(state)
    projection = state.get("text_projection.weight")
    width = 0 if projection is None else getattr(projection, "shape", projection)[0]
    network = clip_text_of(told, width, origin)
    rules = text_names.clip_rules(state)
    return network, *name_rules.convert(state, rules, parameter_shapes(network), origin=origin, place=take)


def parameter_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter; nothing is allocated."""
    shapes = name_rules.flatten(jax.eval_shape(network.init, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in shapes.items()}


def t5_of(told: Mapping[str, Any] | None, origin: str) -> T5Encoder:
    """The network's shape from a Hugging Face config. Raises ValueError for another architecture."""
    told = _told(told, origin, ("t5", "mt5"), "an encoder of T5 v1.1 or Flan-T5")
    activation = told.get("feed_forward_proj", "relu")
    if activation != "gated-gelu":
        raise ValueError(
            f"{origin}: config.json says feed_forward_proj={activation!r}, as T5 v1.0 has it; only gated-gelu (T5 v1.1, "
            "Flan-T5) is supported"
        )
    return T5Encoder(
        width=told["d_model"],
        depth=told["num_layers"],
        heads=told["num_heads"],
        head_dim=told["d_kv"],
        mlp_width=told["d_ff"],
        vocabulary=told["vocab_size"],
        buckets=told["relative_attention_num_buckets"],
        max_distance=told.get("relative_attention_max_distance", _T5_MAX_DISTANCE),
        eps=told["layer_norm_epsilon"],
    )


def clip_text_of(told: Mapping[str, Any] | None, projection: int, origin: str) -> ClipText:
    """The network's shape from a Hugging Face config, of the text tower or of both. Raises ValueError for another one."""
    told = _told(told, origin, ("clip_text_model", "clip"), "a CLIP text encoder")
    if told["model_type"] == "clip":
        told = _Told(told["text_config"], origin)
    if told["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"{origin}: config.json says hidden_act={told['hidden_act']!r}; supported are {', '.join(ACTIVATIONS)}"
        )
    return ClipText(
        width=told["hidden_size"],
        depth=told["num_hidden_layers"],
        heads=told["num_attention_heads"],
        mlp_width=told["intermediate_size"],
        vocabulary=told["vocab_size"],
        positions=told["max_position_embeddings"],
        projection=projection,
        eos=told["eos_token_id"],
        activation=told["hidden_act"],
        eps=told["layer_norm_eps"],
    )


class _Told(dict):
    """A config.json that says what it lacks when asked."""

    def __init__(self, values: Mapping[str, Any], origin: str):
        super().__init__(values)
        self.origin = origin

    def __missing__(self, key: str):
        raise ValueError(f"{self.origin}: config.json does not say {key}")


def _told(told: Mapping[str, Any] | None, origin: str, types: tuple[str, ...], wanted: str) -> _Told:
    if told is None:
        raise ValueError(
            f"{origin}: a text encoder's shape is read from config.json; give the directory that holds both"
        )
    if told.get("model_type") not in types:
        raise ValueError(
            f"{origin}: config.json says model_type={told.get('model_type')!r}; {wanted} has {' or '.join(types)}"
        )
    return _Told(told, origin)


def make_tokenizer(encoder: config.Encoder, made: TextEncoder) -> Any:
    """The tokenizer that config.encoder names, checked against the network that reads its ids.

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
            f"{made.network.vocabulary}" + (": set config.encoder.vocabulary" if encoder.vocabulary else "")
        )
    eos = getattr(made.network, "eos", None)
    if made.output == "pooled" and eos != tokenizer.eos_token_id and eos != LEGACY_EOS:
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
    made = tokenizer(
        list(captions),
        padding="max_length",
        padding_side="right",
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=True,
    )
    return {"tokens": np.asarray(made["input_ids"], np.int32), "token_mask": np.asarray(made["attention_mask"], bool)}
