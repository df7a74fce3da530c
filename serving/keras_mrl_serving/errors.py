"""What can go wrong when a model is asked: one tree, so that nobody imports grpc to catch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .calls import Envelope

if TYPE_CHECKING:
    from .results import Partial


class KerasMrlError(Exception):
    """Base of every error this package raises about a served model.

    Attributes:
        target: Address of the server, where the error came from one.
        model: Name of the model that was asked.
        version: Version that was asked for; None for the newest.
        signature: Signature that was called.
        timeout_s: Seconds the call was given.
        attempts: How often the call was sent, as the time it took tells; None where it does not.
        partial: What was answered before the error, where a call of many rows was split.
    """

    target: str | None = None
    model: str | None = None
    version: int | None = None
    signature: str | None = None
    timeout_s: float | None = None
    attempts: int | None = None
    partial: Partial | None = None


class ManifestError(KerasMrlError, ValueError):
    """The manifest is not one this package reads."""


class UnknownDimError(KerasMrlError, ValueError):
    """The model does not serve the dim that was asked for."""


class NoHeadError(KerasMrlError, TypeError):
    """A model without a head was asked to classify."""


class NoCascadeError(KerasMrlError, TypeError):
    """A model exported without a policy was asked to classify adaptively by its own."""


class NoIndexError(KerasMrlError, TypeError):
    """A model without a gallery was asked for neighbours."""


class EncoderMismatchError(KerasMrlError, ValueError):
    """An index was asked with embeddings of another model than it was built with."""


class InvalidInputError(KerasMrlError, ValueError):
    """The server, or the client before it, refused the inputs."""


class ServerError(KerasMrlError):
    """The server answered with an error that none of the classes below names."""


class ServerUnavailableError(ServerError, ConnectionError):
    """No server answered at the target, or it is overloaded."""


class AccessDeniedError(ServerError, PermissionError):
    """The server, or a proxy before it, does not let this caller in."""


class MessageTooLargeError(ServerError):
    """A message is larger than this client or the server takes."""


class DeadlineError(ServerError, TimeoutError):
    """The answer did not come within the timeout."""


class ModelNotFoundError(ServerError, LookupError):
    """The server has no such model, or no version of it is ready."""


class VersionNotFoundError(ModelNotFoundError):
    """The server does not have the version that was asked for."""


class VersionChangedError(ServerError):
    """The version that began an answer was gone before its end, twice."""


class SignatureNotFoundError(ServerError, LookupError):
    """The model has no such signature: not one of ours, or exported without it."""


class DamagedIndexError(KerasMrlError, ValueError):
    """A saved index is not as it was written."""


class TargetNotReachedError(KerasMrlError, ValueError):
    """No funnel that was tried reaches the target.

    Attributes:
        front: What could be reached: the fastest of every quality, as `Plan.front`.
    """

    front: tuple[Any, ...] = ()


# What an error about a server says: its rule, what was received, what to do.

_RULES_AND_REMEDIES: dict[type[KerasMrlError], tuple[str, str]] = {
    ServerUnavailableError: (
        "A TensorFlow Serving server must answer at the target.",
        "Start one with `keras-mrl serve --model_base_path PATH --port PORT`, "
        "or correct the target.",
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
        "Send fewer rows at once, Options(max_batch_size=...), or raise the limit that is named.",
    ),
    ServerError: ("The server must answer without an error.", "See the server's log."),
}


def failed(
    leaf: type[KerasMrlError],
    envelope: Envelope,
    target: str,
    received: str,
    *,
    details: str = "",
    remedy: str | None = None,
) -> KerasMrlError:
    """Return the error for an envelope that brought no reply, with all that is known about it.

    Args:
        leaf: Class of the error, one of those of this file.
        envelope: What was sent.
        target: Where it was sent.
        received: What came back, in a word or a few.
        details: The same in the server's words.
        remedy: What to do, where more is known than the class tells.

    Examples:
        >>> from keras_mrl_serving.calls import AskStatus
        >>> envelope = Envelope("birds", None, AskStatus(), 1.0, 1.0)
        >>> print(failed(DeadlineError, envelope, "localhost:8500", "nothing"))
        An answer must come within the timeout. Received: nothing from localhost:8500 for model \
'birds', timeout 1 s. Send fewer rows at once, or raise Options(timeout_s=...).
    """
    rule, usual = _RULES_AND_REMEDIES[leaf]
    version, signature = envelope.version, envelope.signature
    label = "" if envelope.label is None else f" label {envelope.label!r}"
    error = leaf(
        f"{rule} Received: {received} from {target} for model {envelope.model!r}"
        + (f" version {version}" if version is not None else label)
        + (f", signature {signature!r}" if signature else "")
        + f", timeout {envelope.timeout_s:g} s"
        + (f": {details.rstrip('.')}" if details else "")
        + f". {remedy or usual}"
    )
    error.target, error.model, error.version = target, envelope.model, version
    error.signature, error.timeout_s = signature or None, envelope.timeout_s
    return error
