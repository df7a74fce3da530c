"""Integers of any library as Python's own: one, a positive one, and dims."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import pairwise
from typing import Any


def check_dims(dims: Iterable[int]) -> tuple[int, ...]:
    """Return `dims` as a tuple of ints, strictly increasing and positive.

    Raises:
        ValueError: If `dims` are empty, not integers, not positive, unsorted or repeated.

    Examples:
        >>> check_dims([8, 16])
        (8, 16)
    """
    received: Any = tuple(dims) if isinstance(dims, Iterable) else dims
    try:
        checked = tuple(map(as_int, received))
    except TypeError:
        checked = ()
    increasing = all(a < b for a, b in pairwise((0, *checked)))
    if not checked or not increasing:
        positive = tuple(sorted({d for d in checked if d > 0}))
        remedy = (
            f"Sort them and drop repeats: dims={positive}."
            if positive
            else "Give prefix lengths, for example dims=(8, 16, 32)."
        )
        raise ValueError(
            "dims must be strictly increasing positive integers. "
            f"Received: dims={received}. {remedy}"
        )
    return checked


def as_int(value: Any) -> int:
    """Return an integer of any library as Python's own.

    Raises:
        TypeError: If `value` is not an integer; True and 8.0 are not.

    Examples:
        >>> as_int(np.int64(8))
        8
    """
    if isinstance(value, bool):
        raise TypeError(f"An integer is needed. Received: {value!r}. Write it as an integer.")
    return operator.index(value)


def is_positive_integer(value: object) -> bool:
    """Whether `value` is an integer of any library, 1 or greater; True and 8.0 are not.

    Examples:
        >>> is_positive_integer(np.int64(8)), is_positive_integer(8.0)
        (True, False)
    """
    try:
        return as_int(value) > 0
    except TypeError:
        return False


def check_positive_integer(name: str, value: Any, remedy: str) -> int:
    """Return a positive integer of any library as Python's own.

    Args:
        name: Name of the argument, for the error.
        value: Its value.
        remedy: Last sentence of the error: what the caller should do.

    Raises:
        ValueError: If `value` is not a positive integer.

    Examples:
        >>> check_positive_integer("k", np.int64(5), "Give for example k=10.")
        5
    """
    if not is_positive_integer(value):
        raise ValueError(f"{name} must be a positive integer. Received: {name}={value!r}. {remedy}")
    return as_int(value)
