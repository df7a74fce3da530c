"""Anchors, positives and negatives are found among the inputs of a batch."""

import numpy as np
import pytest

from keras_mrl.models.sides import are_sides, sides_of
from tests.helpers.laws import exactly


def test_negatives_of_one_more_axis_are_as_many_sides() -> None:
    rows = np.arange(12.0).reshape(4, 3)
    stacked = np.stack([rows, -rows], axis=1)
    sides = sides_of([rows, rows, stacked, 2 * rows])
    np.testing.assert_array_equal(sides, [rows, rows, rows, -rows, 2 * rows])
    assert sides_of([(None, 7), (None, 3), (None, 2, 3)]) == [(None, 7), *[(None, 3)] * 3]


def test_negatives_of_several_inputs_are_taken_apart_together() -> None:
    side = {"left": (None, 5), "right": (None, 2, 3)}
    wide = {"left": (None, 2, 5), "right": (None, 2, 2, 3)}
    assert sides_of({"positive": side, "anchor": side, "negative": wide}) == [side] * 4


def test_numbers_order_negatives() -> None:
    names = ("negative_10", "positive", "negative_2", "anchor")
    assert sides_of({name: (None, index) for index, name in enumerate(names)}) == [
        (None, 3),
        (None, 1),
        (None, 2),
        (None, 0),
    ]


def test_inputs_of_one_side_have_no_sides() -> None:
    for inputs in (np.ones(3), {"left": np.ones(3)}, (None, 5)):
        assert sides_of(inputs) is None
        assert not are_sides(inputs)


@pytest.mark.parametrize("counts", [(None, None), (2, 3)])
def test_a_number_of_negatives_that_is_not_known_is_refused(counts: tuple[int, int]) -> None:
    side = {"left": (None, 5), "right": (None, 3)}
    wide = {"left": (None, counts[0], 5), "right": (None, counts[1], 3)}
    sentence = (
        "Every row must have one known number of hard negatives. "
        f"Received: negatives of shapes (None, {counts[0]}, 5), (None, {counts[1]}, 3). "
        "Give as many negatives for every row, in arrays (batch, negatives, ...)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        sides_of((side, side, wide))
