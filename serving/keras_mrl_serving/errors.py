"""Everything that can go wrong with a served model: one tree of exceptions, none of them gRPC's.

Two tables follow the classes: which class the name of a gRPC status and the server's message stand
for, and the rule and the remedy of each class about a server. This file needs no gRPC.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .calls import Envelope

if TYPE_CHECKING:
    from .results import Partial


class KerasMrlError(Exception):
    """Base of every error this package raises about a served model.

    Attributes:
        target: Address of the server; None for an error that no server caused.
        model: Name of the model.
        version: Version that was called; None for the newest.
        signature: Signature that was called.
        timeout_s: Timeout of the call in seconds.
        attempts: How often the call was sent; None for an error before that.
        is_lasting: Whether another attempt would fail in the same way, as without TLS.
        partial: The rows answered before the error, if the rows were split into several calls.
    """

    target: str | None = None
    model: str | None = None
    version: int | None = None
    signature: str | None = None
    timeout_s: float | None = None
    attempts: int | None = None
    is_lasting: bool = False
    partial: Partial | None = None


class ManifestError(KerasMrlError, ValueError):
    """This package cannot read the manifest."""


@contextmanager
def manifest_errors(rule: str, received: object, writer: str) -> Iterator[None]:
    """Raise what reading a saved value raises as a `ManifestError`.

    Args:
        rule: First sentence of the error.
        received: The value.
        writer: What the right version of keras-mrl did with it: "wrote it".

    Examples:
        >>> with manifest_errors("A funnel has a k.", {}, "wrote it"):
        ...     {}["k"]
        Traceback (most recent call last):
        ...
        keras_mrl_serving.errors.ManifestError: A funnel has a k. Received: {} (KeyError: 'k'). \
Install the version of keras-mrl that wrote it, or a later one.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(
            f"{rule} Received: {received!r} ({type(error).__name__}: {error}). "
            f"Install the version of keras-mrl that {writer}, or a later one."
        ) from error


class UnknownDimError(KerasMrlError, ValueError):
    """The model does not serve this dim."""


class UnknownExitError(KerasMrlError, ValueError):
    """The model does not have this exit, or no signature that answers at it."""


class UnknownPromptError(KerasMrlError, ValueError):
    """The model has no prompt of this name."""


class NoHeadError(KerasMrlError, TypeError):
    """A model without a head was asked to classify."""


class NoCascadeError(KerasMrlError, TypeError):
    """A model without a cascade policy was asked to classify adaptively by its own policy."""


class NoOtherTowerError(KerasMrlError, TypeError):
    """Rows were given to the other tower of a model that has one tower."""


class NoIndexError(KerasMrlError, TypeError):
    """A model without a gallery was asked for neighbours."""


class EncoderMismatchError(KerasMrlError, ValueError):
    """An index was searched with embeddings of another model than the one it was built with."""


class InvalidInputError(KerasMrlError, ValueError):
    """The server, or the client before it, refused the inputs."""


class UnreadableImageError(InvalidInputError):
    """The bytes of a file are no image, or not a whole one.

    Attributes:
        reason: Why, in a few words.
    """

    reason: str = ""


class ServerError(KerasMrlError):
    """The server answered with an error that has no class of its own here."""


class ServerUnavailableError(ServerError, ConnectionError):
    """No server answered at the target, or it is overloaded."""


class AccessDeniedError(ServerError, PermissionError):
    """The server, or a proxy before it, refuses this caller."""


class MessageTooLargeError(ServerError):
    """A message is larger than the limit of this client or of the server."""


class DeadlineError(ServerError, TimeoutError):
    """The answer did not come within the timeout."""


class ModelNotFoundError(ServerError, LookupError):
    """The server has no such model, or no version of it is ready."""


class VersionNotFoundError(ModelNotFoundError):
    """The server does not have this version of the model."""


class VersionChangedError(ServerError):
    """The server unloaded the version that was answering, twice in one answer."""


class ModelChangedError(VersionChangedError):
    """Two models answered under one version number, twice in one answer."""


class SignatureNotFoundError(ServerError, LookupError):
    """The model has no such signature: another exporter made it, or it was exported without it."""


class DamagedIndexError(KerasMrlError, ValueError):
    """A file of a saved index has changed since it was written."""


class TargetNotReachedError(KerasMrlError, ValueError):
    """None of the measured funnels reaches the target quality.

    Attributes:
        front: The fastest measured funnel of every quality, as in `Plan.front`.
    """

    front: tuple[Any, ...] = ()


# Status, pattern in the server's message, exception: the first row that fits. No row: ServerError.
_CLASS_OF_STATUS: tuple[tuple[str, str, type[KerasMrlError]], ...] = (
    ("NOT_FOUND", r"Specific\(", VersionNotFoundError),
    ("NOT_FOUND", "", ModelNotFoundError),
    ("INVALID_ARGUMENT", "^Unrecognized servable version label", VersionNotFoundError),
    ("INVALID_ARGUMENT", "", InvalidInputError),
    ("FAILED_PRECONDITION", "Serving signature key", SignatureNotFoundError),
    ("RESOURCE_EXHAUSTED", "larger than max|metadata size exceeds", MessageTooLargeError),
    ("UNAVAILABLE", "", ServerUnavailableError),
    ("CANCELLED", "", ServerUnavailableError),  # of a server that is being stopped
    ("DEADLINE_EXCEEDED", "", DeadlineError),
    ("UNAUTHENTICATED", "", AccessDeniedError),
    ("PERMISSION_DENIED", "", AccessDeniedError),
)


def error_class(status: str, details: str) -> type[KerasMrlError]:
    """Return the exception that a gRPC status and the server's message stand for.

    Args:
        status: Name of the status.
        details: The server's message.

    Examples:
        >>> error_class("NOT_FOUND", "Servable not found for request: Specific(m, 7)")
        <class 'keras_mrl_serving.errors.VersionNotFoundError'>
    """
    rows = (row for row in _CLASS_OF_STATUS if row[0] == status and re.search(row[1], details))
    return next((kind for _, _, kind in rows), ServerError)


NO_SERVER_REMEDY = (
    "If it is starting, call Client.wait_until_ready() first. Else start one with `keras-mrl serve "
    "--model_base_path PATH --port PORT`, or correct the target: TensorFlow Serving's port for "
    "gRPC is 8500."
)

# The first and the last sentence of an error about a server: the rule, and what to do.
_RULES_AND_REMEDIES: dict[type[KerasMrlError], tuple[str, str]] = {
    ServerUnavailableError: (
        "A TensorFlow Serving server must answer at the target.",
        NO_SERVER_REMEDY,
    ),
    DeadlineError: (
        "An answer must come within the timeout.",
        "Send fewer rows at once, or raise Options(timeout_s=...).",
    ),
    ModelNotFoundError: (
        "The server must have the model.",
        "Give the name the server was started with, Client(target, model=NAME), "
        "and see in its log whether a version loaded.",
    ),
    VersionNotFoundError: (
        "The server must have the version.",
        "Ask without a version for the newest one.",
    ),
    VersionChangedError: (
        "All calls of one answer must reach one version.",
        "Let the server keep the version before the newest "
        "(model_version_policy latest {num_versions: 2}), or swap less often.",
    ),
    ModelChangedError: (
        "One version number must stand for one model.",
        "Give every export a number of its own (leave version out), and every replica the same "
        "versions.",
    ),
    SignatureNotFoundError: (
        "The model must have the signature.",
        "Ask a model exported by keras_mrl_export.export_saved_model with this signature; "
        "any other by Client.predict, after a look at Client.signatures().",
    ),
    InvalidInputError: (
        "The server must accept the inputs.",
        "Send what the model's inputs ask for: Client.describe().inputs.",
    ),
    AccessDeniedError: (
        "The server must let the caller in.",
        "Give what it asks for: Options(metadata={'authorization': ...}), or a client "
        "certificate, Options(tls=Tls(private_key=..., certificate_chain=...)).",
    ),
    MessageTooLargeError: (
        "A message must be no larger than both ends take.",
        "Send fewer rows at once, Options(max_batch_size=...), or raise the limit that is named; "
        "the client's is Options(max_message_bytes=...).",
    ),
    ServerError: ("The server must answer without an error.", "See the server's log."),
}


def call_error(
    kind: type[KerasMrlError],
    envelope: Envelope,
    target: str,
    received: str,
    *,
    details: str = "",
    remedy: str | None = None,
) -> KerasMrlError:
    """Return the error for a call that failed, with all that is known about the call.

    Args:
        kind: Class of the error, one of the table above.
        envelope: The call.
        target: Address of the server.
        received: What came back, in a few words.
        details: The server's own words.
        remedy: What to do; None takes the remedy of the table.

    Examples:
        >>> from keras_mrl_serving.calls import AskStatus
        >>> envelope = Envelope("birds", None, AskStatus(), 1.0, 1.0)
        >>> print(call_error(DeadlineError, envelope, "localhost:8500", "nothing"))
        An answer must come within the timeout. Received: nothing from localhost:8500 for model \
'birds', timeout 1 s. Send fewer rows at once, or raise Options(timeout_s=...).
    """
    rule, usual_remedy = _RULES_AND_REMEDIES[kind]
    version, signature = envelope.version, envelope.signature
    label = "" if envelope.label is None else f" label {envelope.label!r}"
    error = kind(
        f"{rule} Received: {received} from {target} for model {envelope.model!r}"
        + (f" version {version}" if version is not None else label)
        + (f", signature {signature!r}" if signature else "")
        + f", timeout {envelope.timeout_s:g} s"
        + (f": {details.rstrip('.')}" if details else "")
        + f". {remedy or usual_remedy}"
    )
    error.target, error.model, error.version = target, envelope.model, version
    error.signature, error.timeout_s = signature or None, envelope.timeout_s
    return error
