"""A server's message measured as bytes, before anything is made of it.

protobuf makes an object of every nested message, of two bytes or of many, so a message may become
fifty times as large in memory. Here its fields are walked first: nothing is copied, and nothing is
made of a field whose length and number do not fit what was asked. A tensor is known by its dtype
and shape, which every serializer writes before the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from . import _wire_pb2 as wire
from .answers import check_answer
from .calls import Call, Header, Output, array_dtype

# An answer of no more bytes is parsed as it is: in memory it stays below 8 MB, whatever it holds.
SMALL_BYTES = 2**16
# Nor are the fields of tensors of no more bytes counted, one by one: of them the sizes of a shape
# alone take much more memory than bytes, twenty times as much.
_COUNTED_BYTES = 2**18

_LONGEST_NAME = 1024
_LONGEST_SHAPE = 1024  # bytes: room for 32 sizes and a few names
_HIGHEST_RANK = 32
_MOST_OUTPUTS = 4096
_MOST_FIELDS = 64  # of a tensor, besides its strings; a serializer writes four
_NUMBER_BYTES = 12  # of one number at most, with the tag of one that stands alone
_DAMAGED = "The answer is damaged: ask again, and if it stays so look at what the server runs."
_EMPTY = memoryview(b"")
_STRING = array_dtype("string")


def parse_answer(data: bytes, call: Call) -> wire.PredictResponse:
    """Return an answer; of one that is not small, only the outputs that the call reads.

    Raises:
        ManifestError: If an output is missing, or of another dtype or shape than promised.
        ValueError: If it is no such message, or an output holds more than its shape needs.
    """
    if len(data) <= SMALL_BYTES:
        return wire.PredictResponse.FromString(data)
    response = wire.PredictResponse()
    outputs: dict[str, memoryview] = {}
    others: list[str] = []
    num_fields = 0
    for number, value in _most(fields(memoryview(data)), _MOST_OUTPUTS, "an answer"):
        num_fields += 1
        if number == 2 and len(_as_bytes(value)) <= SMALL_BYTES:
            response.model_spec.MergeFromString(bytes(value))
        elif number == 1:
            parts = list(_most(fields(_as_bytes(value)), 2, "an output"))
            entry = dict(parts)
            if len(entry) < len(parts):
                raise ValueError(
                    f"an output must be one name and one tensor. Received: two. {_DAMAGED}"
                )
            name = str(_as_bytes(entry.get(1, _EMPTY))[:_LONGEST_NAME], "utf-8")
            if call.reads(name):
                outputs[name] = _as_bytes(entry.get(2, _EMPTY))
            else:
                others.append(name)
    headers = {name: _header(tensor) for name, tensor in outputs.items()}
    check_answer(call, headers, others, response.model_spec.version.value)
    are_large = sum(map(len, outputs.values())) > _COUNTED_BYTES
    for name, tensor in outputs.items():
        _check_length(name, tensor, headers[name], call.promised.get(name))
        if are_large:
            _check_fields(name, tensor, headers[name])
    if num_fields == len(outputs) + response.HasField("model_spec"):  # nothing to leave out
        return wire.PredictResponse.FromString(data)
    for name, tensor in outputs.items():
        response.outputs[name].MergeFromString(bytes(tensor))
    return response


def _header(tensor: memoryview) -> Header:
    """Return dtype and shape of a tensor, its first two fields."""
    first = dict(islice(fields(tensor), 2))
    dtype, shape = first.get(1), _as_bytes(first.get(2, _EMPTY))
    if len(shape) > _LONGEST_SHAPE:
        raise ValueError(
            f"a tensor's shape must have at most {_HIGHEST_RANK} sizes. "
            f"Received: {len(shape)} bytes of them. {_DAMAGED}"
        )
    number = dtype if isinstance(dtype, int) else wire.DT_INVALID
    sizes = wire.TensorShapeProto.FromString(bytes(shape))
    return _ARRAY_DTYPES.get(number) or str(number), full_shape(sizes)


def header(tensor: wire.TensorProto) -> Header:
    """Return the dtype that a tensor will have as an array, and its shape."""
    number = tensor.dtype
    return _ARRAY_DTYPES.get(number) or str(number), full_shape(tensor.tensor_shape)


def _check_length(name: str, tensor: memoryview, header: Header, promised: Output | None) -> None:
    """Raise unless a tensor holds no more bytes than its shape needs."""
    dtype, shape = header
    string_bytes = None if promised is None else promised.string_bytes
    value_bytes = string_bytes if dtype == _STRING else _NUMBER_BYTES
    most_bytes = None if value_bytes is None else math.prod(shape) * value_bytes + _LONGEST_SHAPE
    if most_bytes is not None and len(tensor) > most_bytes:
        raise ValueError(
            f"output {name!r} must take at most {most_bytes} bytes for shape {shape}. "
            f"Received: {len(tensor)} bytes. {_DAMAGED}"
        )


def _check_fields(name: str, tensor: memoryview, header: Header) -> None:
    """Raise unless a tensor is a dtype, a shape, and no more pieces than it has strings."""
    dtype, shape = header
    most = _MOST_FIELDS + (math.prod(shape) if dtype == _STRING else 0)
    numbers = [number for number, _ in _most(fields(tensor), most, f"output {name!r}")]
    if 1 in numbers[1:] or 2 in numbers[2:]:
        raise ValueError(
            f"output {name!r} must be a dtype, a shape and values. "
            f"Received: several of them. {_DAMAGED}"
        )


def _most(
    message_fields: Iterator[tuple[int, Any]], most: int, name: str
) -> Iterator[tuple[int, Any]]:
    yield from islice(message_fields, most)
    if next(message_fields, None) is not None:
        raise ValueError(f"{name} must have at most {most} fields. Received: more. {_DAMAGED}")


# NumPy's names of TensorFlow's dtypes, where it has one.
_DTYPE_NAMES: dict[int, str] = {
    **{number: name.removeprefix("DT_").lower() for name, number in wire.DataType.items()},
    wire.DT_FLOAT: "float32",
    wire.DT_DOUBLE: "float64",
    wire.DT_HALF: "float16",
    wire.DT_STRING: "string",
}
_ARRAY_DTYPES = {number: array_dtype(name) for number, name in _DTYPE_NAMES.items()}


def dtype_name(number: int) -> str:
    """Return NumPy's name of a dtype, where it has one: "float32", "string", "bfloat16".

    A dtype that is newer than this client is a number.
    """
    return _DTYPE_NAMES.get(number) or str(number)


def full_shape(shape: wire.TensorShapeProto) -> tuple[int, ...]:
    """Return the sizes of a shape.

    Raises:
        ValueError: If one is unknown or negative, or no array can have them.
    """
    dims = shape.dim
    if len(dims) > _HIGHEST_RANK:
        raise ValueError(
            f"a tensor must have at most {_HIGHEST_RANK} axes. Received: {len(dims)}. {_DAMAGED}"
        )
    sizes = tuple([dim.size for dim in dims])
    if shape.unknown_rank or min(sizes, default=0) < 0:
        received = "an unknown rank" if shape.unknown_rank else f"sizes {sizes}"
        raise ValueError(
            f"a tensor's shape must be fully known. Received: {received}. "
            "The tensor is damaged: ask again, and if it stays so look at what the server runs."
        )
    return sizes


def check_parts(data: bytes, message: Any, most_bytes: int, most_fields: int) -> None:
    """Raise `ValueError` if a message is larger than such a message can be.

    Args:
        data: The message.
        message: Its class.
        most_bytes: How long it may be.
        most_fields: How many fields it may have, those of the messages within it included.
    """
    if len(data) > most_bytes:
        raise ValueError(
            f"the message must have at most {most_bytes} bytes. Received: {len(data)}. {_DAMAGED}"
        )
    if _count_fields(memoryview(data), message.DESCRIPTOR, most_fields) > most_fields:
        raise ValueError(
            f"the message must have at most {most_fields} fields. Received: more. {_DAMAGED}"
        )


def _count_fields(data: memoryview, descriptor: Any, most: int) -> int:
    """Return the number of fields at every level, or a number above `most`."""
    count = 0
    for number, value in fields(data):
        count += 1
        declared = descriptor.fields_by_number.get(number)
        if declared is not None and declared.message_type and isinstance(value, memoryview):
            count += _count_fields(value, declared.message_type, most - count)
        if count > most:
            break
    return count


def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    r"""Yield the number and the value of each field of a message.

    A value is an int, the bytes that stand for a string, a message or packed numbers, or None for
    the eight or four bytes of a fixed width. Nothing is copied.

    Raises:
        ValueError: If the bytes are no message.

    Examples:
        >>> [(number, bytes(value)) for number, value in fields(memoryview(b"\x0a\x02hi"))]
        [(1, b'hi')]
    """
    position, end = 0, len(data)
    try:
        while position < end:
            tag = data[position]
            position += 1
            if tag > 0x7F:
                tag, position = _varint(data, position - 1)
            kind = tag & 7
            value: Any = None
            if kind == 2 or not kind:
                value = data[position]
                position += 1
                if value > 0x7F:
                    value, position = _varint(data, position - 1)
                if kind:
                    start, position = position, position + value
                    value = data[start:position]
            else:
                position += _FIXED_BYTES[kind]
            if position > end:
                break
            yield tag >> 3, value
    except (IndexError, KeyError):
        position = end + 1
    if position > end:
        raise ValueError(f"a message must end where its last field does. {_DAMAGED}")


_FIXED_BYTES = {1: 8, 5: 4}


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return a number of at most ten bytes, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError(f"a number of a message must have at most 10 bytes. {_DAMAGED}")


def _as_bytes(value: Any) -> memoryview:
    if isinstance(value, memoryview):
        return value
    raise ValueError(f"a string or message must be bytes. Received: a number. {_DAMAGED}")
