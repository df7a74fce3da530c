import json

import numpy as np
import pytest

from keras_mrl import log_spaced_dims
from keras_mrl._dims import check_weights, check_width, warn_long_ladder
from tests.helpers.laws import exactly


@pytest.mark.parametrize(
    ("width", "smallest", "dims"),
    [
        (2048, 8, (8, 16, 32, 64, 128, 256, 512, 1024, 2048)),
        (100, 8, (8, 16, 32, 64, 100)),
        (9, 8, (8, 9)),
        (8, 8, (8,)),
        (5, 8, (5,)),
        (1, 1, (1,)),
        (7, 2, (2, 4, 7)),
    ],
)
def test_the_ladder_doubles_and_ends_at_the_width(
    width: int, smallest: int, dims: tuple[int, ...]
) -> None:
    assert log_spaced_dims(width, smallest=smallest) == dims


def test_a_ladder_of_numpy_integers_is_json() -> None:
    ladder = log_spaced_dims(np.int64(20), smallest=np.int32(8))  # type: ignore[arg-type]
    assert json.dumps(ladder) == "[8, 16, 20]"


@pytest.mark.parametrize("width", [0, -8, 8.0, True, None])
def test_a_width_that_is_no_positive_integer_is_refused(width: int) -> None:
    sentence = (
        f"dims must be strictly increasing positive integers. Received: dims=({width!r},). "
        "Give prefix lengths, for example dims=(8, 16, 32)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        log_spaced_dims(width)
    with pytest.raises(ValueError, match=exactly(sentence)):
        log_spaced_dims(64, smallest=width)


def test_dims_up_to_the_width_fit_and_one_more_does_not() -> None:
    check_width((2, 8), 8)
    sentence = (
        "dims must not exceed the width of the features. "
        "Received: dims=(2, 8) for features of width 7. "
        "Drop the dims above 7, or widen the layer that makes the features."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        check_width((2, 8), 7)


def test_no_weights_are_ones() -> None:
    assert check_weights(None, 3) == (1.0, 1.0, 1.0)


def test_weights_become_floats() -> None:
    weights = check_weights(np.array([2, 0, 1]), 3)  # type: ignore[arg-type]
    assert json.dumps(weights) == "[2.0, 0.0, 1.0]"


def test_weights_of_another_number_of_dims_are_refused() -> None:
    sentence = (
        "weights must hold one number per dim. "
        "Received: 2 weights (1.0, 2.0) for 3 dims. "
        "Give as many weights as the head has dims, or weights=None for ones."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        check_weights((1, 2), 3)


@pytest.mark.parametrize("last", [-1.0, float("nan"), float("inf"), 0.0])
def test_weights_that_cannot_weigh_are_refused(last: float) -> None:
    sentence = (
        "weights must be finite, not negative, and not all zero. "
        f"Received: weights=(0.0, {last}). "
        "Give a dim weight 0 to leave it out, a larger one to favour it."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        check_weights((0, last), 2)


@pytest.mark.parametrize(
    ("dims", "width"),
    [((8, 16, 32, 64), 64), ((1, 2, 4), 8), ((1, 2, 5), 15), ((1,), 1), ((8,), 9)],
)
def test_a_ladder_of_log2_of_the_width_is_as_long_as_the_papers(
    dims: tuple[int, ...], width: int
) -> None:
    warn_long_ladder(dims, width)  # any warning is an error here


@pytest.mark.parametrize(
    ("dims", "width", "longest"), [((1, 2, 4, 8), 8, 3), ((1, 2, 4, 9), 15, 3), ((1, 2), 3, 1)]
)
def test_a_longer_ladder_is_warned_of(dims: tuple[int, ...], width: int, longest: int) -> None:
    sentence = (
        f"Features of width {width} should have at most floor(log2 {width}) = {longest} dims. "
        f"Received: {len(dims)} dims {dims}. "
        "Drop some: dims between two that were trained are nearly as good as trained ones."
    )
    with pytest.warns(UserWarning, match=exactly(sentence)) as caught:
        warn_long_ladder(dims, width)
    assert len(caught) == 1
