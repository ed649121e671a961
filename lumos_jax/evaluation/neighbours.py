"""What nearest neighbours have in common: the k-nearest-neighbour probe of features (Wu et al. 2018; Caron et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

K = 10


def nearest(bank: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Indices (Q, count) of the bank's features (N, C) nearest to each query (Q, C) by cosine, nearest first."""
    bank = bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
    queries = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    return np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :count]


def neighbour_accuracy(
    bank: np.ndarray, queries: np.ndarray, truth: Mapping[str, np.ndarray], split: int, k: int = K
) -> dict[str, float]:
    """Share of queries whose label is the most frequent one among their k nearest, ties going to the smallest label.

    Args:
      bank, queries: features (N, C) and (Q, C).
      truth: name -> labels (N + Q,), non-negative whole numbers, the bank's first; may be empty.
      split: N.
      k: neighbours that vote.
    """
    found = nearest(bank, queries, k)
    scores = {}
    for name, labels in truth.items():
        votes = labels[:split][found]
        winner = np.array([np.bincount(row).argmax() for row in votes])
        scores[name] = float((winner == labels[split:]).mean())
    return scores
