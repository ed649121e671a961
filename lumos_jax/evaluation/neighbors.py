"""The k-nearest-neighbor probe of features (Wu et al. 2018; Caron et al. 2021), and retrieval between images and captions
(Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

K = 10


def nearest(bank: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Indices (Q, count) of the bank's features (N, C) nearest to each query (Q, C) by cosine, nearest first."""
    bank, queries = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (bank, queries))
    return np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :count]


def neighbor_accuracy(
    bank: np.ndarray, queries: np.ndarray, labels: Mapping[str, np.ndarray], k: int = K
) -> dict[str, float]:
    """Share of queries whose label is the most frequent one among their k nearest, ties going to the smallest label.

    Args:
      bank, queries: features (N, C) and (Q, C).
      labels: name -> labels (N + Q,), non-negative integers, the bank's first; may be empty.
      k: neighbors that vote.
    """
    indices, split = nearest(bank, queries, k), len(bank)
    scores = {}
    for name, values in labels.items():
        votes = values[:split][indices]
        winner = np.array([np.bincount(row).argmax() for row in votes])
        scores[name] = float((winner == values[split:]).mean())
    return scores


def retrieval_accuracy(images: np.ndarray, texts: np.ndarray, captions: np.ndarray) -> dict[str, float]:
    """Shares in [0, 1] of images whose nearest text is their caption, `text_retrieval`, and of texts whose nearest image has
    that caption, `image_retrieval`. images, texts: features (N, P), pair by pair. captions: (N,), some of which may be equal.
    """
    captions = np.asarray(captions)
    found = {"text_retrieval": nearest(texts, images, 1), "image_retrieval": nearest(images, texts, 1)}
    return {name: float((captions[indices[:, 0]] == captions).mean()) for name, indices in found.items()}
