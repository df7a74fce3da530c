"""A Qdrant collection as `QdrantIndex` uses it: its facts, its rows, its queries, its errors.

Qdrant is given unit vectors and the dot product where the metric is the cosine. Its own cosine
scales every vector once more, and so would rank vectors so short that they count as zero
differently from the other indexes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

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
from ..results import Neighbors
from .base import Ids, IndexFacts, Vectors, best_first

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Filter, ScoredPoint, SearchParams

_USER_OF_URL = re.compile(r"//[^/\s]*@")  # name and password
_METADATA_KEY = "keras_mrl"  # of the collection: a search returns rows, never this
_DISTANCES = {"cosine": "Dot", "dot": "Dot", "l2": "Euclid"}


class StageQuery(NamedTuple):
    """What one stage of a funnel asks for.

    Args:
        dim: Dim of its vectors.
        limit: Number of rows it returns.
        exact: Whether every row that may be returned is compared.
        params: How to search instead; None for Qdrant's own ways.
        queries: As the metric compares them.

    Shapes:
        queries: `(batch, dim)`.

    Examples:
        >>> StageQuery(2, 1, False, None, np.zeros((1, 2), np.float32)).exact
        False
    """

    dim: int
    limit: int
    exact: bool
    params: SearchParams | None
    queries: Vectors


class Collection:
    """One collection of a client; every method raises `KerasMrlError` where Qdrant fails.

    Args:
        client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
        name: Name of the collection.

    Attributes:
        ids_per_lookup: Ids that one request asks for.

    Examples:
        >>> from qdrant_client import QdrantClient
        >>> Collection(QdrantClient(":memory:"), "pets").exists()
        False
    """

    ids_per_lookup = 1000

    def __init__(self, client: QdrantClient, name: str) -> None:
        self.client = client
        self.name = name

    def exists(self) -> bool:
        """Return whether the collection is there."""
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
            distance = models.Distance(_DISTANCES[facts.metric])
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

    def missing(self, facts: IndexFacts, ids: Ids) -> npt.NDArray[np.int64]:
        """Return the positions of the ids that an interrupted build did not upload.

        Args:
            facts: Facts of the build that goes on. Its shortlists and its k may differ from those
                of the interrupted build, and replace them.
            ids: All ids of that build.

        Raises:
            ValueError: If the collection is of another gallery.
            ManifestError: If something else made it.
        """
        facts_there = self.facts()
        expected, received = _gallery_of(facts_there), _gallery_of(facts)
        if received != expected:
            raise ValueError(
                "A build goes on where one with the same dims, metric and encoder stopped. "
                f"Received: {received} for collection {self.name!r} of {expected}. "
                "Give another name, or delete the collection."
            )
        starts = range(0, len(ids), self.ids_per_lookup)
        is_there = np.concatenate([self._has(ids[at : at + self.ids_per_lookup]) for at in starts])
        others = self.count(exact=True) - int(is_there.sum())
        if others:
            raise ValueError(
                "A build goes on over its own rows alone. "
                f"Received: collection {self.name!r} with {others} rows whose ids are "
                "not among those given. Give them all, or open the collection and add to it."
            )
        if facts_there != facts:
            with self._our_errors():
                self.client.update_collection(self.name, metadata={_METADATA_KEY: facts.to_json()})
        return np.flatnonzero(~is_there)

    def _has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        with self._our_errors():
            records = self.client.retrieve(
                self.name, ids.tolist(), with_payload=False, with_vectors=False
            )
        return np.isin(ids, np.array([record.id for record in records], np.int64))

    def count(self, among: Ids | None = None, *, exact: bool) -> int:
        """Return the number of rows, of those with these ids; an inexact one may be too high."""
        with self._our_errors() as models:
            only_ids = _id_filter(models, among)
            return self.client.count(self.name, count_filter=only_ids, exact=exact).count

    def upsert(self, ids: Ids, vectors: Mapping[int, Vectors]) -> None:
        """Write the vectors of rows by dim; rows whose ids are there are replaced."""
        with self._our_errors() as models:
            named = {str(dim): rows.tolist() for dim, rows in vectors.items()}
            points = models.Batch(ids=ids.tolist(), vectors=named)
            self.client.upsert(self.name, points=points, wait=True)

    def delete(self, ids: Ids) -> None:
        """Remove rows; ids that are not there are passed over."""
        with self._our_errors() as models:
            points = models.PointIdsList(points=ids.tolist())
            self.client.delete(self.name, points_selector=points, wait=True)

    def search(
        self, stages: Sequence[StageQuery], among: Ids | None = None
    ) -> list[list[ScoredPoint]]:
        """Return the points of every query, best first.

        Args:
            stages: Stages of the funnel, first stage first.
            among: The only ids that may be returned; None: all.
        """
        options = self.client.init_options
        is_local = options.get("path") is not None or options.get("location") == ":memory:"
        with self._our_errors() as models:
            # Local mode is exact already, and warns of parameters: only the caller's may cause it.
            exact = None if is_local else models.SearchParams(exact=True)
            only_ids = _id_filter(models, among)
            requests = []
            for vectors in zip(*(stage.queries.tolist() for stage in stages), strict=True):
                request: Any = None  # each stage prefetches for the next
                for number, (stage, vector) in enumerate(zip(stages, vectors, strict=True), 1):
                    make = models.Prefetch if number < len(stages) else models.QueryRequest
                    request = make(
                        prefetch=request,
                        query=vector,
                        using=str(stage.dim),
                        limit=stage.limit,
                        params=exact if stage.exact else stage.params,
                        filter=only_ids if number == 1 else None,  # later stages see nothing else
                    )
                requests.append(request)
            answers = self.client.query_batch_points(self.name, requests)
        points = [answer.points for answer in answers]
        self._check_answers(points, len(requests), stages[-1].limit)
        return points

    def _check_answers(
        self, answers: Sequence[Sequence[ScoredPoint]], queries: int, limit: int
    ) -> None:
        """Raise `ServerError` where Qdrant answers with other points than rows of a gallery."""
        received = ""
        if len(answers) != queries:
            received = f"{len(answers)} answers to {queries} queries"
        elif max(map(len, answers), default=0) > limit:
            received = f"{max(map(len, answers))} points where {limit} were asked for"
        elif not all(type(p.id) is int and 0 <= p.id < 2**63 for points in answers for p in points):
            received = "a point whose id is no int64 >= 0"
        if received:
            raise ServerError(
                "Qdrant must answer with rows of the gallery. "
                f"Received: {received}, for collection {self.name!r}. "
                "See which server answers, and what else writes to the collection."
            )

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


def _gallery_of(facts: IndexFacts) -> str:
    return (
        f"dims={facts.schedule.dims}, metric={facts.metric!r}, "
        f"encoder_fingerprint={facts.encoder_fingerprint!r}"
        + ("" if facts.prompt is None else f", prompt={facts.prompt!r}")
    )


def _id_filter(models: Any, ids: Ids | None) -> Filter | None:
    if ids is None:
        return None
    return models.Filter(must=[models.HasIdCondition(has_id=ids.tolist())])


def as_neighbors(answers: Sequence[Sequence[ScoredPoint]], k: int, metric: str) -> Neighbors:
    """Return the answers to queries; a short one ends in ids of -1 with scores of -inf.

    Args:
        answers: At most `k` points per query.
        k: Number of columns.
        metric: "cosine", "dot" or "l2".

    Examples:
        >>> from qdrant_client.models import ScoredPoint
        >>> as_neighbors([[ScoredPoint(id=7, version=0, score=3.0)]], 2, "l2")[0]
        [(7, -9.0), (-1, -inf)]
    """
    ids = np.full((len(answers), k), -1, np.int64)
    scores = np.full(ids.shape, -np.inf)
    for row, points in enumerate(answers):
        ids[row, : len(points)] = [point.id for point in points]
        scores[row, : len(points)] = [point.score for point in points]
    if metric == "l2":
        scores = 0 - np.square(scores)  # Qdrant gives the distance
    with np.errstate(over="ignore"):
        rounded = scores.astype(np.float32)
    order = best_first(np.where(ids < 0, np.iinfo(np.int64).max, ids), rounded)
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(rounded, order, 1))


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
        "Give fewer ids in `among`, or raise the server's max_request_size_mb.",
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
