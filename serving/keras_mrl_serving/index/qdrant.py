"""The funnel inside Qdrant: one named vector per stage, one nested query per query."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..funnel import FunnelSchedule, check_schedule
from ..results import Neighbors
from .base import IndexBase, Progress, Vectors, check_embeddings
from .facts import IndexFacts
from .filters import no_filter
from .ids import check_among, check_ids, check_some_ids, is_text
from .payloads import Payload, check_payloads, without_name
from .points import PointCollection, PointId, StageQuery, as_neighbors, as_point, as_points
from .qdrant_collection import Collection
from .qdrant_folder import FolderCollection

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

    Place = QdrantClient | str | os.PathLike[str]


@dataclass(frozen=True)
class QdrantFilter:
    """The rows that a search may return; made by `QdrantIndex.prepare_filter`.

    Args:
        only: The engine's filter.
        num_ids: How many ids it lists; None where it is by payload.

    Examples:
        >>> QdrantFilter(only=None).num_ids
    """

    only: Any
    num_ids: int | None = None


class QdrantIndex(IndexBase):
    """A gallery in a Qdrant collection, and its funnel as one nested query per query.

    Qdrant is a server behind a client, or in this process: given a folder, its own engine
    (qdrant-edge-py) opens the gallery there. A client of ":memory:" or of a path is an imitation in
    Python for tests of a few hundred rows. Options, search parameters and filters are passed on as
    they are, objects of `qdrant_client.models` or of `qdrant_edge`.

    Every stage is a named vector ("64"), so the engine's own options set the precision of each.
    The first stage is as exact as its index (on a server: HNSW), Qdrant decides which of equal
    rows pass the edge of a shortlist or of the answer, and every shard has a shortlist of its own;
    later stages compare the whole shortlist exactly. Shortlists of half the gallery or more make
    the whole search exact, whatever `params` say. Made by `build` or `open`.

    Args:
        client: A `qdrant_client.QdrantClient`; or a folder, in which Qdrant's engine opens the
            gallery in this process.
        collection: Name of the collection.
        facts: Schedule, metric and encoder.
        dims: Dims that are stored; those of the schedule must be among them.
        params: `SearchParams` by dim, for stages that are not to be searched as above: `hnsw_ef`,
            or `quantization` without rescoring.

    Attributes:
        numbers_per_request: Coordinates and ids in one request, which bounds its size: as JSON
            20 MiB, of which a server takes 32.
        rows_per_upload: Rows in one upload, after which progress is reported.
        queries_per_request: Queries in one request, so that the answer comes within the client's
            timeout.

    Examples:
        >>> from qdrant_client import QdrantClient
        >>> gallery = np.eye(4, dtype=np.float32) + 0.1
        >>> schedule = FunnelSchedule(dims=(2, 4), shortlists=(3,), k=1)
        >>> index = QdrantIndex.build(QdrantClient(":memory:"), "pets", gallery, schedule)
        >>> index.search(gallery[:2]).ids.tolist()
        [[0], [1]]
    """

    numbers_per_request = 1 << 20
    rows_per_upload = 1000
    queries_per_request = 100

    def __init__(
        self,
        client: Place,
        collection: str,
        facts: IndexFacts,
        dims: tuple[int, ...],
        params: Mapping[int, Any] | None = None,
    ) -> None:
        _check_dims("params", params, dims)
        if not set(facts.schedule.dims) <= set(dims):
            raise ValueError(
                f"A schedule's dims must be among those stored: {dims}. "
                f"Received: dims={facts.schedule.dims}. "
                "Leave the others out, or build another collection."
            )
        self._collection = _collection_at(client, collection)
        self.facts = facts
        self.dims = dims
        self.params = params

    @classmethod
    def build(
        cls,
        client: Place,
        collection: str,
        embeddings: npt.ArrayLike,
        schedule: FunnelSchedule,
        ids: npt.ArrayLike | None = None,
        metric: str = "cosine",
        encoder_fingerprint: str | None = None,
        prompt: str | None = None,
        *,
        payloads: Sequence[Payload] | None = None,
        progress: Progress | None = None,
        params: Mapping[int, Any] | None = None,
        vectors: Mapping[int, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> QdrantIndex:
        """Upload a gallery, or the rows that an interrupted build left out, and return its index.

        Rows that are there already stay as they are (`add` replaces them), and so do the options
        the collection was made with.

        Args:
            client: A `qdrant_client.QdrantClient`, or a folder: see the class.
            collection: Name of a new collection, or of one that a `build` left unfinished.
            embeddings: The gallery, raw or scaled.
            schedule: The funnel; its last dim must not exceed the width.
            ids: One int64 >= 0 or one string per row, all different; None numbers the rows from 0.
                Qdrant gets the UUID5 of a string (in `uuid.NAMESPACE_OID`), and the string as
                "keras_mrl_id" of the payload.
            metric: How embeddings are compared: "cosine", "dot" or "l2"; see `IndexFacts`.
            encoder_fingerprint: Fingerprint of the model that embedded the gallery, from its
                manifest; a client then refuses to search by embeddings of another model.
            prompt: The prompt that stood before each text of the gallery, as text; None: none.
            payloads: A JSON object per row, to filter by and to read back; None for none.
            progress: Called with the rows done and all rows, after every upload.
            params: As for the class.
            vectors: Options of `VectorParams` by dim, e.g. `{64: {"quantization_config": ...},
                512: {"on_disk": True}}`. Dims after the first get no HNSW graph unless one says so:
                the funnel reads their shortlists alone.
            **options: Options of `create_collection` (`shard_number`, `quantization_config`), or of
                `EdgeConfig` in a folder.

        Shapes:
            embeddings: `(rows, width)`. ids: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat, the gallery has
                fewer rows than the funnel returns, or the collection holds another gallery.
            ManifestError: If something else made the collection.
            KerasMrlError: If Qdrant fails.
            ImportError: If qdrant-client is not installed.
        """
        gallery = check_embeddings(embeddings, "gallery", check_schedule(schedule).dims[-1])
        row_ids = check_ids(ids, len(gallery))
        facts = IndexFacts(schedule, metric, encoder_fingerprint, prompt, is_text(row_ids))
        checked = check_payloads(payloads, row_ids)
        facts.check_rows(len(gallery))
        _check_dims("vectors", vectors, schedule.dims)
        index = cls(client, collection, facts, schedule.dims, params)
        missing = np.arange(len(row_ids))
        if index._collection.exists():
            missing = index._collection.missing(facts, as_points(row_ids))
        else:
            index._collection.create(facts, vectors or {}, options)
        index._upload(gallery, row_ids, checked, missing, progress)
        index.optimize()
        return index

    @classmethod
    def open(
        cls,
        client: Place,
        collection: str,
        schedule: FunnelSchedule | None = None,
        params: Mapping[int, Any] | None = None,
    ) -> QdrantIndex:
        """Return the index that `build` left in a collection.

        Args:
            client: A `qdrant_client.QdrantClient`, or a folder: see the class.
            collection: Name of the collection.
            schedule: Another funnel over dims that are stored; None for the one it was built
                with. A first stage that was a later one when it was built has no graph, so that
                Qdrant compares all rows.
            params: As for the class.

        Raises:
            ValueError: If the schedule has dims that are not stored.
            ManifestError: If there is no collection, or something else made it.
            KerasMrlError: If Qdrant fails.
        """
        facts = _collection_at(client, collection).facts()
        dims = facts.schedule.dims
        if schedule is not None:
            facts = replace(facts, schedule=schedule)
        return cls(client, collection, facts, dims, params)

    def __len__(self) -> int:
        return self._collection.count(exact=True)

    def add(
        self,
        embeddings: npt.ArrayLike,
        ids: npt.ArrayLike,
        progress: Progress | None = None,
        payloads: Sequence[Payload] | None = None,
    ) -> None:
        """Add rows; those whose ids are there replace them, with their payloads.

        In a folder the rows are safe on the disk once this returns. They are compared one by one
        until `optimize` builds their graph.

        Args:
            embeddings: Rows `(rows, width)` of all stored dims, raw or scaled.
            ids: One int64 >= 0 or one string per row, all different.
            progress: Called with the rows done and all rows, after every upload.
            payloads: A JSON object per row; None for none.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat or are of another
                kind than the gallery's; nothing is added then.
            KerasMrlError: If Qdrant fails.
        """
        gallery = check_embeddings(embeddings, "gallery", self.dims[-1])
        given: Any = ids if isinstance(ids, list | tuple) else np.asarray(ids)
        row_ids = check_ids(given, len(gallery))  # None would number rows
        self._check_kind(row_ids)
        checked = check_payloads(payloads, row_ids)
        self._upload(gallery, row_ids, checked, np.arange(len(row_ids)), progress)

    def remove(self, ids: npt.ArrayLike) -> None:
        """Remove rows; ids that are not there are passed over.

        Args:
            ids: `(n,)`.

        Raises:
            ValueError: If they are no ids of the gallery's kind; nothing is removed then.
            KerasMrlError: If Qdrant fails.
        """
        row_ids = check_some_ids(
            ids if isinstance(ids, list | tuple) else np.asarray(ids),
            "ids",
            "ids to remove must be int64 >= 0, or strings, in one dimension.",
            "Give those of the rows.",
        )
        self._check_kind(row_ids)
        for batch in _batches(np.unique(row_ids), self.rows_per_upload):
            self._collection.delete(as_points(batch))
        self._collection.flush()

    def optimize(self) -> None:
        """Build the graph of rows that were added since it was built.

        A server does so by itself, and nothing happens here. In a folder the engine holds up
        everything else in this process until it is done (seconds for 10,000 rows).

        Raises:
            KerasMrlError: If Qdrant fails.
        """
        self._collection.optimize()
        self._collection.flush()

    def close(self) -> None:
        """Let go of a gallery in a folder, for all indexes of it; a client is left open."""
        self._collection.close()

    def payloads(self, ids: npt.ArrayLike) -> list[dict[str, Any] | None]:
        """Return the payloads of rows; None for ids that are not there.

        Args:
            ids: `(n,)`, such as one row of `Neighbors.ids`.

        Raises:
            KerasMrlError: If Qdrant fails.
        """
        records = self._records(ids)
        return [None if one is None else without_name(one.payload) for one in records]

    def reconstruct(self, ids: npt.ArrayLike) -> Vectors:
        """Return the embeddings of rows, as Qdrant holds them at the last dim.

        Args:
            ids: `(n,)`.

        Returns:
            float32 `(n, width)`; of unit length where they are compared by cosine.

        Raises:
            ValueError: If no row has such an id.
            KerasMrlError: If Qdrant fails.
        """
        records = self._records(ids, self.width)
        if None in records:
            raise ValueError(
                "ids must be those of gallery rows, in one dimension. Received: "
                f"{records.count(None)} that no row has. Give ids of rows."
            )
        vectors = [record.vector[str(self.width)] for record in records]
        return np.array(vectors, np.float32).reshape(-1, self.width)

    def _records(self, ids: npt.ArrayLike, dim: int | None = None) -> list[Any]:
        rule = "ids must be those of gallery rows, in one dimension."
        given = check_some_ids(ids, "ids", rule, "Give ids of rows.")
        self._check_kind(given)
        by_point: dict[PointId, Any] = {}
        for batch in _batches(given, self.rows_per_upload):
            records = self._collection.records(as_points(batch), payload=dim is None, dim=dim)
            by_point |= {as_point(record.id): record for record in records}
        return [by_point.get(point) for point in as_points(given)]

    def create_payload_index(self, field: str, kind: Any) -> None:
        """Index a field of the payloads, so that filters by it are fast.

        Args:
            field: Name of the field.
            kind: The engine's kind: `models.PayloadSchemaType.KEYWORD` of a client,
                `qdrant_edge.PayloadSchemaType.Keyword` in a folder.

        Raises:
            KerasMrlError: If Qdrant fails.
        """
        self._collection.create_payload_index(field, kind)

    def prepare_filter(self, only: Any) -> QdrantFilter:
        """Return a filter for any number of searches.

        Args:
            only: Ids `(n,)`, or a filter by payload: `qdrant_client.models.Filter` of a client,
                `qdrant_edge.Filter` in a folder.

        Raises:
            ValueError: If ids are none of the gallery's kind. Rows have no order here, so that
                there is no mask of them.

        Examples:
            >>> from qdrant_client import QdrantClient, models
            >>> index = QdrantIndex.build(QdrantClient(":memory:"), "pets", np.eye(4),
            ...     FunnelSchedule((4,), (), 1), payloads=[{"kind": kind} for kind in "abab"])
            >>> match = models.FieldCondition(key="kind", match=models.MatchValue(value="b"))
            >>> only_b = index.prepare_filter(models.Filter(must=[match]))
            >>> index.search(np.eye(4)[1:2], filter=only_b).ids.tolist()
            [[1]]
        """
        if not isinstance(only, list | tuple | np.ndarray | range):
            return QdrantFilter(only)
        ids = np.unique(check_among(only, "only"))
        self._check_kind(ids)
        return QdrantFilter(self._collection.only_ids(as_points(ids)), len(ids))

    def _check_kind(self, ids: npt.NDArray[Any]) -> None:
        if ids.size and is_text(ids) != self.facts.has_names:
            kinds = ["strings", "int64"]
            received, expected = kinds if is_text(ids) else kinds[::-1]
            raise ValueError(
                "Ids must be of the kind that the index was built with. "
                f"Received: {received} for an index whose ids are {expected}. Give {expected}."
            )

    def search(
        self,
        queries: npt.ArrayLike,
        k: int | None = None,
        among: npt.ArrayLike | None = None,
        filter: Any = None,
    ) -> Neighbors:
        """Return the nearest gallery rows of each query, best first, ties among them by id.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.
            k: Number of neighbours, at most the last shortlist of the funnel; None for its `k`.
            among: The only ids that may be returned, `(n,)`; ids that are not in the gallery are
                passed over, and fewer than `k` give fewer columns. None: all.
            filter: What `prepare_filter` returned, or a filter by payload; or a list, one per
                query.

        Returns:
            Where an approximate first stage found fewer for some query, its last ids are -1, or
            empty strings, and their scores -inf.

        Raises:
            ValueError: If queries, k or ids do not fit, or a value is not finite.
            TypeError: If `filter` are ids.
            KerasMrlError: If Qdrant fails.
        """
        vectors = check_embeddings(queries, "queries", self.width)
        k = self.facts.check_k(k)
        filters = self._filters(len(vectors), among, filter)
        distinct = {id(some): some for some in filters}.values()
        most_ids = max((some.num_ids or 0 for some in distinct), default=0)
        limits = (*self.schedule.shortlists, k)
        # To count exactly is to read every id, and an engine that moves rows counts some twice.
        rows = self._collection.count(exact=False)
        by_ids = all(some.num_ids is not None for some in distinct)
        is_whole = 2 * limits[0] >= (min(rows, most_ids) if by_ids and filters else rows)
        numbers_per_query = sum(self.schedule.dims) + most_ids
        fitting = max(
            1, min(self.queries_per_request, self.numbers_per_request // numbers_per_query)
        )
        answers: list[list[Any]] = []
        for start in range(0, len(vectors), fitting):
            batch = slice(start, start + fitting)
            only = [some.only for some in filters[batch]]
            stages = self._stages(vectors[batch], limits, is_whole)
            answers += self._collection.search(stages, only, names=self.facts.has_names)
        most = max(map(len, answers), default=0)
        if most < k:
            counts = [self._collection.count(some.only, exact=True) for some in distinct]
            k = max(most, min(k, max(counts, default=0)))
        return as_neighbors(answers, k, self.metric, names=self.facts.has_names)

    def _filters(self, num_queries: int, among: Any, filter: Any) -> list[QdrantFilter]:
        """Return the filter of each query."""
        if among is not None and filter is not None:
            raise ValueError(
                "A search is filtered in one way. Received: among and filter. Give one of them."
            )
        if among is not None:
            return [self.prepare_filter(np.unique(check_among(among)))] * max(1, num_queries)
        if not isinstance(filter, list | tuple):
            return [_as_filter(filter)] * max(1, num_queries)
        if len(filter) != num_queries:
            raise ValueError(
                "A list of filters has one per query. "
                f"Received: {len(filter)} filters for {num_queries} queries. Give one for all."
            )
        return list(map(_as_filter, filter))

    def _stages(
        self, queries: Vectors, limits: tuple[int, ...], is_whole: bool
    ) -> list[StageQuery]:
        params = self.params or {}
        return [
            StageQuery(
                dim,
                limit,
                exact=is_whole or (dim not in params and dim != self.schedule.dims[0]),
                params=params.get(dim),
                queries=self.facts.prefix(queries, dim),
            )
            for dim, limit in zip(self.schedule.dims, limits, strict=True)
        ]

    def _upload(
        self,
        gallery: Vectors,
        ids: npt.NDArray[Any],
        payloads: Sequence[Payload] | None,
        rows: npt.NDArray[np.int64],
        progress: Progress | None,
    ) -> None:
        done = len(ids) - len(rows)
        fitting = self.numbers_per_request // sum(self.dims)
        for batch in _batches(rows, max(1, min(self.rows_per_upload, fitting))):
            prefixes = {dim: self.facts.prefix(gallery[batch], dim) for dim in self.dims}
            some = None if payloads is None else [payloads[row] for row in batch.tolist()]
            self._collection.upsert(as_points(ids[batch]), prefixes, some)
            done += len(batch)
            if progress is not None:
                progress(done, len(ids))
        if len(rows):
            self._collection.flush()


def _as_filter(given: Any) -> QdrantFilter:
    """Return one filter of a search; the engine's own are checked by the engine."""
    if isinstance(given, str | int | np.generic | np.ndarray | range | set | frozenset):
        raise no_filter(given)
    return given if isinstance(given, QdrantFilter) else QdrantFilter(given)


def _collection_at(client: Place, name: str) -> PointCollection:
    if isinstance(client, str | os.PathLike):
        return FolderCollection(client, name)
    return Collection(client, name)


def _batches(values: npt.NDArray[Any], step: int) -> Iterator[npt.NDArray[Any]]:
    return (values[start : start + step] for start in range(0, len(values), step))


def _check_dims(name: str, by_dim: Mapping[int, Any] | None, dims: tuple[int, ...]) -> None:
    unknown = sorted(set(by_dim or ()) - set(dims))
    if unknown:
        raise ValueError(
            f"{name} must be given by dims that are stored: {dims}. "
            f"Received: {name} for {unknown}. Name a stage by its dim."
        )
