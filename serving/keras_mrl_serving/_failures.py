"""What an error about a server says: its rule, what was received, what to do."""

from __future__ import annotations

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
    VersionChangedError,
    VersionNotFoundError,
)

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
