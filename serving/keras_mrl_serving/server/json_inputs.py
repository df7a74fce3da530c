"""JSON to arrays: the body of a REST predict call, checked in TensorFlow Serving's words."""

import json
import re
from collections.abc import Iterator, Mapping
from math import isinf, prod
from typing import Any

import numpy as np
import tensorflow as tf

from .json_values import array_of, checked_values, format_error, is_base64, text_of
from .status import StatusError, invalid_argument

_MAX_RANK = 64  # NumPy's
_TOO_DEEP = "JSON Parse error: The document is nested too deeply."
_MAYBE_TOO_BIG = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{309}")  # for a double


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object a body holds.

    Args:
        body: what came over HTTP.

    Raises:
        StatusError: INVALID_ARGUMENT, it is no JSON, no object, or `signature_name` no string.
    """
    if not body:
        raise invalid_argument("JSON Parse error: The document is empty")
    try:
        numbers = _FINITE if _MAYBE_TOO_BIG.search(body) else {}
        document = json.loads(body.decode("utf-8-sig"), **numbers)
        if b"\\u" in body:  # half a surrogate pair parses, and no tensor or message can hold it
            json.dumps(document, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise invalid_argument(f"JSON Parse error: {error.msg}. at offset: {error.pos}") from error
    except UnicodeEncodeError as error:
        reason = "JSON Parse error: The surrogate pair in string is invalid."
        raise invalid_argument(reason) from error
    except UnicodeDecodeError as error:
        raise invalid_argument(f"JSON Parse error: {error}.") from error
    except (ValueError, OverflowError) as error:  # more digits than Python reads, among others
        reason = "JSON Parse error: Number too big to be stored in double."
        raise invalid_argument(reason) from error
    except RecursionError as error:
        raise invalid_argument(_TOO_DEEP) from error
    if not isinstance(document, dict):
        raise format_error(document, "Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise format_error(
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


_FINITE: dict[str, Any] = {"parse_float": _finite_float, "parse_int": _finite_int}


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
        raise format_error(
            document,
            "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist ",
        )
    dtypes = {name: tf.as_dtype(declared[name].dtype) for name in sorted(declared)}
    try:
        if "inputs" in document:
            return _read_columns(document["inputs"], dtypes)
        if not isinstance(document["instances"], list):
            raise format_error(document, "Excepting 'instances' to be an list/array")
        if not document["instances"]:
            raise format_error(document, "No values in 'instances' array")
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
    named = _is_named(rows[0])
    shapes: dict[str, tuple[int, ...]] = {}
    columns: dict[str, list[Any]] = {name: [] for name in dtypes}
    for index, row in enumerate(rows):
        element = f"Failed to process element: {index}"
        if named != _is_named(row):
            kinds = ("object", "list") if named else ("value/list", "object")
            raise invalid_argument(
                f"Expecting {kinds[0]} but got {kinds[1]} at item {index} of input list"
            )
        items = row if named else {next(iter(dtypes)): row}
        for name, item in items.items():
            try:
                if name not in dtypes:
                    raise invalid_argument(f"JSON object: does not have named input: {name}")
                shape, values = _flattened(item, dtypes[name])
                _check_same_shape(shapes.setdefault(name, shape), shape)
            except StatusError as error:
                key = f" key: {name}" if named else ""
                raise invalid_argument(
                    f"{element}{key} of 'instances' list. Error: {error.code.name}: {error}"
                ) from error
            columns[name].extend(values)
        if items.keys() != dtypes.keys():
            raise invalid_argument(
                f"{element} of 'instances' list. JSON object: {text_of(row)} must only have keys: "
                f"{','.join(dtypes)}"
            )
    return {
        name: _array(name, columns[name], (len(rows), *shapes[name]), dtype)
        for name, dtype in dtypes.items()
    }


def _is_named(value: Any) -> bool:
    """Whether it is an object of tensors by name, and not one of bytes."""
    return isinstance(value, dict) and not is_base64(value)


def _check_same_shape(first: tuple[int, ...], shape: tuple[int, ...]) -> None:
    sizes = [prod(s) for s in (first, shape)]
    if sizes[0] != sizes[1]:
        raise invalid_argument(f"Expecting tensor size: {sizes[0]} but got: {sizes[1]}")
    if first != shape:
        texts = ["[" + ",".join(map(str, s)) + "]" for s in (first, shape)]
        raise invalid_argument(f"Expecting shape {texts[0]} but got: {texts[1]}")


def _flattened(value: Any, dtype: tf.DType) -> tuple[tuple[int, ...], list[Any]]:
    """Shape and values of nested lists; the first element at each level tells the shape."""
    shape = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        if not first:
            break
        first = first[0]
    return tuple(shape), checked_values(list(_leaves(value, tuple(shape), 0)), dtype)


def _leaves(value: Any, shape: tuple[int, ...], level: int) -> Iterator[Any]:
    rank = len(shape)
    if not isinstance(value, list):
        if level != rank:
            raise invalid_argument(
                f"JSON Value: {text_of(value)} found at incorrect level: {level + 1} in the JSON "
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


def _array(name: str, values: list[Any], shape: tuple[int, ...], dtype: tf.DType) -> np.ndarray:
    if len(shape) > _MAX_RANK:
        raise invalid_argument(f"tensor parsing error: {name}")
    return array_of(values, shape, dtype)
