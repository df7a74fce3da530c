"""The JSON of a REST predict call: its body to arrays, and arrays to its answer.

Bodies are checked in TensorFlow Serving's words, and numbers are written digit by digit as it
writes them.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from math import isfinite, isinf, prod
from typing import Any

import numpy as np
import tensorflow as tf

from .status import StatusError, invalid_argument, unimplemented

_ENCODER = json.JSONEncoder(indent=4, ensure_ascii=False)
_MAX_TEXT = 2**16
_MAX_RANK = 64  # NumPy's
_TOO_DEEP = "JSON Parse error: The document is nested too deeply."
_MAY_OVERFLOW_A_DOUBLE = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{309}")
_SIGNIFICAND_BITS = {tf.float32: 24, tf.float64: 53}
_ALL_DIGITS = {tf.float32: 9, tf.float64: 17}
_INT32 = range(-(2**31), 2**31)
_INTEGERS = {
    # The narrow types take any int32 and keep its low bits, as `int_val` does.
    **dict.fromkeys((tf.int8, tf.int16, tf.int32, tf.uint8), _INT32),
    tf.int64: range(-(2**63), 2**63),
    tf.uint32: range(2**32),
    tf.uint64: range(2**64),
}
_INTEGER_TOKENS = range(-(2**63), 2**64)  # beyond these a number is a double to TensorFlow Serving
_TYPE_NAMES = {dict: "Object", list: "Array", str: "String", int: "Number", float: "Number"}
_DTYPE_NAMES = {"float16": "half", "float32": "float", "float64": "double"}


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Args:
        body: the body, as it came over HTTP.

    Raises:
        StatusError: INVALID_ARGUMENT, it is no JSON, no object, or `signature_name` no string.
    """
    if not body:
        raise invalid_argument("JSON Parse error: The document is empty")
    try:
        parsers = _CHECKING_PARSERS if _MAY_OVERFLOW_A_DOUBLE.search(body) else {}
        document = json.loads(body.decode("utf-8-sig"), **parsers)
        if b"\\u" in body:  # half a surrogate pair parses, but fits into no tensor or message
            json.dumps(document, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise invalid_argument(f"JSON Parse error: {error.msg}. at offset: {error.pos}") from error
    except UnicodeEncodeError as error:
        text = "JSON Parse error: The surrogate pair in string is invalid."
        raise invalid_argument(text) from error
    except UnicodeDecodeError as error:
        raise invalid_argument(f"JSON Parse error: {error}.") from error
    except (ValueError, OverflowError) as error:  # ValueError: more digits than Python reads
        text = "JSON Parse error: Number too big to be stored in double."
        raise invalid_argument(text) from error
    except RecursionError as error:
        raise invalid_argument(_TOO_DEEP) from error
    if not isinstance(document, dict):
        raise _format_error(document, "Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise _format_error(
            document, "not formatted correctly. 'signature_name' key must be a string value."
        )
    return document


def _finite_float(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise OverflowError
    return value


def _finite_int(text: str) -> int:
    value = int(text)
    float(value)  # raises OverflowError
    return value


_CHECKING_PARSERS: dict[str, Any] = {"parse_float": _finite_float, "parse_int": _finite_int}


def read_inputs(document: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a predict body, by input name.

    Args:
        document: the body; `instances` lists rows, `inputs` holds columns.
        declared: the inputs of the signature: a `TensorInfo` by name.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    if "instances" not in document and "inputs" not in document:
        raise invalid_argument("Missing 'inputs' or 'instances' key")
    if "instances" in document and "inputs" in document:
        raise _format_error(
            document,
            "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist ",
        )
    dtypes = {name: tf.as_dtype(declared[name].dtype) for name in sorted(declared)}
    try:
        if "inputs" in document:
            return _read_columns(document["inputs"], dtypes)
        if not isinstance(document["instances"], list):
            raise _format_error(document, "Excepting 'instances' to be an list/array")
        if not document["instances"]:
            raise _format_error(document, "No values in 'instances' array")
        return _read_rows(document["instances"], dtypes)
    except RecursionError as error:
        raise invalid_argument(_TOO_DEEP) from error


def _read_columns(value: Any, dtypes: Mapping[str, tf.DType]) -> dict[str, np.ndarray]:
    if not _is_named(value):
        if len(dtypes) > 1:
            raise invalid_argument(
                "inputs is a plain value/list, but expecting an object as multiple input tensors "
                "required as per tensorinfo_map"
            )
        value = dict.fromkeys(dtypes, value)
    arrays = {}
    for name, dtype in dtypes.items():
        if name not in value:
            raise invalid_argument(f"Missing named input: {name} in 'inputs' object.")
        shape, values = _flattened(value[name], dtype)
        arrays[name] = _array(name, values, shape, dtype)
    return arrays


def _read_rows(rows: list[Any], dtypes: Mapping[str, tf.DType]) -> dict[str, np.ndarray]:
    if not isinstance(rows[0], dict) and len(dtypes) > 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    are_named = _is_named(rows[0])
    shapes: dict[str, tuple[int, ...]] = {}
    columns: dict[str, list[Any]] = {name: [] for name in dtypes}
    for index, row in enumerate(rows):
        element = f"Failed to process element: {index}"
        if are_named != _is_named(row):
            kinds = ("object", "list") if are_named else ("value/list", "object")
            raise invalid_argument(
                f"Expecting {kinds[0]} but got {kinds[1]} at item {index} of input list"
            )
        items = row if are_named else {next(iter(dtypes)): row}
        for name, item in items.items():
            try:
                if name not in dtypes:
                    raise invalid_argument(f"JSON object: does not have named input: {name}")
                shape, values = _flattened(item, dtypes[name])
                _check_same_shape(shapes.setdefault(name, shape), shape)
            except StatusError as error:
                key = f" key: {name}" if are_named else ""
                raise invalid_argument(
                    f"{element}{key} of 'instances' list. Error: {error.code.name}: {error}"
                ) from error
            columns[name].extend(values)
        if items.keys() != dtypes.keys():
            raise invalid_argument(
                f"{element} of 'instances' list. JSON object: {_text(row)} must only have keys: "
                f"{','.join(dtypes)}"
            )
    return {
        name: _array(name, columns[name], (len(rows), *shapes[name]), dtype)
        for name, dtype in dtypes.items()
    }


def _is_named(value: Any) -> bool:
    """Whether a value is an object of tensors by name, not one of bytes."""
    return isinstance(value, dict) and not _is_base64(value)


def _is_base64(value: Any) -> bool:
    """Whether a value is an object that stands for bytes, `{"b64": "..."}`."""
    return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def _check_same_shape(first: tuple[int, ...], shape: tuple[int, ...]) -> None:
    sizes = [prod(s) for s in (first, shape)]
    if sizes[0] != sizes[1]:
        raise invalid_argument(f"Expecting tensor size: {sizes[0]} but got: {sizes[1]}")
    if first != shape:
        texts = ["[" + ",".join(map(str, s)) + "]" for s in (first, shape)]
        raise invalid_argument(f"Expecting shape {texts[0]} but got: {texts[1]}")


def _flattened(value: Any, dtype: tf.DType) -> tuple[tuple[int, ...], list[Any]]:
    """The shape of nested lists and their checked values; first elements give the shape."""
    shape = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        if not first:
            break
        first = first[0]
    return tuple(shape), _checked_values(list(_leaves(value, tuple(shape), 0)), dtype)


def _leaves(value: Any, shape: tuple[int, ...], level: int) -> Iterator[Any]:
    rank = len(shape)
    if not isinstance(value, list):
        if level != rank:
            raise invalid_argument(
                f"JSON Value: {_text(value)} found at incorrect level: {level + 1} in the JSON "
                f"DOM. Expected at level: {rank}"
            )
        yield value
        return
    if level >= rank:
        raise invalid_argument(f"Encountered list at unexpected level: {level} expected < {rank}")
    if len(value) != shape[level]:
        raise invalid_argument(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: "
            f"{shape[level]}"
        )
    if level == rank - 1 and list not in set(map(type, value)):
        yield from value
        return
    for item in value:
        yield from _leaves(item, shape, level + 1)


def _checked_values(values: list[Any], dtype: tf.DType) -> list[Any]:
    """The values, strings as bytes, if the dtype takes each of them."""
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
        kind = _dtype_name(dtype)
        raise unimplemented(f"Conversion of JSON Value: {_text(values[0])} to type: {kind}")
    return values


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
        is_lossless = abs(value) <= (exact if is_integer else largest)
        if not is_lossless and (isinstance(value, int) or isfinite(value)):
            raise invalid_argument(
                f"Cannot convert JSON value: {_text(value)} to {_dtype_name(dtype)} without "
                "loss of precision."
            )


def _bytes_of(value: str | dict[str, Any]) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not _is_base64(value):
        raise _format_error(value, "not formatted correctly for base64 data")
    digits = value["b64"].rstrip("=")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError as error:
        raise invalid_argument("Unable to base64 decode") from error


def _array(name: str, values: list[Any], shape: tuple[int, ...], dtype: tf.DType) -> np.ndarray:
    """The array of checked values in row-major order."""
    if len(shape) > _MAX_RANK:
        raise invalid_argument(f"tensor parsing error: {name}")
    if dtype == tf.string:
        return np.array(values, object).reshape(shape)
    wide = np.int64 if dtype in _INTEGERS and dtype != tf.uint64 else dtype.as_numpy_dtype
    return np.array(values, wide).astype(dtype.as_numpy_dtype).reshape(shape)


def _type_error(value: Any, dtype: tf.DType) -> StatusError:
    kind = "Null" if value is None else _TYPE_NAMES.get(type(value), str(value))
    return _format_error(value, f"Type: {kind} is not of expected type: {_dtype_name(dtype)}")


def _format_error(value: Any, rule: str) -> StatusError:
    return invalid_argument(f"JSON Value: {_text(value)} {rule}")


def _text(value: Any) -> str:
    """A JSON value as errors print it; a long one is cut, which TensorFlow Serving's is not."""
    text = ""
    for piece in _ENCODER.iterencode(value):
        text += piece[: _MAX_TEXT + 1]
        if len(text) > _MAX_TEXT:
            return f"{text[:_MAX_TEXT]}...TRUNCATED"
    return text


def _dtype_name(dtype: tf.DType) -> str:
    """A dtype as errors print it."""
    return _DTYPE_NAMES.get(dtype.name, dtype.name)


def write_rows(outputs: Mapping[str, np.ndarray]) -> bytes:
    """The answer to `instances`: `{"predictions": [...]}`, one element a row.

    Args:
        outputs: arrays by name; the name is left out if there is only one.

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
    rows = (_object({name: columns[name][row] for name in columns}) for row in range(batch))
    return _encoded(f'{{"predictions": [{", ".join(rows)}]}}')


def write_columns(outputs: Mapping[str, np.ndarray]) -> bytes:
    """The answer to `inputs`: `{"outputs": ...}`, each output whole.

    Args:
        outputs: arrays by name; the name is left out if there is only one.

    Raises:
        StatusError: INVALID_ARGUMENT, an output has no JSON form.
    """
    texts = {name: _elements(name, outputs[name], 0)[0] for name in sorted(outputs)}
    return _encoded(f'{{"outputs": {_object(texts)}}}')


def _object(texts: Mapping[str, str]) -> str:
    """The JSON object of values that are JSON already; a single one loses its name."""
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "{" + ", ".join(f"{_quoted(name)}: {text}" for name, text in texts.items()) + "}"


def _elements(name: str, array: np.ndarray, axis: int) -> list[str]:
    """The JSON of each element along the axes before `axis`, in row-major order."""
    texts = _scalars(name, array)
    for inner in reversed(range(axis, array.ndim)):
        size = array.shape[inner]
        starts = (i * size for i in range(prod(array.shape[:inner])))
        texts = ["[" + ", ".join(texts[start : start + size]) + "]" for start in starts]
    return texts


def _scalars(name: str, array: np.ndarray) -> list[str]:
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
        return [_quoted(value.decode(errors="surrogateescape")) for value in values]
    raise invalid_argument(f"Failed to write JSON value for tensor type: {_dtype_name(dtype)}")


def _decimal(value: float, kind: type[np.floating], all_digits: int) -> str:
    """Six digits if they are enough to get the number back, else all of them."""
    if not isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    text = f"{value:g}"
    if kind(text) != value:
        text = f"{value:.{all_digits}g}"
    return text if "." in text or "e" in text else f"{text}.0"


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _encoded(text: str) -> bytes:
    # Strings that are no UTF-8 go out byte by byte as the model gave them.
    return text.encode(errors="surrogateescape")
