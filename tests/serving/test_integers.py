"""Integers and dims: what is taken, and what is refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.integers import (
    as_int,
    check_dims,
    check_positive_integer,
    is_positive_integer,
)

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]


@pytest.mark.parametrize(
    "dims",
    [
        (8, 16, 2048),
        [8, 16, 2048],
        np.array([8, 16, 2048]),
        (np.int8(8), np.uint16(16), np.array(2048)),
        iter([8, 16, 2048]),
        {8: 0, 16: 0, 2048: 0},
    ],
)
def test_dims_are_ints_in_a_tuple(dims: Any) -> None:
    checked = check_dims(dims)
    assert checked == (8, 16, 2048)
    assert {type(dim) for dim in checked} == {int}


@pytest.mark.parametrize(
    ("dims", "received", "remedy"),
    [
        ((16, 8, 8), "(16, 8, 8)", "Sort them and drop repeats: dims=(8, 16)."),
        ((8, 8), "(8, 8)", "Sort them and drop repeats: dims=(8,)."),
        ((0, 8), "(0, 8)", "Sort them and drop repeats: dims=(8,)."),
        ((-8, 16), "(-8, 16)", "Sort them and drop repeats: dims=(16,)."),
        ((), "()", "Give prefix lengths, for example dims=(8, 16, 32)."),
        ((-1,), "(-1,)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        ((8.0,), "(8.0,)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        ((True,), "(True,)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        ((np.True_,), "(np.True_,)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        (("8",), "('8',)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        ("816", "('8', '1', '6')", "Give prefix lengths, for example dims=(8, 16, 32)."),
        ((None,), "(None,)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        (([8],), "([8],)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        ((np.array(8.5),), "(array(8.5),)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        ((np.array([8]),), "(array([8]),)", "Give prefix lengths, for example dims=(8, 16, 32)."),
        (8, "8", "Give prefix lengths, for example dims=(8, 16, 32)."),
        (None, "None", "Give prefix lengths, for example dims=(8, 16, 32)."),
    ],
)
def test_other_dims_are_refused(dims: Any, received: str, remedy: str, refuses: Refuses) -> None:
    rule = "dims must be strictly increasing positive integers."
    with refuses(ValueError, f"{rule} Received: dims={received}. {remedy}"):
        check_dims(dims)


@given(st.sets(st.integers(1, 10_000), min_size=1))
def test_dims_given_as_a_set_are_either_in_order_or_told_so(dims: set[int]) -> None:
    if list(dims) == sorted(dims):
        assert check_dims(dims) == tuple(sorted(dims))
        return
    with pytest.raises(ValueError, match="Sort them and drop repeats: ") as caught:
        check_dims(dims)
    assert str(caught.value).endswith(f" dims={tuple(sorted(dims))}.")


def test_an_integer_is_python_s_own(refuses: Refuses) -> None:
    assert type(as_int(np.int64(8))) is int
    text = "An integer is needed. Received: True. Write it as an integer."
    with refuses(TypeError, text):
        as_int(True)


@pytest.mark.parametrize("value", [True, False, 0, -1, 8.0, "8", None, np.float32(8), [8]])
def test_only_integers_from_1_are_positive_integers(value: object, refuses: Refuses) -> None:
    assert not is_positive_integer(value)
    text = f"k must be a positive integer. Received: k={value!r}. Give for example k=10."
    with refuses(ValueError, text):
        check_positive_integer("k", value, "Give for example k=10.")


@pytest.mark.parametrize("value", [1, 2**70, np.int8(5), np.uint64(5)])
def test_positive_integers_of_any_library_become_python_s_own(value: Any) -> None:
    assert is_positive_integer(value)
    checked = check_positive_integer("k", value, "Give for example k=10.")
    assert type(checked) is int
    assert checked == value
