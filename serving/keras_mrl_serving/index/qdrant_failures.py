"""The one table from what Qdrant's client raises to this package's errors."""

from __future__ import annotations

from typing import Any

from ..errors import (
    AccessDeniedError,
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    MessageTooLargeError,
    ServerError,
    ServerUnavailableError,
)

_RULES_AND_REMEDIES: dict[type[KerasMrlError], tuple[str, str]] = {
    ServerUnavailableError: (
        "Qdrant must be there and ready.",
        "Start it, wait until it is less busy, or give a client with another URL.",
    ),
    DeadlineError: (
        "Qdrant must answer within the client's timeout.",
        "Raise it: QdrantClient(..., timeout=...).",
    ),
    AccessDeniedError: (
        "Qdrant must let the caller in.",
        "Give its key: QdrantClient(..., api_key=...).",
    ),
    MessageTooLargeError: (
        "A request must be no larger than Qdrant takes.",
        "Give fewer ids in `among`, or raise the server's max_request_size_mb.",
    ),
    InvalidInputError: (
        "Qdrant must take the request.",
        "See that the collection is still there, and that Qdrant knows the options given.",
    ),
    ServerError: ("Qdrant must answer without an error.", "See the server's log."),
}
_LEAVES: dict[Any, type[KerasMrlError]] = {
    400: InvalidInputError,
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: InvalidInputError,
    408: DeadlineError,
    413: MessageTooLargeError,
    422: InvalidInputError,
    429: ServerUnavailableError,
    502: ServerUnavailableError,
    503: ServerUnavailableError,
    504: DeadlineError,
    "INVALID_ARGUMENT": InvalidInputError,
    "NOT_FOUND": InvalidInputError,
    "UNAUTHENTICATED": AccessDeniedError,
    "PERMISSION_DENIED": AccessDeniedError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "RESOURCE_EXHAUSTED": ServerUnavailableError,
    "UNAVAILABLE": ServerUnavailableError,
}


def translated(error: Any, collection: str) -> KerasMrlError:
    """Return our error for one that Qdrant's client raised about a collection.

    Examples:
        >>> translated(TimeoutError(), "pets").__class__.__mro__[1].__name__
        'ServerError'
    """
    leaf = leaf_of(error)
    rule, remedy = _RULES_AND_REMEDIES[leaf]
    given = str(error.details() if _is_of_grpc(error) else error)
    received = " ".join((given or type(error).__name__).split()).rstrip(".")
    return leaf(f"{rule} Received: {received}, for collection {collection!r}. {remedy}")


def leaf_of(error: Any) -> type[KerasMrlError]:
    """The table: which of our errors one of the client's stands for.

    Examples:
        >>> leaf_of(RuntimeError("QdrantLocal instance is closed."))
        <class 'keras_mrl_serving.errors.ServerUnavailableError'>
    """
    if _is_of_grpc(error):
        return _LEAVES.get(error.code().name, ServerError)
    if hasattr(error, "status_code"):  # an answer over HTTP
        return _LEAVES.get(error.status_code, ServerError)
    if hasattr(error, "source"):  # no answer; httpx is not ours to import, so its errors are named
        late = type(error.source).__name__.endswith("Timeout")
        return DeadlineError if late else ServerUnavailableError
    if isinstance(error, ValueError | AssertionError):
        return InvalidInputError
    return ServerUnavailableError  # too many requests, or a client that is closed


def _is_of_grpc(error: Any) -> bool:
    import grpc  # not with the module: an index of another engine needs no gRPC

    return isinstance(error, grpc.RpcError)
