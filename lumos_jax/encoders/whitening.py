"""Whitening of features: tokens of mean zero and equal variance in all directions.

Self-supervised features share a large mean and are low-rank; a prior that reads them through a few matrices is then slow to
learn what tells images, and places in them, apart.

    white = (token - mean) kernel,   kernel = (C + epsilon trace(C) / D)^(-1/2),   C the covariance of tokens
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

# As a share of the mean variance: directions that hardly vary are numerical noise, and stay small.
EPSILON = 0.01


def fit(tokens: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """{"mean": (D,), "kernel": (D, D)} float32 of batches of tokens (B, L, D), [CLS] and patches alike.
    Raises ValueError: fewer than two tokens, or tokens that are all the same."""
    count, total, squares = 0, 0.0, 0.0
    for batch in tokens:
        flat = np.asarray(batch, np.float64).reshape(-1, batch.shape[-1])
        count, total, squares = count + len(flat), total + flat.sum(axis=0), squares + flat.T @ flat
    if count < 2:
        raise ValueError(f"whitening needs the tokens of some images; there are {count}")
    mean = total / count
    values, directions = np.linalg.eigh(squares / count - np.outer(mean, mean))
    if not values.mean() > 1e-12:
        raise ValueError("whitening needs images that differ: all tokens are the same")
    kernel = directions / np.sqrt(np.maximum(values, 0) + EPSILON * values.mean()) @ directions.T
    return {"mean": mean.astype(np.float32), "kernel": kernel.astype(np.float32)}


def apply(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """tokens (B, L, D) float32 -> (B, L, D) float32, by what `fit` returns."""
    centered = tokens - params["mean"].astype(jnp.float32)[None, None]
    return jnp.einsum("bld,de->ble", centered, params["kernel"].astype(jnp.float32))
