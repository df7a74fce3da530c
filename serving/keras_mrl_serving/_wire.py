"""TensorFlow Serving's messages without TensorFlow: arrays to `TensorProto`, calls to requests.

The messages are our own (`_wire.proto`), with the field numbers of TensorFlow's. `saved_model.pb`
is one more such message, so the signatures of a SavedModel can be read without TensorFlow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from . import _wire_pb2 as wire
from ._wire_fields import check_parts, dtype_name, full_shape, header, parse_answer
from .answers import check_answer
from .calls import AskSignatures, AskStatus, Call, Envelope, Header, Reply, Signature, VersionStatus
from .errors import ManifestError, ServerError, call_error


class _Encoding(NamedTuple):
    """How the elements of one TensorFlow dtype travel."""

    bits: str  # the dtype of one element in `tensor_content`
    field: str  # the repeated field, the other place for the elements
    # The dtype of that field. Narrow integers travel as int32 and keep their low bits: on
    # protobuf 6, reading a 300 directly as uint8 raises.
    field_dtype: str


_HALF_BITS = _Encoding("uint16", "half_val", "int32")
_ENCODINGS: dict[wire.DataType, _Encoding] = {
    wire.DT_FLOAT: _Encoding("float32", "float_val", "float32"),
    wire.DT_DOUBLE: _Encoding("float64", "double_val", "float64"),
    wire.DT_HALF: _HALF_BITS,
    wire.DT_BFLOAT16: _HALF_BITS,
    wire.DT_INT8: _Encoding("int8", "int_val", "int32"),
    wire.DT_INT16: _Encoding("int16", "int_val", "int32"),
    wire.DT_INT32: _Encoding("int32", "int_val", "int32"),
    wire.DT_INT64: _Encoding("int64", "int64_val", "int64"),
    wire.DT_UINT8: _Encoding("uint8", "int_val", "int32"),
    wire.DT_UINT16: _Encoding("uint16", "int_val", "int32"),
    wire.DT_UINT32: _Encoding("uint32", "uint32_val", "uint32"),
    wire.DT_UINT64: _Encoding("uint64", "uint64_val", "uint64"),
    wire.DT_BOOL: _Encoding("bool", "bool_val", "bool"),
}
# uint16 are the bits of half and bfloat16, which have no dtype of their own in `_ENCODINGS`.
_DTYPES = {
    np.dtype(encoding.bits).newbyteorder("<"): dtype
    for dtype, encoding in _ENCODINGS.items()
    if encoding is not _HALF_BITS
} | {np.dtype("<f2"): wire.DT_HALF}


def to_proto(array: npt.NDArray[Any]) -> wire.TensorProto:
    r"""Return an array as the tensor TensorFlow Serving reads fastest: numbers as `tensor_content`.

    Args:
        array: Numbers or booleans of any layout and byte order, or strings: bytes, str (sent as
            UTF-8), or an object array of both. NumPy's own bytes arrays drop trailing zero bytes;
            an object array keeps them.

    Raises:
        ValueError: If TensorFlow has no such dtype, or an object array holds anything but strings.

    Examples:
        >>> proto = to_proto(np.array([[1.0, 2.0]], "float32"))
        >>> proto.tensor_content
        b'\x00\x00\x80?\x00\x00\x00@'
        >>> list(to_proto(np.array(["blue", "grün"])).string_val)
        [b'blue', b'gr\xc3\xbcn']
    """
    proto = wire.TensorProto()
    fill_proto(proto, array)
    return proto


def fill_proto(proto: wire.TensorProto, array: npt.NDArray[Any]) -> None:
    """Fill an empty tensor, such as one within a message, with an array: see `to_proto`."""
    proto.tensor_shape.SetInParent()
    add_dim = proto.tensor_shape.dim.add
    for size in array.shape:
        add_dim().size = size
    if array.dtype.kind in "OSUT":
        proto.dtype = wire.DT_STRING
        proto.string_val.extend([_string_bytes(element) for element in array.ravel().tolist()])
        return
    little_endian = array.dtype if array.dtype in _DTYPES else array.dtype.newbyteorder("<")
    dtype = _DTYPES.get(little_endian)
    if dtype is None:
        raise ValueError(
            "dtype must be float16 to float64, int8 to int64, uint8 to uint64, bool, bytes or str. "
            f"Received: dtype={array.dtype}. Convert the array first: array.astype('float32')."
        )
    proto.dtype = dtype
    proto.tensor_content = array.astype(little_endian, copy=False).tobytes()


def from_proto(proto: wire.TensorProto) -> npt.NDArray[Any]:
    """Return a tensor, in either of TensorFlow Serving's encodings, as a new array.

    As in TensorFlow itself, a repeated field may hold fewer elements than the shape has (the last
    one repeats; none at all means zeros or empty strings) or more (the surplus is ignored).

    Args:
        proto: The tensor. bfloat16 comes back as float32, since NumPy has no bfloat16 and float32
            holds every bfloat16 exactly; strings come back as an object array of bytes.

    Raises:
        ValueError: If the dtype is neither one that `to_proto` writes nor bfloat16, the shape is
            not fully known, or `tensor_content` does not fit the shape.

    Examples:
        >>> shape = wire.TensorShapeProto(dim=[wire.TensorShapeProto.Dim(size=4)])
        >>> from_proto(wire.TensorProto(dtype=wire.DT_HALF, tensor_shape=shape, half_val=[15360]))
        array([1., 1., 1., 1.], dtype=float16)
    """
    return _array(proto, full_shape(proto.tensor_shape))


def _array(proto: wire.TensorProto, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    count, dtype, content = math.prod(shape), proto.dtype, proto.tensor_content
    if dtype == wire.DT_STRING:
        strings = _split_strings(content, shape) if content else proto.string_val[:count]
        values = np.empty(len(strings), object)
        values[:] = strings
        return _fit(values, count, b"").reshape(shape)
    if dtype not in _ENCODINGS:
        name = wire.DataType.Name(dtype) if dtype in wire.DataType.values() else dtype
        raise ValueError(
            "a tensor's dtype must be a float, integer, bool or string dtype that NumPy has, or "
            f"bfloat16. Received: dtype={name}. Cast the output in the exported signature: "
            "tf.cast(output, tf.float32)."
        )
    bits, field, field_dtype = _ENCODINGS[dtype]
    if content:
        element = np.dtype(bits).newbyteorder("<")
        if len(content) != count * element.itemsize:
            raise ValueError(
                f"tensor_content must hold {count * element.itemsize} bytes: {element.itemsize} "
                f"for each element of shape {shape}. Received: {len(content)} bytes. "
                "The tensor is damaged: ask again, and if it stays so look at what the server runs."
            )
        values = np.frombuffer(content, element).astype(bits)
    else:
        numbers = getattr(proto, field)
        # Of many, one copy through the container's __array__: a million in a list take 60 ms.
        field_values = np.array(numbers[:count] if count <= _FEW else numbers, field_dtype)
        values = _fit(field_values, count, 0).astype(bits, copy=False)
    if dtype == wire.DT_HALF:
        values = values.view("float16")
    elif dtype == wire.DT_BFLOAT16:
        values = (values.astype("uint32") << 16).view("float32")
    return values.reshape(shape)


_FEW = 64  # numbers, which are faster copied by way of a list


def _string_bytes(element: object) -> bytes:
    if isinstance(element, bytes):
        return element
    if isinstance(element, str):
        return element.encode()
    raise ValueError(
        "an object array must hold bytes and str only. "
        f"Received: an element of type {type(element).__name__}. "
        "Give numbers a dtype of their own: array.astype('float32')."
    )


def _fit(values: npt.NDArray[Any], count: int, nothing: object) -> npt.NDArray[Any]:
    """Return exactly `count` values: repeat the last one (or `nothing`), or drop the surplus."""
    missing = count - len(values)
    if not missing:
        return values
    if missing > 0:
        # Not np.full: it drops the trailing zero bytes of a string.
        last = values[-1:] if len(values) else np.array([nothing], values.dtype)
        values = np.concatenate([values, last.repeat(missing)])
    return values[:count]


def _split_strings(content: bytes, shape: tuple[int, ...]) -> list[bytes]:
    """Return the strings in `tensor_content`: every length as a varint, then the bytes end to end.

    A server with `--enable_serialization_as_tensor_content` writes strings this way.
    """
    count = math.prod(shape)
    sizes: list[int] = []
    size = shift = position = 0
    while len(sizes) < count and position < len(content) and shift < 64:
        size |= (content[position] & 0x7F) << shift
        shift += 7
        if content[position] < 0x80:
            sizes.append(size)
            size = shift = 0
        position += 1
    ends = list(itertools.accumulate(sizes, initial=position))
    if len(sizes) < count or ends[-1] != len(content):
        raise ValueError(
            f"tensor_content must hold the lengths and the bytes of {count} strings, one for each "
            f"element of shape {shape}. Received: {len(content)} bytes that are not that. "
            "The tensor is damaged: ask again, and if it stays so look at what the server runs."
        )
    return [content[start:end] for start, end in itertools.pairwise(ends)]


PREDICT = "/tensorflow.serving.PredictionService/Predict"
METADATA = "/tensorflow.serving.PredictionService/GetModelMetadata"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"

# Each method with the classes of its request and of its response.
METHODS: dict[str, tuple[Any, Any]] = {
    PREDICT: (wire.PredictRequest, wire.PredictResponse),
    METADATA: (wire.GetModelMetadataRequest, wire.GetModelMetadataResponse),
    STATUS: (wire.GetModelStatusRequest, wire.GetModelStatusResponse),
}
_SIGNATURES = "signature_def"
_INIT_OP = "__saved_model_init_op"  # in Keras's exports; TensorFlow runs it when it loads the model


def stubs(channel: grpc.Channel | grpc.aio.Channel) -> dict[str, Any]:
    """Return a function for each method of the server, blocking or not as the channel is."""
    return {
        method: channel.unary_unary(
            method,
            request_serializer=request.SerializeToString,
            response_deserializer=None,  # `decode` measures the bytes first
        )
        for method, (request, _) in METHODS.items()
    }


def encode(envelope: Envelope) -> tuple[str, Any]:
    """Return the method and the message of an envelope."""
    request = envelope.request
    spec = wire.ModelSpec(name=envelope.model, signature_name=envelope.signature)
    if envelope.version is not None:
        spec.version.value = envelope.version
    elif envelope.label is not None:
        spec.version_label = envelope.label
    if isinstance(request, Call):
        message = wire.PredictRequest(model_spec=spec, output_filter=request.outputs)
        for name, array in request.inputs.items():
            fill_proto(message.inputs[name], array)
        return PREDICT, message
    if isinstance(request, AskSignatures):
        return METADATA, wire.GetModelMetadataRequest(model_spec=spec, metadata_field=[_SIGNATURES])
    return STATUS, wire.GetModelStatusRequest(model_spec=spec)


def decode(envelope: Envelope, data: bytes, target: str) -> Reply[Any]:
    """Return the reply that a response holds.

    Args:
        envelope: The request.
        data: The response as it travelled.
        target: Address of the server, for the error.

    Raises:
        ManifestError: If an output is missing, or of another dtype or shape than promised.
        ServerError: If the response is damaged, holds a tensor that this client cannot read, or
            would take far more memory than it has bytes.
    """
    try:
        if isinstance(envelope.request, AskStatus):
            return Reply(_version_statuses(data), None)
        if isinstance(envelope.request, AskSignatures):
            return _signatures(data)
        return _outputs(envelope.request, data)
    except ManifestError:
        raise
    except (ValueError, DecodeError) as error:
        remedy = "Ask a model exported by keras_mrl_export.export_saved_model."
        received, details = "what this client cannot read", str(error)
        raise call_error(
            ServerError, envelope, target, received, details=details, remedy=remedy
        ) from error


# Whatever a small message claims, its arrays stay below this and eight times its own size.
_SPARE_BYTES = 2**22
# Of what a server says about its models. Of a thousand inputs, a signature has 10,000 fields.
_MOST_BYTES, _MOST_FIELDS = 2**21, 50_000


def _outputs(call: Call, data: bytes) -> Reply[dict[str, npt.NDArray[Any]]]:
    response = parse_answer(data, call)
    version = response.model_spec.version.value
    tensors: dict[str, wire.TensorProto] = {}
    headers: dict[str, Header] = {}
    needed_bytes = 0
    for name in filter(call.reads, response.outputs):
        proto = tensors[name] = response.outputs[name]
        headers[name] = _, shape = header(proto)
        needed_bytes += math.prod(shape) * _ITEM_BYTES.get(proto.dtype, _POINTER_BYTES)
    others = (name for name in response.outputs if name not in tensors)
    check_answer(call, headers, others, version)
    most_bytes = 8 * len(data) + _SPARE_BYTES
    if needed_bytes > most_bytes:
        raise ValueError(
            f"an answer of {len(data)} bytes may become arrays of {most_bytes} bytes. "
            f"Received: shapes that need {needed_bytes} bytes. Send every value, not only the "
            "first of equal ones, or fewer rows at once."
        )
    return Reply({n: _array(proto, headers[n][1]) for n, proto in tensors.items()}, version)


_ITEM_BYTES = {dtype: np.dtype(encoding.bits).itemsize for dtype, encoding in _ENCODINGS.items()}
_POINTER_BYTES = 8  # of an array of strings


def _signatures(data: bytes) -> Reply[dict[str, Signature]]:
    check_parts(data, wire.GetModelMetadataResponse, _MOST_BYTES, _MOST_FIELDS)
    response = wire.GetModelMetadataResponse.FromString(data)
    # The message calls itself tensorflow.serving.SignatureDefMap, so `Unpack` refuses it.
    packed = response.metadata[_SIGNATURES].value
    check_parts(packed, wire.SignatureDefMap, _MOST_BYTES, _MOST_FIELDS)
    definitions = wire.SignatureDefMap.FromString(packed).signature_def
    return Reply(signatures_of(definitions), response.model_spec.version.value)


def _version_statuses(data: bytes) -> tuple[VersionStatus, ...]:
    check_parts(data, wire.GetModelStatusResponse, _MOST_BYTES, _MOST_FIELDS)
    response = wire.GetModelStatusResponse.FromString(data)
    return tuple(map(_version_status, response.model_version_status))


def _version_status(status: wire.ModelVersionStatus) -> VersionStatus:
    states = wire.ModelVersionStatus.State
    state = status.state if status.state in states.values() else states.UNKNOWN
    return VersionStatus(status.version, states.Name(state), status.status.error_message)


def signatures_of(definitions: Mapping[str, wire.SignatureDef]) -> dict[str, Signature]:
    """Return the signatures that a client can call, by name."""
    return {
        name: Signature(_specs(signature.inputs), _specs(signature.outputs))
        for name, signature in sorted(definitions.items())
        if name != _INIT_OP
    }


def _specs(infos: Any) -> dict[str, dict[str, object]]:
    return {
        name: {"dtype": dtype_name(info.dtype), "shape": _shape_spec(info)}
        for name, info in infos.items()
    }


def _shape_spec(info: wire.TensorInfo) -> list[int | None] | None:
    if info.tensor_shape.unknown_rank:
        return None
    return [None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim]
