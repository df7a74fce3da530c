"""Arrays to JSON: the answer to a REST predict call, number by number as TensorFlow Serving."""

import base64
import json
from collections.abc import Mapping
from math import isfinite, prod

import numpy as np
import tensorflow as tf

from .json_values import dtype_name
from .status import invalid_argument

_INTEGERS = (tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint32, tf.uint64)
_ALL_DIGITS = {tf.float32: 9, tf.float64: 17}


def write_rows(outputs: Mapping[str, np.ndarray]) -> bytes:
    """The answer to `instances`: `{"predictions": [...]}`, one element per row.

    Args:
        outputs: arrays by name; the name is left out where there is but one.

    Raises:
        StatusError: INVALID_ARGUMENT, the outputs have no common batch or no JSON form.
    """
    batch = 0
    for name in sorted(outputs):
        shape = outputs[name].shape
        if not shape:
            raise invalid_argument(f"Tensor name: {name} has no shape information ")
        if shape[0] < 1:
            raise invalid_argument(f"Tensor name: {name} has invalid batch size: {shape[0]}")
        if batch not in (0, shape[0]):
            raise invalid_argument(
                f"Tensor name: {name} has inconsistent batch size: {shape[0]} expecting: {batch}"
            )
        batch = shape[0]
    columns = {name: _elements(name, outputs[name], 1) for name in sorted(outputs)}
    rows = (_named({name: columns[name][row] for name in columns}) for row in range(batch))
    return _encoded(f'{{"predictions": [{", ".join(rows)}]}}')


def write_columns(outputs: Mapping[str, np.ndarray]) -> bytes:
    """The answer to `inputs`: `{"outputs": ...}`, each output whole.

    Args:
        outputs: arrays by name; the name is left out where there is but one.

    Raises:
        StatusError: INVALID_ARGUMENT, an output has no JSON form.
    """
    texts = {name: _elements(name, outputs[name], 0)[0] for name in sorted(outputs)}
    return _encoded(f'{{"outputs": {_named(texts)}}}')


def _named(texts: Mapping[str, str]) -> str:
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "{" + ", ".join(f"{_string(name)}: {text}" for name, text in texts.items()) + "}"


def _elements(name: str, array: np.ndarray, axis: int) -> list[str]:
    """The JSON of each element along the axes before `axis`, in row-major order."""
    texts = _values(name, array)
    for inner in reversed(range(axis, array.ndim)):
        size = array.shape[inner]
        starts = (i * size for i in range(prod(array.shape[:inner])))
        texts = ["[" + ", ".join(texts[start : start + size]) + "]" for start in starts]
    return texts


def _values(name: str, array: np.ndarray) -> list[str]:
    dtype, values = tf.as_dtype(array.dtype), array.ravel().tolist()
    if dtype in _ALL_DIGITS:
        return [_decimal(value, array.dtype.type, _ALL_DIGITS[dtype]) for value in values]
    if dtype in _INTEGERS:
        return list(map(str, values))
    if dtype == tf.bool:
        return ["true" if value else "false" for value in values]
    if dtype == tf.string and name.endswith("_bytes"):
        return [f'{{"b64": "{base64.b64encode(value).decode()}"}}' for value in values]
    if dtype == tf.string:
        return [_string(value.decode(errors="surrogateescape")) for value in values]
    raise invalid_argument(f"Failed to write JSON value for tensor type: {dtype_name(dtype)}")


def _decimal(value: float, kind: type[np.floating], all_digits: int) -> str:
    """Six digits if they are enough to get the number back, else all of them."""
    if not isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    text = f"{value:g}"
    if kind(text) != value:
        text = f"{value:.{all_digits}g}"
    return text if "." in text or "e" in text else f"{text}.0"


def _string(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _encoded(text: str) -> bytes:
    # Strings that are no UTF-8 go out byte by byte as the model gave them.
    return text.encode(errors="surrogateescape")
