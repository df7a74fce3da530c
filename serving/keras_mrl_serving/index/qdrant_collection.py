"""A Qdrant collection as `QdrantIndex` uses it: its facts, its rows, and what Qdrant refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
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
    from qdrant_client.models import Filter, QueryRequest, ScoredPoint, SearchParams

# The one table from what Qdrant's client raises to this package's errors.

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


# A funnel as Qdrant is asked for it, and what it answers as neighbours.


class Narrowing(NamedTuple):
    """What one stage of a funnel asks.

    Args:
        dim: Of its vectors.
        limit: How many rows it keeps.
        exact: Compare every row that it may keep.
        params: How to search instead; None for Qdrant's own ways.
        queries: As the metric compares them.

    Shapes:
        queries: `(batch, dim)`.

    Examples:
        >>> Narrowing(2, 1, False, None, np.zeros((1, 2), np.float32)).exact
        False
    """

    dim: int
    limit: int
    exact: bool
    params: SearchParams | None
    queries: Vectors


def nested(
    models: Any, stages: Sequence[Narrowing], wanted: Filter | None, exact: SearchParams | None
) -> list[QueryRequest]:
    """Return one query per row of the stages: each stage prefetches for the next.

    Args:
        models: `qdrant_client.models`.
        stages: Of the funnel, first stage first.
        wanted: What the first stage keeps; the later ones see nothing else.
        exact: Parameters of exact stages.

    Examples:
        >>> from qdrant_client import models
        >>> wide = Narrowing(2, 1, True, None, np.float32([[1, 2]]))
        >>> (query,) = nested(models, [wide._replace(dim=1, limit=5), wide], None, None)
        >>> query.using, query.limit, query.prefetch.using, query.prefetch.limit
        ('2', 1, '1', 5)
    """
    requests = []
    for vectors in zip(*(stage.queries.tolist() for stage in stages), strict=True):
        asked: Any = None
        for number, (stage, vector) in enumerate(zip(stages, vectors, strict=True), 1):
            make = models.Prefetch if number < len(stages) else models.QueryRequest
            asked = make(
                prefetch=asked,
                query=vector,
                using=str(stage.dim),
                limit=stage.limit,
                params=exact if stage.exact else stage.params,
                filter=wanted if number == 1 else None,
            )
        requests.append(asked)
    return requests


def only(models: Any, allowed: Ids | None) -> Filter | None:
    """Return the filter that lets these ids through; None for all.

    Examples:
        >>> from qdrant_client import models
        >>> only(models, np.array([3, 7])).must[0].has_id
        [3, 7]
    """
    if allowed is None:
        return None
    return models.Filter(must=[models.HasIdCondition(has_id=allowed.tolist())])


def as_neighbors(found: Sequence[Sequence[ScoredPoint]], k: int, metric: str) -> Neighbors:
    """Return what queries found; where one found fewer, ids of -1 with scores of -inf at its end.

    Args:
        found: Per query, at most `k` points.
        k: Columns.
        metric: "cosine", "dot" or "l2".

    Examples:
        >>> from qdrant_client.models import ScoredPoint
        >>> as_neighbors([[ScoredPoint(id=7, version=0, score=3.0)]], 2, "l2")[0]
        [(7, -9.0), (-1, -inf)]
    """
    ids = np.full((len(found), k), -1, np.int64)
    scores = np.full(ids.shape, -np.inf)
    for row, points in enumerate(found):
        ids[row, : len(points)] = [point.id for point in points]
        scores[row, : len(points)] = [point.score for point in points]
    if metric == "l2":
        scores = 0 - np.square(scores)  # Qdrant gives the distance
    with np.errstate(over="ignore"):
        rounded = scores.astype(np.float32)
    order = best_first(np.where(ids < 0, np.iinfo(np.int64).max, ids), rounded)
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(rounded, order, 1))


_IDS = 1000  # looked up at once
_KEY = "keras_mrl"  # in the collection's metadata, which no search can return

# For "cosine" scaled vectors are sent, whose dot product it is: a vector so small that it counts as
# zero stays small, as in the other indexes. Qdrant's own cosine would scale it once more.
_DISTANCES = {"cosine": "Dot", "dot": "Dot", "l2": "Euclid"}


class Collection:
    """One collection of a client; every method raises `KerasMrlError` where Qdrant fails.

    Args:
        client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
        name: Of the collection.

    Examples:
        >>> from qdrant_client import QdrantClient
        >>> Collection(QdrantClient(":memory:"), "pets").exists()
        False
    """

    def __init__(self, client: QdrantClient, name: str) -> None:
        self.client = client
        self.name = name

    def exists(self) -> bool:
        """Return whether it is there."""
        with self._asking():
            return self.client.collection_exists(self.name)

    def create(
        self,
        facts: IndexFacts,
        vectors: Mapping[int, Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        """Make it, with a vector of every dim of the schedule.

        Args:
            facts: Kept in its metadata.
            vectors: Options of `VectorParams` by dim.
            options: Of `create_collection`.
        """
        with self._asking() as models:
            distance = models.Distance(_DISTANCES[facts.metric])
            # A shortlist is read by id: a graph over a later stage's vectors would never be walked.
            no_graph = {"hnsw_config": models.HnswConfigDiff(m=0)}
            config = {
                str(dim): models.VectorParams(
                    size=dim,
                    distance=distance,
                    **{
                        **({} if dim == facts.schedule.dims[0] else no_graph),
                        **vectors.get(dim, {}),
                    },
                )
                for dim in facts.schedule.dims
            }
            metadata = {**(options.get("metadata") or {}), _KEY: facts.to_json()}
            self.client.create_collection(
                self.name, vectors_config=config, **{**options, "metadata": metadata}
            )
        self.facts()  # a server too old for metadata drops it in silence

    def facts(self) -> IndexFacts:
        """Return the facts it was made with.

        Raises:
            ManifestError: If there is no collection, or something else made it.
        """
        metadata: Mapping[str, Any] | None = None
        received = f"no collection {self.name!r}"
        if self.exists():
            with self._asking():
                metadata = self.client.get_collection(self.name).config.metadata
            received = f"collection {self.name!r} with metadata {metadata}"
        if not metadata or _KEY not in metadata:
            raise ManifestError(
                "A QdrantIndex needs a collection that QdrantIndex.build made, on a server that "
                f"keeps metadata. Received: {received}. "
                "Build one under a new name, on Qdrant 1.16 or later."
            )
        return IndexFacts.from_json(metadata[_KEY])

    def missing(self, facts: IndexFacts, ids: Ids) -> npt.NDArray[np.int64]:
        """Return the positions of the ids that an interrupted build did not come to.

        Args:
            facts: Of the build that goes on; kept, for its shortlists and its k may be others.
            ids: All rows of that build.

        Raises:
            ValueError: If the collection is of another gallery.
            ManifestError: If something else made it.
        """
        there = self.facts()
        received, given = _identity(there), _identity(facts)
        if received != given:
            raise ValueError(
                "A build goes on where one with the same dims, metric and encoder stopped. "
                f"Received: {given} for collection {self.name!r} of {received}. "
                "Give another name, or delete the collection."
            )
        starts = range(0, len(ids), _IDS)
        found = np.concatenate([self.has(ids[start : start + _IDS]) for start in starts])
        others = self.count(exact=True) - int(found.sum())
        if others:
            raise ValueError(
                "A build goes on over its own rows alone. "
                f"Received: collection {self.name!r} with {others} rows whose ids are "
                "not among those given. Give them all, or open the collection and add to it."
            )
        if there != facts:
            with self._asking():
                self.client.update_collection(self.name, metadata={_KEY: facts.to_json()})
        return np.flatnonzero(~found)

    def count(self, allowed: Ids | None = None, *, exact: bool) -> int:
        """Return the number of rows, of those allowed; not exact is quick, and may be high."""
        with self._asking() as models:
            wanted = only(models, allowed)
            return self.client.count(self.name, count_filter=wanted, exact=exact).count

    def has(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return for every id whether it is there."""
        with self._asking():
            found = self.client.retrieve(
                self.name, ids.tolist(), with_payload=False, with_vectors=False
            )
        return np.isin(ids, np.array([record.id for record in found], np.int64))

    def upsert(self, ids: Ids, vectors: Mapping[int, Vectors]) -> None:
        """Write rows, given by dim; those whose ids are there are replaced."""
        with self._asking() as models:
            named = {str(dim): rows.tolist() for dim, rows in vectors.items()}
            points = models.Batch(ids=ids.tolist(), vectors=named)
            self.client.upsert(self.name, points=points, wait=True)

    def delete(self, ids: Ids) -> None:
        """Remove rows; ids that are not there are passed over."""
        with self._asking() as models:
            points = models.PointIdsList(points=ids.tolist())
            self.client.delete(self.name, points_selector=points, wait=True)

    def search(
        self, stages: Sequence[Narrowing], allowed: Ids | None = None
    ) -> list[list[ScoredPoint]]:
        """Return what every query finds, best first.

        Args:
            stages: Of the funnel, first stage first.
            allowed: The only ids that may be found; None: all.
        """
        options = self.client.init_options
        is_local = options.get("path") is not None or options.get("location") == ":memory:"
        with self._asking() as models:
            # Local mode is exact, and warns of parameters; of those a caller gave it shall.
            exact = None if is_local else models.SearchParams(exact=True)
            requests = nested(models, stages, only(models, allowed), exact)
            answers = self.client.query_batch_points(self.name, requests)
        return [answer.points for answer in answers]

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """Yield `qdrant_client.models`; what Qdrant raises leaves as an error of ours."""
        qdrant = import_qdrant()
        import grpc
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        try:
            yield qdrant.models
        except (
            ApiException,
            QdrantException,
            grpc.RpcError,
            AssertionError,  # options that create_collection does not know
            RuntimeError,  # a client that is closed
            ValueError,  # all that local mode refuses
        ) as error:
            raise translated(error, self.name) from error


def import_qdrant() -> ModuleType:
    """Return the package.

    Raises:
        ImportError: If qdrant-client is not installed.

    Examples:
        >>> import_qdrant().__name__
        'qdrant_client'
    """
    try:
        import qdrant_client
    except ImportError as error:
        raise ImportError(
            "QdrantIndex needs qdrant-client. "
            f"Received: {error}. Install it: pip install 'keras-mrl[qdrant]'."
        ) from error
    return qdrant_client


def _identity(facts: IndexFacts) -> str:
    return (
        f"dims={facts.schedule.dims}, metric={facts.metric!r}, "
        f"encoder_fingerprint={facts.encoder_fingerprint!r}"
    )
