"""What can go wrong when a model is asked: one tree, so that nobody imports grpc to catch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
