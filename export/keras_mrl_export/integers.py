"""Which integers count as such."""

from __future__ import annotations

from keras_mrl_serving.contract import as_int


def is_positive(value: object) -> bool:
    """Whether `value` is an integer of at least 1, of Python or of NumPy."""
    try:
        return as_int(value) > 0
    except TypeError:
        return False
