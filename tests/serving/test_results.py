"""What a client returns: rows can be counted, and a repr fits on a line."""

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.results import Classification, Neighbors

CLASSIFICATION = Classification(
    class_ids=np.array([[3, 1], [2, 0], [3, 2]]),
    probabilities=np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.1]], np.float32),
    confidence=np.array([0.9, 0.6, 0.8], np.float32),
    dim=np.array([8, 64, 8], np.int32),
)
NEIGHBORS = Neighbors(np.array([[7, 2, 5]]), np.array([[0.9, 0.4, 0.1]], np.float32))


def test_a_classification_has_rows_and_says_which_dims_decided() -> None:
    assert len(CLASSIFICATION) == 3
    assert repr(CLASSIFICATION) == "Classification(3 rows, top 2, by dim {8: 2, 64: 1})"
    assert CLASSIFICATION.labels is None


def test_neighbors_have_rows() -> None:
    assert len(NEIGHBORS) == 1
    assert repr(NEIGHBORS) == "Neighbors(1 queries, k=3)"


def test_no_rows_have_a_repr_too() -> None:
    none: Any = np.zeros((0, 2))
    assert repr(Classification(none, none, none[:, 0], none[:, 0])) == (
        "Classification(0 rows, top 2, by dim {})"
    )
    assert repr(Neighbors(none, none)) == "Neighbors(0 queries, k=2)"


def test_results_are_frozen_and_equal_only_themselves() -> None:
    with pytest.raises(FrozenInstanceError):
        CLASSIFICATION.dim = NEIGHBORS.ids  # type: ignore[misc,assignment]
    with pytest.raises(FrozenInstanceError):
        NEIGHBORS.ids = CLASSIFICATION.dim  # type: ignore[misc,assignment]
    assert NEIGHBORS != Neighbors(NEIGHBORS.ids, NEIGHBORS.scores)  # arrays have no one equality
    assert len({CLASSIFICATION, CLASSIFICATION}) == 1
