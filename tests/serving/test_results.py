"""What a client returns: rows can be counted, and a repr fits on a line."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.results import Classification, Embedded, Neighbors, join

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
        CLASSIFICATION.dim = NEIGHBORS.ids  # type: ignore[misc, assignment]
    with pytest.raises(FrozenInstanceError):
        NEIGHBORS.ids = CLASSIFICATION.dim  # type: ignore[misc, assignment]
    assert NEIGHBORS != Neighbors(NEIGHBORS.ids, NEIGHBORS.scores)  # arrays have no one equality
    assert len({CLASSIFICATION, CLASSIFICATION}) == 1


def test_a_row_is_plain_python() -> None:
    row = CLASSIFICATION[1]
    assert (row.class_ids, row.class_id, row.dim, row.labels, row.label) == (
        (2, 0),
        2,
        64,
        None,
        None,
    )
    assert row.probabilities == tuple(CLASSIFICATION.probabilities[1].tolist())
    assert row.confidence == float(np.float32(0.6))
    assert {type(value) for value in (row.confidence, *row.probabilities)} == {float}
    assert CLASSIFICATION[-1] == CLASSIFICATION[2] == list(CLASSIFICATION)[2]
    assert NEIGHBORS[0][0] == (7, float(np.float32(0.9)))
    with pytest.raises(IndexError):
        CLASSIFICATION[3]


def test_rows_have_names_where_the_model_has() -> None:
    names = np.array([["lynx", "hare"]], object)
    named = replace(CLASSIFICATION[:1], labels=names)
    assert (named[0].label, named[0].labels) == ("lynx", ("lynx", "hare"))


def test_a_slice_is_of_the_same_kind() -> None:
    some = CLASSIFICATION[1:]
    assert isinstance(some, Classification)
    assert some.dim.tolist() == [64, 8]
    assert NEIGHBORS[:0].ids.shape == (0, 3)


def test_parts_are_join_in_order() -> None:
    whole = join([CLASSIFICATION[:1], CLASSIFICATION[1:]])
    assert whole.class_ids.tolist() == CLASSIFICATION.class_ids.tolist()
    assert whole.labels is None
    assert join([NEIGHBORS, NEIGHBORS[:0]]).scores.tolist() == NEIGHBORS.scores.tolist()
    assert join([np.zeros((2, 3)), np.ones((1, 3))])[:, 0].tolist() == [0, 0, 1]
    embedded = join([Embedded(np.zeros((2, 3), np.float32), "a")] * 2)
    assert (embedded.embeddings.shape, embedded.fingerprint) == ((4, 3), "a")
    only = np.zeros(2)
    assert join([only]) is only


def test_classes_above_a_threshold_are_named_by_label_or_by_id() -> None:
    assert CLASSIFICATION.above(0.5) == [(3,), (2,), (3,)]
    assert CLASSIFICATION.above(float(np.float32(0.1))) == [(3,), (2, 0), (3,)]  # strictly above
    assert CLASSIFICATION.above(0.95) == [(), (), ()]
    names = np.array([["d", "b"], ["c", "a"], ["d", "c"]], object)
    assert replace(CLASSIFICATION, labels=names).above(0.3) == [("d",), ("c", "a"), ("d",)]
    assert CLASSIFICATION[1].above(0.3) == (2, 0)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"\Athreshold must be a probability in \[0, 1\]"):
            CLASSIFICATION.above(threshold)


def test_audited_rows_say_what_the_last_stage_made_of_them() -> None:
    audited = replace(CLASSIFICATION, full_class_ids=np.array([-1, 1, 3]))
    assert repr(audited) == "Classification(3 rows, top 2, by dim {8: 2, 64: 1}, 2 audited)"
    assert [row.full_class_id for row in audited] == [None, 1, 3]
    assert [row.full_class_id for row in CLASSIFICATION] == [None] * 3
    assert audited.audited.tolist() == [1, 2]
    assert audited[:2].audited.tolist() == [1]
    assert join([audited, audited]).audited.tolist() == [1, 2, 4, 5]
    assert len(CLASSIFICATION.audited) == 0
