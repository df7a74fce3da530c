"""gRPC calls as functions, and the one table from gRPC status to this package's errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from . import _wire_pb2 as wire
from .errors import (
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    ModelNotFoundError,
    ServerError,
    ServerUnavailableError,
    SignatureNotFoundError,
    VersionNotFoundError,
)
from .options import Options

Request = TypeVar("Request")
Response = TypeVar("Response")

_LONGEST_S = 1e9  # a deadline past 2262 overflows within gRPC, which then gives up at once

PREDICT = "/tensorflow.serving.PredictionService/Predict"

_REMEDIES: dict[type[KerasMrlError], str] = {
    ServerUnavailableError: (
        "Start one with `keras-mrl serve --model_base_path PATH --port PORT`, "
        "or correct the target."
    ),
    DeadlineError: "Send fewer rows at once, or raise Options(timeout_s=...).",
    ModelNotFoundError: (
        "Give the name the server was started with, Client(target, model=NAME), "
        "and see in its log whether a version loaded."
    ),
    VersionNotFoundError: "Ask without a version for the newest one.",
    SignatureNotFoundError: (
        "Ask a model exported by keras_mrl_export.export_saved_model with this signature."
    ),
    InvalidInputError: "Send what the model's inputs ask for: Client.describe().inputs.",
    ServerError: "See the server's log.",
}


def open_channel(target: str, options: Options) -> grpc.Channel:
    """Return a channel to `target`; it connects when it is first used."""
    limit = -1 if options.max_message_bytes is None else int(options.max_message_bytes)
    return grpc.insecure_channel(
        target,
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
        ],
    )


def predict_stub(
    channel: grpc.Channel,
) -> Callable[[wire.PredictRequest, float], wire.PredictResponse]:
    """Return the Predict call of `channel`; it takes a request and seconds, raises `RpcError`."""
    call = channel.unary_unary(
        PREDICT,
        request_serializer=wire.PredictRequest.SerializeToString,
        response_deserializer=wire.PredictResponse.FromString,
    )
    return lambda request, timeout_s: call(request, timeout=min(timeout_s, _LONGEST_S))


def leaf_of(code: grpc.StatusCode, details: str) -> type[KerasMrlError]:
    """The table: which error a gRPC status and its text stand for.

    Examples:
        >>> leaf_of(grpc.StatusCode.NOT_FOUND, "Servable not found for request: Specific(m, 7)")
        <class 'keras_mrl_serving.errors.VersionNotFoundError'>
    """
    if code is grpc.StatusCode.NOT_FOUND and "Specific(" in details:
        return VersionNotFoundError
    if code is grpc.StatusCode.FAILED_PRECONDITION and "Serving signature key" in details:
        return SignatureNotFoundError
    return {
        grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
        grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
        grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    }.get(code, ServerError)


def translate(
    error: grpc.RpcError, target: str, spec: wire.ModelSpec, timeout_s: float
) -> KerasMrlError:
    """Return our error for `error`, with everything known about the call that failed."""
    code: Any = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    details = (error.details() if isinstance(error, grpc.Call) else None) or str(error)
    leaf = leaf_of(code, details)
    version = spec.version.value if spec.HasField("version") else None
    asked = f"model {spec.name!r}" + (f" version {version}" if version is not None else "")
    translated = leaf(
        f"{_RULES[leaf]} Received: {code.name} from {target} for {asked}, signature "
        f"{spec.signature_name!r}, timeout {timeout_s:g} s: {details.rstrip('.')}. "
        f"{_REMEDIES[leaf]}"
    )
    translated.target, translated.model, translated.version = target, spec.name, version
    translated.signature, translated.timeout_s = spec.signature_name, timeout_s
    return translated


_RULES: dict[type[KerasMrlError], str] = {
    ServerUnavailableError: "A TensorFlow Serving server must answer at the target.",
    DeadlineError: "An answer must come within the timeout.",
    ModelNotFoundError: "The server must have the model.",
    VersionNotFoundError: "The server must have the version.",
    SignatureNotFoundError: "The model must have the signature.",
    InvalidInputError: "The server must accept the inputs.",
    ServerError: "The server must answer without an error.",
}
