"""The one table from gRPC status and text to this package's errors."""

from __future__ import annotations

import re
from typing import Any

import grpc

from ._failures import failed
from .calls import Envelope
from .errors import (
    AccessDeniedError,
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    MessageTooLargeError,
    ModelNotFoundError,
    ServerError,
    ServerUnavailableError,
    SignatureNotFoundError,
    VersionNotFoundError,
)
from .options import Options

_NO_LABEL = "Unrecognized servable version label"
_BATCH_TOO_LARGE = re.compile(r"is larger than maximum input batch size (\d+)")


def leaf_of(code: grpc.StatusCode, details: str) -> type[KerasMrlError]:
    """The table: which error a gRPC status and its text stand for.

    Examples:
        >>> leaf_of(grpc.StatusCode.NOT_FOUND, "Servable not found for request: Specific(m, 7)")
        <class 'keras_mrl_serving.errors.VersionNotFoundError'>
    """
    if code is grpc.StatusCode.NOT_FOUND and "Specific(" in details:
        return VersionNotFoundError
    if code is grpc.StatusCode.INVALID_ARGUMENT and details.startswith(_NO_LABEL):
        return VersionNotFoundError
    if code is grpc.StatusCode.FAILED_PRECONDITION and "Serving signature key" in details:
        return SignatureNotFoundError
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return MessageTooLargeError
    return {
        grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
        grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
        grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
        grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
        grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
    }.get(code, ServerError)


def translate(
    error: grpc.RpcError, envelope: Envelope, target: str, options: Options, took_s: float
) -> KerasMrlError:
    """Return our error for gRPC's, with everything known about the call that failed.

    Args:
        error: What gRPC raised.
        envelope: What was sent.
        target: Where it was sent.
        options: How it was sent.
        took_s: Seconds from sending to the error.
    """
    said: Any = error  # grpc and grpc.aio share these two methods and no class
    code = said.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (said.details() if hasattr(error, "details") else None) or str(error)
    leaf = leaf_of(code, details)
    batch = _BATCH_TOO_LARGE.search(details)
    remedy = f"Set Options(max_batch_size={batch[1]})." if batch else None
    if leaf is VersionNotFoundError and envelope.version is None:
        remedy = "Give a label that the server's model config sets, or none for the newest version."
    attempts = _attempts(options, took_s) if leaf is ServerUnavailableError else None
    sent = f" after {attempts} attempts" if attempts and attempts > 1 else ""
    received = f"{code.name}{sent}"
    translated = failed(leaf, envelope, target, received, details=details, remedy=remedy)
    translated.attempts = attempts
    return translated


def _attempts(options: Options, took_s: float) -> int | None:
    """How often an UNAVAILABLE call was sent; None if it cannot have been so often as allowed.

    gRPC does not say. It gives up after the last attempt, or before one that would come after the
    deadline; the waits between attempts are known to a fifth.
    """
    waits = [options.first_backoff_s * 2**n for n in range(options.max_attempts - 1)]
    least_s = 0.8 * sum(min(wait, options.max_backoff_s) for wait in waits)
    return int(options.max_attempts) if took_s >= least_s else None
