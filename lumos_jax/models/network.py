"""The diffusion transformer as pure functions of its parameters: what the rest of the code sees, without Flax."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lumos_jax import config
from lumos_jax.models import conditioning, cpu
from lumos_jax.models.conditioning import Condition
from lumos_jax.models.dit import DiT, DiTConfig
from lumos_jax.models.layers import FREQUENCY_DIM


@functools.lru_cache(maxsize=16)  # a run asks several times, and tracing the network takes its time
def _shapes(network: Network) -> dict[str, Any]:
    """Shapes of the parameters, in Flax boxes that carry the logical axis names."""
    return jax.eval_shape(network.boxed_init, jax.random.key(0))


class Network(DiTConfig):
    """The network that its fields describe; hashable. See `make_dit`.

    Parameters are a nested dict of float32 arrays. Its paths are the on-disk contract: those of the modules of `DiT`, with the
    blocks' stacked on a leading axis of length `depth`, and the null condition's tables under "null".
    """

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters from a key."""
        return nn.meta.unbox(self.boxed_init(key))

    def boxed_init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters in Flax boxes that carry the logical axis names.

        Each module is initialized by a key of its own name, so that adding one leaves the values of the others as they were.
        """

        def key_of(name):
            return jax.random.fold_in(key, zlib.crc32(name.encode()))

        def token(features):
            return jnp.zeros((1, 1, features))

        x, row = token(self.width), jnp.zeros((1, self.width))
        inputs = {
            "patch": (token(self.patch_size**2 * (self.latent_shape[-1] + self.concat_channels)),),
            "time": (jnp.zeros((1, FREQUENCY_DIM)),),
            "final": (x, row),
            "blocks": (x, row, x if self.token_shape else None, None, 1),
        }
        if self.align_block:
            inputs["align"] = (x,)
        null = {}
        if self.token_shape:
            inputs["tokens"] = (token(self.token_shape[1]),)
            if self.camera_dim:
                inputs["camera"] = (token(self.token_shape[1] + self.camera_dim),)
            else:
                null["tokens"] = conditioning.null_table(key_of("null tokens"), self.token_shape)
        if self.vector_dim:
            waves = FREQUENCY_DIM if self.vector_kind == "numbers" else 1
            inputs["vector"] = (jnp.zeros((1, waves * self._vector_features)),)
            if self.vector_kind == "linear":
                null["vector"] = conditioning.null_table(key_of("null vector"), (self.vector_dim,))
        # Values do not depend on it, and random numbers of unrolled layers take a minute to compile on a GPU.
        model = DiT(dataclasses.replace(self, unroll=1)).bind({})
        modules = {name: getattr(model, name).unbind()[0] for name in inputs}
        params = {name: module.init(key_of(name), *inputs[name])["params"] for name, module in modules.items()}
        return params | ({"null": null} if null else {})

    def logical_axes(self) -> dict[str, Any]:
        """A tree like the parameters, of one tuple per parameter with a logical axis name (or None) per dim."""
        return jax.tree.map(
            lambda leaf: tuple(leaf.names) if hasattr(leaf, "names") else (None,) * leaf.ndim,
            _shapes(self),
            is_leaf=lambda leaf: hasattr(leaf, "names"),
        )

    def trainable(self) -> dict[str, Any]:
        """A tree like the parameters, of bool: False for the null table of tokens."""
        shapes, buffer = nn.meta.unbox(_shapes(self)), "['null']['tokens']"
        return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path) != buffer, shapes)

    def apply(
        self,
        params: dict[str, Any],
        x: jax.Array,
        t: jax.Array,
        condition: Condition,
        *,
        gather: Callable[[Any], Any] | None = None,
        modulate: Callable[[jax.Array], jax.Array] | None = None,
        over_frames: Callable[[Callable, jax.Array], jax.Array] | None = None,
        hardware: str = "",
        aligned: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """The network's output for noisy latents.

        Args:
          x: (B, h, w, c), or (B, F, h, w, c) for a network that is temporal; h and w are any multiples of the patch size.
          t: (B,) network time in [0, 1000).
          condition: after `project_camera`; tokens are needed if and only if the network has them, latent likewise; an absent
            vector adds nothing.
          gather: called inside the scanned body on one layer of `params["blocks"]`; returns that block's parameters. It
            gathers shards, adds adapters, or both.
          modulate: called with SiLU of the embedded time (B, D) in the compute dtype; returns the modulation of all layers,
            (depth, B, 6 D) float32. `params["blocks"]` then needs no "modulation".
          over_frames: where several devices hold a clip's frames: called with attend and h (B, F, N, D) of the device's own
            frames; returns attend(h) of all of them, of the own frames. `attend` treats each position (N) by itself.
          hardware: which attention kernel may be used; see attention.kernel_for.
          aligned: also return the projected tokens of block `align_block`, for models.alignment.

        Returns:
          (B, [F,] h, w, out_channels) float32; with `aligned` that and (B, P, C) of `align_shape`, P its side squared.

        Raises:
          ValueError: shapes that do not fit the network.
        """
        self._check(x, condition)
        return DiT(self, gather, modulate, over_frames, hardware, aligned).apply({"params": params}, x, t, condition)

    def project_camera(self, params: dict[str, Any], condition: Condition) -> Condition:
        """Projects the camera numbers at the end of the tokens' features into them: tokens (B, L, C), as `apply` takes them.
        The identity for networks without a camera."""
        if not self.camera_dim:
            return condition
        tokens = DiT(self).apply({"params": params}, condition.tokens, method=DiT.project_camera)
        return dataclasses.replace(condition, tokens=tokens)

    def null_condition(self, params: dict[str, Any], condition: Condition) -> Condition:
        """The null condition, for as many rows, after `project_camera`: null tables (zeros for a network with a camera), zero
        latents; token mask, sizes and numbers are kept. Gradients do not reach the table of tokens."""

        def table(values, like):
            return jnp.broadcast_to(values, like.shape).astype(like.dtype)

        tokens, vector, latent = condition.tokens, condition.vector, condition.latent
        if tokens is not None and self.camera_dim:
            tokens = jnp.zeros((*tokens.shape[:2], self.token_shape[1]), tokens.dtype)
        elif tokens is not None:
            tokens = table(jax.lax.stop_gradient(params["null"]["tokens"]), tokens)
        if vector is not None and self.vector_kind == "linear":
            vector = table(params["null"]["vector"], vector)
        elif vector is not None and self.vector_kind == "class":
            vector = jnp.full_like(vector, self.vector_dim)
        latent = None if latent is None else jnp.zeros_like(latent)
        return Condition(tokens, condition.token_mask, vector, latent)

    def drop_condition(self, params: dict[str, Any], condition: Condition, drop: Mapping[str, jax.Array]) -> Condition:
        """Replaces parts of some rows of a condition by those of the null condition, then projects the camera.

        drop: for each name of conditioning.PARTS, (B,) bool, the rows that lose it. Of a network with a camera the features are
        zeroed and the camera is kept, as Zero-1-to-3 trains.
        """
        null = self.null_condition(params, condition)
        if self.camera_dim:
            camera = condition.tokens[..., self.token_shape[1] :]
            null = dataclasses.replace(null, tokens=jnp.concatenate([null.tokens, camera], axis=-1))

        def choose(rows, yes, no):
            return jnp.where(rows.reshape(-1, *[1] * (no.ndim - 1)), yes, no)

        parts = {name: (getattr(null, name), getattr(condition, name)) for name in conditioning.PARTS}
        parts = {name: choose(drop[name], *part) for name, part in parts.items() if part[1] is not None}
        return self.project_camera(params, dataclasses.replace(condition, **parts))

    def widen_input(self, path: str, array: jax.Array) -> jax.Array:
        """Adds input channels, which start at zero, to "patch/kernel" of a network that has fewer."""
        assert path == "patch/kernel", path
        pixels, channels = self.patch_size**2, self.latent_shape[-1] + self.concat_channels
        kernel = array.reshape(pixels, -1, array.shape[-1])
        kernel = jnp.pad(kernel, ((0, 0), (0, channels - kernel.shape[1]), (0, 0)))
        return kernel.reshape(-1, array.shape[-1])

    @property
    def _vector_features(self) -> int:
        """Numbers in a row of Condition.vector."""
        return 1 if self.vector_kind == "class" else self.vector_dim

    def _check(self, x: jax.Array, condition: Condition) -> None:
        def require(holds, name, array, expected):
            if not holds:
                raise ValueError(f"{name} has shape {None if array is None else array.shape}; the network {expected}")

        tokens, vector, latent = condition.tokens, condition.vector, condition.latent
        require(x.ndim == 4 or (x.ndim == 5 and self.temporal), "x", x, f"has temporal={self.temporal}")
        h, w, c = x.shape[-3:]
        fits = h % self.patch_size == w % self.patch_size == 0 and c == self.latent_shape[2]
        require(fits, "x", x, f"takes multiples of the patch size {self.patch_size}, {self.latent_shape[2]} channels")
        needed = None if self.token_shape is None else self.token_shape[1]
        given = None if tokens is None else tokens.shape[2]
        require(given == needed, "condition.tokens", tokens, f"was made for token_shape={self.token_shape}")
        fits = vector is None or vector.shape[1] == self._vector_features
        require(fits, "condition.vector", vector, f"has vector_dim={self.vector_dim} ({self.vector_kind})")
        fits = (*x.shape[:-1], self.concat_channels) == (latent.shape if latent is not None else (*x.shape[:-1], 0))
        require(fits, "condition.latent", latent, f"concatenates {self.concat_channels} channels to x {x.shape}")


class Size(NamedTuple):
    """D, number of blocks, H (Peebles & Xie 2023, table 1)."""

    width: int
    depth: int
    heads: int


SIZES = {"S": Size(384, 12, 6), "B": Size(768, 12, 12), "L": Size(1024, 24, 16), "XL": Size(1152, 28, 16)}


def make_size(model: config.Model) -> Size:
    """The size that config.model names, or writes out."""
    return Size(*(config.custom_size(model.size) or SIZES[model.size]))


def position_scale(image_size: int) -> float:
    """Distance of the positions of images of that side in pixels: 2 at 1024 px (PixArt), 1 up to 512."""
    return max(1.0, image_size / 512)


def make_dit(
    model: config.Model,
    *,
    latent_shape: tuple[int, int, int],
    out_channels: int,
    token_shape: tuple[int, int] | None,
    final: str = "table",
    **parts: Any,
) -> Network:
    """The network that config.model describes; for the other arguments see DiTConfig.

    final: the task's choice, unless config.model.final overrides it. parts: what the task adds: fields that have defaults.
    Raises ValueError for latents that do not divide into patches, and for an align_block that there is not.
    """
    size = make_size(model)
    if latent_shape[0] % model.patch_size or latent_shape[1] % model.patch_size:
        raise ValueError(
            f"latents of {latent_shape[0]}x{latent_shape[1]} do not divide into patches of "
            f"config.model.patch_size={model.patch_size}; change it, or config.data.image_size"
        )
    if parts.get("align_block", 0) > size.depth:
        raise ValueError(
            f"config.align.block={parts['align_block']}: config.model.size={model.size} has {size.depth} blocks; take one"
        )
    if parts.get("vector_kind") == "size":
        parts["vector_dim"] = 3  # height, width and their ratio
    return Network(
        *size,
        mlp_hidden=4 * size.width,
        activation=model.activation,
        patch_size=model.patch_size,
        latent_shape=tuple(latent_shape),
        out_channels=out_channels,
        token_shape=None if token_shape is None else tuple(token_shape),
        position_base=(latent_shape[0] // model.patch_size, latent_shape[1] // model.patch_size),
        dtype=model.dtype,
        remat=model.remat,
        unroll=min(size.depth, cpu.SCAN_UNROLL if jax.default_backend() == "cpu" else 1),
        final=final if model.final == "auto" else model.final,
        **parts,
    )
