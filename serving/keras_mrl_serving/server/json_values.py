"""The values of a JSON tensor: which a dtype takes, and how TensorFlow Serving refuses the rest."""

import base64
import json
from math import isfinite
from typing import Any

import grpc
import numpy as np
import tensorflow as tf

from .status import StatusError, invalid_argument

_SIGNIFICAND_BITS = {tf.float32: 24, tf.float64: 53}
_INT32 = range(-(2**31), 2**31)
_INTEGERS = {
    # The narrow ones take any int32 and keep its low bits, as `int_val` does.
    tf.int8: _INT32,
    tf.int16: _INT32,
    tf.int32: _INT32,
    tf.uint8: _INT32,
    tf.int64: range(-(2**63), 2**63),
    tf.uint32: range(2**32),
    tf.uint64: range(2**64),
}
_INTEGER_TOKENS = range(-(2**63), 2**64)  # beyond these a number is a double to TensorFlow Serving
_TYPE_NAMES = {dict: "Object", list: "Array", str: "String", int: "Number", float: "Number"}
_DTYPE_NAMES = {"float16": "half", "float32": "float", "float64": "double"}


def is_base64(value: Any) -> bool:
    """Whether a JSON value is an object that stands for bytes, `{"b64": "..."}`."""
    return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def checked_values(values: list[Any], dtype: tf.DType) -> list[Any]:
    """The values, strings as bytes, if `dtype` takes each of them.

    Args:
        values: JSON values other than lists.
        dtype: the dtype of the input.

    Raises:
        StatusError: INVALID_ARGUMENT, or UNIMPLEMENTED for a dtype that JSON has no values for.
    """
    if dtype in _SIGNIFICAND_BITS:
        _check_types(values, (int, float), dtype)
        _check_lossless(values, dtype)
    elif dtype in _INTEGERS:
        _check_types(values, (int,), dtype)
        for value in values:
            if value not in _INTEGERS[dtype]:
                raise _type_error(value, dtype)
    elif dtype == tf.bool:
        _check_types(values, (bool,), dtype)
    elif dtype == tf.string:
        _check_types(values, (str, dict), dtype)
        return [_bytes_of(value) for value in values]
    elif values:
        raise StatusError(
            grpc.StatusCode.UNIMPLEMENTED,
            f"Conversion of JSON Value: {text_of(values[0])} to type: {dtype_name(dtype)}",
        )
    return values


def array_of(values: list[Any], shape: tuple[int, ...], dtype: tf.DType) -> np.ndarray:
    """The array of checked values.

    Args:
        values: what `checked_values` returned, in row-major order.
        shape: the shape of the array.
        dtype: the dtype of the input.
    """
    if dtype == tf.string:
        return np.array(values, object).reshape(shape)
    wide = np.int64 if dtype in _INTEGERS and dtype != tf.uint64 else dtype.as_numpy_dtype
    return np.array(values, wide).astype(dtype.as_numpy_dtype).reshape(shape)


def format_error(value: Any, rule: str) -> StatusError:
    """The error of a JSON value that breaks a rule."""
    return invalid_argument(f"JSON Value: {text_of(value)} {rule}")


def text_of(value: Any) -> str:
    """A JSON value as errors print it."""
    return json.dumps(value, indent=4, ensure_ascii=False)


def dtype_name(dtype: tf.DType) -> str:
    """A dtype as errors print it."""
    return _DTYPE_NAMES.get(dtype.name, dtype.name)


def _check_types(values: list[Any], types: tuple[type, ...], dtype: tf.DType) -> None:
    if not set(map(type, values)) <= set(types):
        raise _type_error(next(value for value in values if type(value) not in types), dtype)


def _check_lossless(values: list[Any], dtype: tf.DType) -> None:
    exact = 2 ** _SIGNIFICAND_BITS[dtype] - 1
    if (np.abs(np.array(values, np.float64)) <= exact).all():
        return
    largest = float(np.finfo(dtype.as_numpy_dtype).max)
    for value in values:
        is_integer = isinstance(value, int) and value in _INTEGER_TOKENS
        lossless = abs(value) <= (exact if is_integer else largest)
        if not lossless and (isinstance(value, int) or isfinite(value)):
            raise invalid_argument(
                f"Cannot convert JSON value: {text_of(value)} to {dtype_name(dtype)} without "
                "loss of precision."
            )


def _bytes_of(value: str | dict[str, Any]) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not is_base64(value):
        raise format_error(value, "not formatted correctly for base64 data")
    digits = value["b64"].rstrip("=")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError as error:
        raise invalid_argument("Unable to base64 decode") from error


def _type_error(value: Any, dtype: tf.DType) -> StatusError:
    kind = "Null" if value is None else _TYPE_NAMES.get(type(value), str(value))
    return invalid_argument(
        f"JSON Value: {text_of(value)} Type: {kind} is not of expected type: {dtype_name(dtype)}"
    )
