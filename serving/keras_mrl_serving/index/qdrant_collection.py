"""A collection of Qdrant behind a client: its facts, its rows, its queries, its errors.

Qdrant is given unit vectors and the dot product where the metric is the cosine. Its own cosine
scales every vector once more, and so would rank vectors so short that they count as zero
differently from the other indexes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import (
    AccessDeniedError,
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    ManifestError,
    MessageTooLargeError,
    ServerError,
    ServerUnavailableError,
)
from .facts import IndexFacts, Vectors
from .payloads import Payload
from .points import DISTANCES, PointCollection, PointId, StageQuery

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

_USER_OF_URL = re.compile(r"//[^/\s]*@")  # name and password
_METADATA_KEY = "keras_mrl"  # of the collection: a search returns rows, never this


class Collection(PointCollection):
    """One collection of a client; every method raises `KerasMrlError` where Qdrant fails.

    Args:
        client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
        name: Name of the collection.

    Examples:
        >>> from qdrant_client import QdrantClient
        >>> Collection(QdrantClient(":memory:"), "pets").exists()
        False
    """

    def __init__(self, client: QdrantClient, name: str) -> None:
        super().__init__(name)
        self.client = client

    def exists(self) -> bool:
        with self._our_errors():
            return self.client.collection_exists(self.name)

    def create(
        self,
        facts: IndexFacts,
        vectors: Mapping[int, Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        """Make the collection, with a vector of every dim of the schedule.

        Args:
            facts: Kept in its metadata.
            vectors: Options of `VectorParams` by dim.
            options: Options of `create_collection`.
        """
        with self._our_errors() as models:
            distance = models.Distance(DISTANCES[facts.metric])
            # A shortlist is read by id: a graph over a later stage's vectors would never be walked.
            no_graph = {"hnsw_config": models.HnswConfigDiff(m=0)}
            config = {}
            for dim in facts.schedule.dims:
                defaults = {} if dim == facts.schedule.dims[0] else no_graph
                config[str(dim)] = models.VectorParams(
                    size=dim, distance=distance, **{**defaults, **vectors.get(dim, {})}
                )
            metadata = {**(options.get("metadata") or {}), _METADATA_KEY: facts.to_json()}
            self.client.create_collection(
                self.name, vectors_config=config, **{**options, "metadata": metadata}
            )
        self.facts()  # a server too old for metadata drops it in silence

    def facts(self) -> IndexFacts:
        """Return the facts the collection was made with.

        Raises:
            ManifestError: If there is no collection, or something else made it.
        """
        metadata: Mapping[str, Any] | None = None
        received = f"no collection {self.name!r}"
        if self.exists():
            with self._our_errors():
                metadata = self.client.get_collection(self.name).config.metadata
            received = f"collection {self.name!r} with metadata {metadata!s:.200}"
        if not metadata or _METADATA_KEY not in metadata:
            raise ManifestError(
                "A QdrantIndex needs a collection that QdrantIndex.build made, on a server that "
                f"keeps metadata. Received: {received}. "
                "Build one under a new name, on Qdrant 1.16 or later."
            )
        return IndexFacts.from_json(metadata[_METADATA_KEY])

    def replace_facts(self, facts: IndexFacts) -> None:
        with self._our_errors():
            self.client.update_collection(self.name, metadata={_METADATA_KEY: facts.to_json()})

    def records(
        self, points: Sequence[PointId], *, payload: bool = False, dim: int | None = None
    ) -> list[Any]:
        """Return the records that are there, in any order, with their `id`."""
        with self._our_errors():
            vectors = False if dim is None else [str(dim)]
            return self.client.retrieve(
                self.name, list(points), with_payload=payload, with_vectors=vectors
            )

    def count(self, only: Any = None, *, exact: bool) -> int:
        with self._our_errors():
            return self.client.count(self.name, count_filter=only, exact=exact).count

    def upsert(
        self,
        points: Sequence[PointId],
        vectors: Mapping[int, Vectors],
        payloads: Sequence[Payload] | None,
    ) -> None:
        with self._our_errors() as models:
            named = {str(dim): rows.tolist() for dim, rows in vectors.items()}
            batch = models.Batch(ids=list(points), vectors=named, payloads=payloads)
            self.client.upsert(self.name, points=batch, wait=True)

    def delete(self, points: Sequence[PointId]) -> None:
        with self._our_errors() as models:
            selector = models.PointIdsList(points=list(points))
            self.client.delete(self.name, points_selector=selector, wait=True)

    def only_ids(self, points: Sequence[PointId]) -> Any:
        with self._our_errors() as models:
            return models.Filter(must=[models.HasIdCondition(has_id=list(points))])

    def create_payload_index(self, field: str, kind: Any) -> None:
        with self._our_errors():
            self.client.create_payload_index(self.name, field, kind, wait=True)

    def _query(self, engine: Any, stage: StageQuery, **parts: Any) -> Any:
        options = self.client.init_options
        is_local = options.get("path") is not None or options.get("location") == ":memory:"
        # Local mode is exact already, and warns of parameters: only the caller's may cause it.
        exact = None if is_local else engine.SearchParams(exact=True)
        make: Any = engine.QueryRequest if parts["is_last"] else engine.Prefetch
        payload = {} if parts["payload"] is None else {"with_payload": parts["payload"]}
        return make(
            prefetch=parts["before"],
            query=parts["vector"],
            using=str(stage.dim),
            limit=stage.limit,
            params=exact if stage.exact else stage.params,
            filter=parts["only"],
            **payload,
        )

    def _answers(self, engine: Any, queries: Sequence[Any]) -> list[list[Any]]:
        del engine
        return [answer.points for answer in self.client.query_batch_points(self.name, queries)]

    def optimize(self) -> None:
        """A server builds its graphs by itself."""

    def flush(self) -> None:
        """A server has written what it has confirmed."""

    def close(self) -> None:
        """The client is its caller's."""

    @contextmanager
    def _our_errors(self) -> Iterator[Any]:
        """Yield `qdrant_client.models`; raise what Qdrant raises as an error of this package."""
        try:
            from qdrant_client import models
        except ImportError as error:
            raise ImportError(
                "QdrantIndex needs qdrant-client. "
                f"Received: {error}. Install it: pip install 'keras-mrl[qdrant]'."
            ) from error
        import grpc
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        try:
            yield models
        except (
            ApiException,
            QdrantException,
            grpc.RpcError,
            AssertionError,  # options that create_collection does not know
            RuntimeError,  # a client that is closed
            ValueError,  # all that local mode refuses
        ) as error:
            secrets = [self.client.init_options.get("api_key")]
            raise _our_error(error, self.name, secrets) from error


# Of each error: the rule, the remedy, and the statuses of HTTP and gRPC that it stands for.
_ERRORS: dict[type[KerasMrlError], tuple[str, str, tuple[int | str, ...]]] = {
    ServerUnavailableError: (
        "Qdrant must be there and ready.",
        "Start it, wait until it is less busy, or give a client with another URL.",
        (429, 502, 503, "RESOURCE_EXHAUSTED", "UNAVAILABLE"),
    ),
    DeadlineError: (
        "Qdrant must answer within the client's timeout.",
        "Raise it: QdrantClient(..., timeout=...).",
        (408, 504, "DEADLINE_EXCEEDED"),
    ),
    AccessDeniedError: (
        "Qdrant must let the caller in.",
        "Give its key: QdrantClient(..., api_key=os.environ['QDRANT_API_KEY']).",
        (401, 403, "UNAUTHENTICATED", "PERMISSION_DENIED"),
    ),
    MessageTooLargeError: (
        "A request must be no larger than Qdrant takes.",
        "Give fewer ids, or raise the server's max_request_size_mb.",
        (413,),
    ),
    InvalidInputError: (
        "Qdrant must take the request.",
        "See that the collection is still there, and that Qdrant knows the options given.",
        (400, 404, 422, "INVALID_ARGUMENT", "NOT_FOUND"),
    ),
    ServerError: ("Qdrant must answer without an error.", "See the server's log.", ()),
}
_CLASSES_BY_STATUS: dict[int | str, type[KerasMrlError]] = {
    status: kind for kind, (_, _, statuses) in _ERRORS.items() for status in statuses
}


def _our_error(error: Any, collection: str, secrets: Sequence[str | None]) -> KerasMrlError:
    kind = _class_for(error)
    rule, remedy, _ = _ERRORS[kind]
    message = str(error.details() if _is_of_grpc(error) else error) or type(error).__name__
    received = " ".join(message.split()).rstrip(".")
    for secret in filter(None, secrets):
        received = received.replace(secret, "***")
    received = _USER_OF_URL.sub("//***@", received)
    return kind(f"{rule} Received: {received}, for collection {collection!r}. {remedy}")


def _class_for(error: Any) -> type[KerasMrlError]:
    if _is_of_grpc(error):
        return _CLASSES_BY_STATUS.get(error.code().name, ServerError)
    if hasattr(error, "status_code"):  # an answer over HTTP
        return _CLASSES_BY_STATUS.get(error.status_code, ServerError)
    if hasattr(error, "source"):  # no answer; httpx is not ours to import, so its errors are named
        is_late = type(error.source).__name__.endswith("Timeout")
        return DeadlineError if is_late else ServerUnavailableError
    if isinstance(error, ValueError | AssertionError):
        return InvalidInputError
    return ServerUnavailableError  # too many requests, or a client that is closed


def _is_of_grpc(error: Any) -> bool:
    import grpc  # not with the module: an index of another engine needs no gRPC

    return isinstance(error, grpc.RpcError)
