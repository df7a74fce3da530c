"""Requests as TensorFlow Serving's messages, and its responses as replies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from . import _wire_pb2 as wire
from ._failures import failed
from ._tensors import from_proto, to_proto
from .calls import AskSignatures, AskStatus, Call, Envelope, Reply, Signature, VersionStatus
from .errors import ServerError

PREDICT = "/tensorflow.serving.PredictionService/Predict"
METADATA = "/tensorflow.serving.PredictionService/GetModelMetadata"
STATUS = "/tensorflow.serving.ModelService/GetModelStatus"

# Each method with how it is written and read.
METHODS: dict[str, tuple[Any, Any]] = {
    PREDICT: (wire.PredictRequest, wire.PredictResponse),
    METADATA: (wire.GetModelMetadataRequest, wire.GetModelMetadataResponse),
    STATUS: (wire.GetModelStatusRequest, wire.GetModelStatusResponse),
}
_SIGNATURES = "signature_def"
_INIT_OP = "__saved_model_init_op"  # Keras's exports list it; it is not there to be called


def stubs(channel: grpc.Channel | grpc.aio.Channel) -> dict[str, Any]:
    """Return the calls of a channel, blocking or not, by method."""
    return {
        method: channel.unary_unary(
            method,
            request_serializer=asked.SerializeToString,
            response_deserializer=answered.FromString,
        )
        for method, (asked, answered) in METHODS.items()
    }


def encode(envelope: Envelope) -> tuple[str, Any]:
    """Return the method an envelope goes to, and its message."""
    request = envelope.request
    spec = wire.ModelSpec(name=envelope.model, signature_name=envelope.signature)
    if envelope.version is not None:
        spec.version.value = envelope.version
    elif envelope.label is not None:
        spec.version_label = envelope.label
    if isinstance(request, Call):
        message = wire.PredictRequest(model_spec=spec, output_filter=request.outputs)
        for name, array in request.inputs.items():
            message.inputs[name].CopyFrom(to_proto(array))
        return PREDICT, message
    if isinstance(request, AskSignatures):
        return METADATA, wire.GetModelMetadataRequest(model_spec=spec, metadata_field=[_SIGNATURES])
    return STATUS, wire.GetModelStatusRequest(model_spec=spec)


def decode(envelope: Envelope, response: Any, target: str) -> Reply[Any]:
    """Return what a response says.

    Raises:
        ServerError: If it holds what this client cannot read.
    """
    try:
        if isinstance(envelope.request, AskStatus):
            return Reply(tuple(map(_version_status, response.model_version_status)), None)
        answered = response.model_spec.version.value
        if isinstance(envelope.request, AskSignatures):
            return Reply(_signatures(response), answered)
        return Reply({n: from_proto(proto) for n, proto in response.outputs.items()}, answered)
    except ValueError as error:
        remedy = "Ask a model exported by keras_mrl_export.export_saved_model."
        received, details = "what this client cannot read", str(error)
        raise failed(
            ServerError, envelope, target, received, details=details, remedy=remedy
        ) from error


def _version_status(status: wire.ModelVersionStatus) -> VersionStatus:
    state = wire.ModelVersionStatus.State.Name(status.state)
    return VersionStatus(status.version, state, status.status.error_message)


def _signatures(response: wire.GetModelMetadataResponse) -> dict[str, Signature]:
    # The message calls itself tensorflow.serving.SignatureDefMap, so `Unpack` would refuse it.
    found = wire.SignatureDefMap.FromString(response.metadata[_SIGNATURES].value)
    return signatures_of(found.signature_def)


def signatures_of(definitions: Mapping[str, wire.SignatureDef]) -> dict[str, Signature]:
    """Return what can be called of these definitions, by name."""
    return {
        name: Signature(_specs(signature.inputs), _specs(signature.outputs))
        for name, signature in sorted(definitions.items())
        if name != _INIT_OP
    }


def _specs(infos: Any) -> dict[str, dict[str, object]]:
    return {name: {"dtype": _dtype(info), "shape": _shape(info)} for name, info in infos.items()}


def _dtype(info: wire.TensorInfo) -> str:
    name = wire.DataType.Name(info.dtype).removeprefix("DT_").lower()
    return {"float": "float32", "double": "float64", "half": "float16"}.get(name, name)


def _shape(info: wire.TensorInfo) -> list[int | None] | None:
    if info.tensor_shape.unknown_rank:
        return None
    return [None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim]
