"""The k-nearest-neighbor probe."""

import numpy as np

from lumos_jax import evaluation


def test_nearest_neighbors_vote():
    bank = np.array([[1, 0], [2, 0.1], [0, 1], [0.1, 3], [-1, 0]], np.float32)
    queries = np.array([[5, 0.2], [0, 2]], np.float32)
    assert evaluation.nearest(bank, queries, 2).tolist() == [[1, 0], [2, 3]]
    labels = np.array([4, 4, 7, 7, 0, 4, 2])
    assert evaluation.neighbor_accuracy(bank, queries, {"kind": labels}, k=2) == {"kind": 0.5}
