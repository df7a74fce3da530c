from typing import Any

import numpy as np
import pytest

from keras_mrl._arrays import as_labels, check_kinds, check_labels_for
from tests.helpers.laws import exactly


def test_a_column_is_one_label_per_row() -> None:
    assert as_labels(np.array([[3], [4]])).tolist() == [3, 4]
    assert as_labels([["a"], ["b"]]).tolist() == ["a", "b"]
    assert as_labels(np.eye(2)).shape == (2, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array([1]), np.array([1.0])),
        (np.array([True]), np.array([1], np.uint8)),
        (np.array(["a"]), np.array(["abc"], object)),
        (np.array([b"a"]), np.array([b"abc"], object)),
        (np.array([1, 2.5], object), np.array([np.int64(1)], object)),
    ],
)
def test_labels_that_can_be_equal_are_of_one_kind(one: Any, other: Any) -> None:
    check_kinds(one, other)
    check_kinds(other, one)


@pytest.mark.parametrize(
    ("one", "other", "kinds"),
    [
        (np.array(["1"]), np.array([1]), ("strings", "numbers")),
        (np.array([b"1"]), np.array(["1"]), ("bytes", "strings")),
        (np.array(["1"], object), np.array([1], object), ("strings", "numbers")),
        (np.array(["1", 1], object), np.array([1], object), ("numbers and strings", "numbers")),
        (np.array([1 + 0j]), np.array([1]), ("objects", "numbers")),
    ],
)
def test_labels_of_two_kinds_are_refused(one: Any, other: Any, kinds: tuple[str, str]) -> None:
    sentence = (
        "Labels of queries and gallery must be of one kind. "
        f"Received: {kinds[0]} for the queries, {kinds[1]} for the gallery. "
        "Name the classes alike on both sides, best by integers."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        check_kinds(one, other)


def test_a_data_set_is_not_asked_how_many_rows_it_has() -> None:
    assert check_labels_for(iter([]), [1, 2]).tolist() == [1, 2]
    assert check_labels_for({"a": np.ones((2, 3)), "b": np.ones(2)}, [1, 2]).tolist() == [1, 2]


@pytest.mark.parametrize("labels", [[], [1], 1])
def test_labels_are_one_per_row_of_every_input(labels: Any) -> None:
    inputs = [np.ones((2, 3)), np.ones((1, 3))]
    sentence = (
        "labels must hold one label per row of the inputs, at least one. "
        f"Received: labels of shape {np.shape(labels)} for inputs of shapes [(2, 3), (1, 3)]. "
        "Give integer labels, not one-hot rows."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        check_labels_for(inputs, labels)
