"""The funnel inside Qdrant: one named vector per stage, one nested query per query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..funnel import FunnelSchedule
from ..results import Neighbors
from .base import Ids, IndexBase, IndexFacts, Vectors, check_among, check_embeddings, check_ids
from .qdrant_collection import Collection, StageQuery, as_neighbors

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import ScoredPoint, SearchParams

Progress = Callable[[int, int], object]  # rows done, all rows
Rows = TypeVar("Rows", Ids, Vectors)


class QdrantIndex(IndexBase):
    """A gallery in a Qdrant collection, and its funnel as one nested query per query.

    Every stage is a named vector ("64"), so the engine's own options set the precision of each.
    The first stage is as exact as its index (on a server: HNSW), Qdrant decides which of equal
    rows pass the edge of a shortlist or of the answer, and every shard has a shortlist of its own;
    later stages compare the whole shortlist exactly. Shortlists of half the gallery or more make
    the whole search exact, whatever `params` say. Made by `build` or `open`.

    Args:
        client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
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
        client: QdrantClient,
        collection: str,
        facts: IndexFacts,
        dims: tuple[int, ...],
        params: Mapping[int, SearchParams] | None = None,
    ) -> None:
        _check_dims("params", params, dims)
        if not set(facts.schedule.dims) <= set(dims):
            raise ValueError(
                f"A schedule's dims must be among those stored: {dims}. "
                f"Received: dims={facts.schedule.dims}. "
                "Leave the others out, or build another collection."
            )
        self._collection = Collection(client, collection)
        self.facts = facts
        self.dims = dims
        self.params = params

    @classmethod
    def build(
        cls,
        client: QdrantClient,
        collection: str,
        embeddings: npt.ArrayLike,
        schedule: FunnelSchedule,
        ids: npt.ArrayLike | None = None,
        metric: str = "cosine",
        encoder_fingerprint: str | None = None,
        prompt: str | None = None,
        *,
        progress: Progress | None = None,
        params: Mapping[int, SearchParams] | None = None,
        vectors: Mapping[int, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> QdrantIndex:
        """Upload a gallery, or the rows that an interrupted build left out, and return its index.

        Rows that are there already stay as they are (`add` replaces them), and so do the options
        the collection was made with.

        Args:
            client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
            collection: Name of a new collection, or of one that a `build` left unfinished.
            embeddings: The gallery, raw or scaled.
            schedule: The funnel; its last dim must not exceed the width.
            ids: One int64 >= 0 per row, all different; None numbers the rows from 0.
            metric: How embeddings are compared: "cosine", "dot" or "l2"; see `IndexFacts`.
            encoder_fingerprint: Fingerprint of the model that embedded the gallery, from its
                manifest; a client then refuses to search by embeddings of another model.
            prompt: The prompt that stood before each text of the gallery, as text; None: none.
            progress: Called with the rows done and all rows, after every upload.
            params: As for the class.
            vectors: Options of `VectorParams` by dim, e.g. `{64: {"quantization_config": ...},
                512: {"on_disk": True}}`. Dims after the first get no HNSW graph unless one says so:
                the funnel reads their shortlists alone.
            **options: Options of `create_collection`: `shard_number`, `quantization_config`, ...

        Shapes:
            embeddings: `(rows, width)`. ids: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat, the gallery has
                fewer rows than the funnel returns, or the collection holds another gallery.
            ManifestError: If something else made the collection.
            KerasMrlError: If Qdrant fails.
            ImportError: If qdrant-client is not installed.
        """
        facts = IndexFacts(schedule, metric, encoder_fingerprint, prompt)
        gallery = check_embeddings(embeddings, "gallery", facts.width)
        row_ids = check_ids(ids, len(gallery))
        facts.check_rows(len(gallery))
        _check_dims("vectors", vectors, schedule.dims)
        index = cls(client, collection, facts, schedule.dims, params)
        missing = np.arange(len(row_ids))
        if index._collection.exists():
            missing = index._collection.missing(facts, row_ids)
        else:
            index._collection.create(facts, vectors or {}, options)
        index._upload(gallery, row_ids, missing, progress)
        return index

    @classmethod
    def open(
        cls,
        client: QdrantClient,
        collection: str,
        schedule: FunnelSchedule | None = None,
        params: Mapping[int, SearchParams] | None = None,
    ) -> QdrantIndex:
        """Return the index that `build` left in a collection.

        Args:
            client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
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
        facts = Collection(client, collection).facts()
        dims = facts.schedule.dims
        if schedule is not None:
            facts = replace(facts, schedule=schedule)
        return cls(client, collection, facts, dims, params)

    def __len__(self) -> int:
        return self._collection.count(exact=True)

    def add(
        self, embeddings: npt.ArrayLike, ids: npt.ArrayLike, progress: Progress | None = None
    ) -> None:
        """Add rows; those whose ids are there replace them.

        Args:
            embeddings: Rows `(rows, width)` of all stored dims, raw or scaled.
            ids: One int64 >= 0 per row, all different.
            progress: Called with the rows done and all rows, after every upload.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, or ids repeat; nothing is
                added then.
            KerasMrlError: If Qdrant fails.
        """
        gallery = check_embeddings(embeddings, "gallery", self.dims[-1])
        row_ids = check_ids(np.asarray(ids), len(gallery))  # an array, for None would number rows
        self._upload(gallery, row_ids, np.arange(len(row_ids)), progress)

    def remove(self, ids: npt.ArrayLike) -> None:
        """Remove rows; ids that are not there are passed over.

        Args:
            ids: int64 `(n,)`.

        Raises:
            ValueError: If they are not int64 >= 0; nothing is removed then.
            KerasMrlError: If Qdrant fails.
        """
        try:
            row_ids = check_among(ids)
        except ValueError:
            received = np.asarray(ids)
            raise ValueError(
                "ids to remove must be int64 >= 0 in one dimension. "
                f"Received: {received.dtype} of shape {received.shape}. Give those of the rows."
            ) from None
        for batch in _batches(row_ids, self.rows_per_upload):
            self._collection.delete(batch)

    def search(
        self, queries: npt.ArrayLike, k: int | None = None, among: npt.ArrayLike | None = None
    ) -> Neighbors:
        """Return the nearest gallery rows of each query, best first, ties among them by id.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.
            k: Number of neighbours, at most the `k` of the funnel; None for as many.
            among: The only ids that may be returned, int64 `(n,)`; ids that are not in the
                gallery are passed over, and fewer than `k` give fewer columns. None: all.

        Returns:
            Where an approximate first stage found fewer for some query, its last ids are -1 and
            their scores -inf.

        Raises:
            ValueError: If queries, k or ids do not fit, or a value is not finite.
            KerasMrlError: If Qdrant fails.
        """
        vectors = check_embeddings(queries, "queries", self.width)
        k = self.facts.check_k(k)
        ids = None if among is None else check_among(among)
        num_ids = 0 if ids is None else len(ids)
        limits = (*self.schedule.shortlists, k)
        # To count exactly is to read every id, and an engine that moves rows counts some twice.
        rows = self._collection.count(exact=False)
        is_whole = 2 * limits[0] >= (rows if ids is None else min(rows, num_ids))
        numbers_per_query = sum(self.schedule.dims) + num_ids
        fitting = self.numbers_per_request // numbers_per_query
        answers: list[list[ScoredPoint]] = []
        for batch in _batches(vectors, max(1, min(self.queries_per_request, fitting))):
            answers += self._collection.search(self._stages(batch, limits, is_whole), ids)
        most = max(map(len, answers), default=0)
        if most < k:
            k = max(most, min(k, self._collection.count(ids, exact=True)))
        return as_neighbors(answers, k, self.metric)

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
        self, gallery: Vectors, ids: Ids, rows: npt.NDArray[np.int64], progress: Progress | None
    ) -> None:
        done = len(ids) - len(rows)
        fitting = self.numbers_per_request // sum(self.dims)
        for batch in _batches(rows, max(1, min(self.rows_per_upload, fitting))):
            prefixes = {dim: self.facts.prefix(gallery[batch], dim) for dim in self.dims}
            self._collection.upsert(ids[batch], prefixes)
            done += len(batch)
            if progress is not None:
                progress(done, len(ids))


def _batches(values: Rows, step: int) -> Iterator[Rows]:
    return (values[start : start + step] for start in range(0, len(values), step))


def _check_dims(name: str, by_dim: Mapping[int, Any] | None, dims: tuple[int, ...]) -> None:
    unknown = sorted(set(by_dim or ()) - set(dims))
    if unknown:
        raise ValueError(
            f"{name} must be given by dims that are stored: {dims}. "
            f"Received: {name} for {unknown}. Name a stage by its dim."
        )
