"""What `QdrantIndex` asks of an engine of Qdrant's: rows by point id, and nested queries.

Two have it: a collection behind a client (`qdrant_collection.py`), and a folder whose engine runs
in this process (`qdrant_folder.py`).
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ServerError
from ..results import Neighbors
from .base import best_first
from .facts import IndexFacts, Vectors
from .ids import is_text
from .payloads import NAME_KEY, Payload, name_in

PointId = int | str  # a str is a UUID

DISTANCES = {"cosine": "Dot", "dot": "Dot", "l2": "Euclid"}


class StageQuery(NamedTuple):
    """What one stage of a funnel asks for.

    Args:
        dim: Dim of its vectors.
        limit: Number of rows it returns.
        exact: Whether every row that may be returned is compared.
        params: The engine's `SearchParams` to search with instead; None for its own ways.
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
    params: Any
    queries: Vectors


class PointCollection(ABC):
    """Rows of vectors and payloads in an engine of Qdrant's, by point id.

    Filters, search parameters and kinds of payload indexes are objects of the engine's own package:
    `qdrant_client.models` or `qdrant_edge`. Every method raises `KerasMrlError` where the engine
    fails.

    Args:
        name: Name of the collection.

    Attributes:
        ids_per_lookup: Ids that one request asks for.

    Examples:
        >>> from keras_mrl_serving.index.qdrant_collection import Collection
        >>> issubclass(Collection, PointCollection)
        True
    """

    ids_per_lookup = 1000

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def exists(self) -> bool:
        """Return whether the collection is there."""

    @abstractmethod
    def create(
        self,
        facts: IndexFacts,
        vectors: Mapping[int, Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        """Make the collection, with a vector of every dim of the schedule.

        Args:
            facts: Kept with it.
            vectors: Options of the vectors by dim.
            options: Options of the collection.
        """

    @abstractmethod
    def facts(self) -> IndexFacts:
        """Return the facts the collection was made with.

        Raises:
            ManifestError: If there is no collection, or something else made it.
        """

    @abstractmethod
    def replace_facts(self, facts: IndexFacts) -> None:
        """Keep other facts with the collection."""

    @abstractmethod
    def records(
        self, points: Sequence[PointId], *, payload: bool = False, dim: int | None = None
    ) -> list[Any]:
        """Return the records that are there, in any order, with their `id`.

        Args:
            points: Their ids.
            payload: Whether to read their payloads.
            dim: The dim of their vectors to read; None for none.
        """

    @abstractmethod
    def count(self, only: Any = None, *, exact: bool) -> int:
        """Return the number of rows that a filter leaves; an inexact one may be too high."""

    @abstractmethod
    def upsert(
        self,
        points: Sequence[PointId],
        vectors: Mapping[int, Vectors],
        payloads: Sequence[Payload] | None,
    ) -> None:
        """Write rows and their vectors by dim; rows whose ids are there are replaced."""

    @abstractmethod
    def delete(self, points: Sequence[PointId]) -> None:
        """Remove rows; ids that are not there are passed over."""

    @abstractmethod
    def only_ids(self, points: Sequence[PointId]) -> Any:
        """Return the engine's filter that leaves these rows."""

    @abstractmethod
    def create_payload_index(self, field: str, kind: Any) -> None:
        """Index a field of the payloads, so that filters by it are fast."""

    @abstractmethod
    def _our_errors(self) -> AbstractContextManager[Any]:
        """Yield the engine's package; raise what the engine raises as an error of this one."""

    @abstractmethod
    def _query(self, engine: Any, stage: StageQuery, **parts: Any) -> Any:
        """Return the engine's query of one stage.

        Args:
            engine: The engine's package.
            stage: The stage.
            **parts: `vector`, a list of floats; `before`, the query of the stage before, or None;
                `only`, a filter or None; `is_last`, whether no stage follows; `payload`, the keys
                that points are to bear, or None.
        """

    @abstractmethod
    def _answers(self, engine: Any, queries: Sequence[Any]) -> list[list[Any]]:
        """Return the points of every query, best first."""

    def search(
        self, stages: Sequence[StageQuery], filters: Sequence[Any], *, names: bool
    ) -> list[list[Any]]:
        """Return the points of every query, best first.

        Args:
            stages: Stages of the funnel, first stage first.
            filters: The engine's filter of each query; None leaves all rows.
            names: Whether points are to bear the strings that are their ids.

        Raises:
            ServerError: If the answers are no rows of a gallery.
        """
        with self._our_errors() as engine:
            vectors = zip(*(stage.queries.tolist() for stage in stages), strict=True)
            queries = []
            for only, by_stage in zip(filters, vectors, strict=True):
                query: Any = None  # each stage prefetches for the next
                for number, (stage, vector) in enumerate(zip(stages, by_stage, strict=True), 1):
                    is_last = number == len(stages)
                    query = self._query(
                        engine,
                        stage,
                        vector=vector,
                        before=query,
                        only=only if number == 1 else None,  # later stages see nothing else
                        is_last=is_last,
                        payload=[NAME_KEY] if names and is_last else None,
                    )
                queries.append(query)
            answers = self._answers(engine, queries)
        self._check_answers(answers, len(queries), stages[-1].limit, names=names)
        return answers

    @abstractmethod
    def optimize(self) -> None:
        """Build the graphs of rows that have none, where the engine does not do so by itself."""

    @abstractmethod
    def flush(self) -> None:
        """Make what was written safe on the disk, where the engine is in this process."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files, where the engine is in this process."""

    def missing(self, facts: IndexFacts, points: Sequence[PointId]) -> npt.NDArray[np.int64]:
        """Return the positions of the ids that an interrupted build did not upload.

        Args:
            facts: Facts of the build that goes on. Its shortlists and its k may differ from those
                of the interrupted build, and replace them.
            points: All ids of that build.

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
        there: set[PointId] = set()
        for at in range(0, len(points), self.ids_per_lookup):
            records = self.records(points[at : at + self.ids_per_lookup])
            there |= {as_point(record.id) for record in records}
        others = self.count(exact=True) - len(there)
        if others:
            raise ValueError(
                "A build goes on over its own rows alone. "
                f"Received: collection {self.name!r} with {others} rows whose ids are "
                "not among those given. Give them all, or open the collection and add to it."
            )
        if facts_there != facts:
            self.replace_facts(facts)
        return np.array([at for at, point in enumerate(points) if point not in there], np.int64)

    def _check_answers(
        self, answers: Sequence[Sequence[Any]], queries: int, limit: int, *, names: bool
    ) -> None:
        """Raise `ServerError` where Qdrant answers with other points than rows of a gallery."""
        received = ""
        if len(answers) != queries:
            received = f"{len(answers)} answers to {queries} queries"
        elif max(map(len, answers), default=0) > limit:
            received = f"{max(map(len, answers))} points where {limit} were asked for"
        elif names and not all(name_in(point.payload) for points in answers for point in points):
            received = f"a point without a string {NAME_KEY!r} in its payload"
        elif not names and not all(
            type(point.id) is int and 0 <= point.id < 2**63
            for points in answers
            for point in points
        ):
            received = "a point whose id is no int64 >= 0"
        if received:
            raise ServerError(
                "Qdrant must answer with rows of the gallery. "
                f"Received: {received}, for collection {self.name!r}. "
                "See which server answers, and what else writes to the collection."
            )


def as_point(point: object) -> PointId:
    """Return the id of a record as it was given: an engine may answer with a UUID object.

    Examples:
        >>> as_point(7)
        7
    """
    return point if isinstance(point, int) else str(point)


def as_points(ids: npt.NDArray[Any]) -> list[PointId]:
    """Return the point ids of rows: their ids, or the UUID5 of their strings.

    Examples:
        >>> as_points(np.array([7, 2]))
        [7, 2]
        >>> as_points(np.array(["wren"], object))
        ['70fbca98-17f5-566c-8087-ab3d646c6dcb']
    """
    if not is_text(ids):
        return list(ids.tolist())
    return [str(uuid.uuid5(uuid.NAMESPACE_OID, name)) for name in ids.tolist()]


def as_neighbors(
    answers: Sequence[Sequence[Any]], k: int, metric: str, *, names: bool = False
) -> Neighbors:
    """Return the answers to queries; a short one ends in ids of -1, or "", with scores of -inf.

    Args:
        answers: At most `k` points per query.
        k: Number of columns.
        metric: "cosine", "dot" or "l2".
        names: Whether ids are strings.

    Examples:
        >>> from qdrant_client.models import ScoredPoint
        >>> as_neighbors([[ScoredPoint(id=7, version=0, score=3.0)]], 2, "l2")[0]
        [(7, -9.0), (-1, -inf)]
    """
    shape = (len(answers), k)
    ids: Any = np.full(shape, "", object) if names else np.full(shape, -1, np.int64)
    scores = np.full(shape, -np.inf)
    for row, points in enumerate(answers):
        ids[row, : len(points)] = [name_in(p.payload) if names else p.id for p in points]
        scores[row, : len(points)] = [point.score for point in points]
    if metric == "l2":
        scores = 0 - np.square(scores)  # Qdrant gives the distance
    with np.errstate(over="ignore"):
        rounded = scores.astype(np.float32)
    ranks = np.unique(ids, return_inverse=True)[1].reshape(shape) if names else ids
    is_none = np.isneginf(scores)
    order = best_first(np.where(is_none, np.iinfo(np.int64).max, ranks), rounded)
    return Neighbors(np.take_along_axis(ids, order, 1), np.take_along_axis(rounded, order, 1))


def _gallery_of(facts: IndexFacts) -> str:
    return (
        f"dims={facts.schedule.dims}, metric={facts.metric!r}, "
        f"encoder_fingerprint={facts.encoder_fingerprint!r}"
        + ("" if facts.prompt is None else f", prompt={facts.prompt!r}")
        + (", ids of strings" if facts.has_names else "")
    )
