"""The funnel inside Qdrant: one named vector per stage, one nested query per query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..funnel import FunnelSchedule
from ..results import Neighbors
from .base import Described, Ids, IndexFacts, Vectors, check_among, check_embeddings, check_ids
from .qdrant_collection import Collection, Narrowing, as_neighbors

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import ScoredPoint, SearchParams

Progress = Callable[[int, int], object]  # rows done, all rows
Rows = TypeVar("Rows", Ids, Vectors)

_NUMBERS = 1 << 20  # in one request: 20 MiB as JSON, of which a server takes 32
_ROWS = 1000  # uploaded at once, so that progress is seen
_QUERIES = 100  # asked at once, so that the answer comes within the client's timeout


class QdrantIndex(Described):
    """A gallery in a Qdrant collection, and its funnel as one nested query per query.

    Every stage is a named vector ("64"), so the engine's own options set the precision of each.
    The first stage is as exact as its index (on a server: HNSW), a tie across the edge of a
    shortlist falls as the engine has it, and every shard keeps a shortlist of its own; later
    stages compare the whole shortlist exactly. Shortlists of half the gallery or more make the
    whole search exact, whatever `params` say. Made by `build` or `open`.

    Args:
        client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
        collection: Name of the collection.
        facts: Schedule, metric and encoder.
        dims: Stored ones, those of the schedule among them.
        params: `SearchParams` by dim, for stages that are not to be searched as above: `hnsw_ef`,
            or `quantization` without rescoring.

    Examples:
        >>> from qdrant_client import QdrantClient
        >>> gallery = np.eye(4, dtype=np.float32) + 0.1
        >>> schedule = FunnelSchedule(dims=(2, 4), shortlists=(3,), k=1)
        >>> index = QdrantIndex.build(QdrantClient(":memory:"), "pets", gallery, schedule)
        >>> index.search(gallery[:2]).ids.tolist()
        [[0], [1]]
    """

    def __init__(
        self,
        client: QdrantClient,
        collection: str,
        facts: IndexFacts,
        dims: tuple[int, ...],
        params: Mapping[int, SearchParams] | None = None,
    ) -> None:
        _check_stages("params", params, dims)
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
        *,
        progress: Progress | None = None,
        params: Mapping[int, SearchParams] | None = None,
        vectors: Mapping[int, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> QdrantIndex:
        """Return the index of a gallery; of one that was interrupted, upload what is missing.

        Rows that are there already stay as they are (`add` replaces them), and so do the options
        the collection was made with.

        Args:
            client: A `qdrant_client.QdrantClient`: of a server, a path or ":memory:".
            collection: Name of a new collection, or of one that a `build` left unfinished.
            embeddings: The gallery, raw or scaled.
            schedule: The funnel; its last dim must not exceed the width.
            ids: One int64 >= 0 per row, all different; None numbers the rows from 0.
            metric: How embeddings are compared: "cosine", "dot" or "l2"; see `IndexFacts`.
            encoder_fingerprint: Of the model the gallery was embedded with, as its manifest
                gives it; a client then refuses to search by embeddings of another.
            progress: Called with the rows done and all rows, after every upload.
            params: As for the class.
            vectors: Options of `VectorParams` by dim, e.g. `{64: {"quantization_config": ...},
                512: {"on_disk": True}}`. Dims after the first get no HNSW graph unless one says so:
                the funnel reads their shortlists alone.
            **options: Of `create_collection`: `shard_number`, `quantization_config`, ...

        Shapes:
            embeddings: `(rows, width)`. ids: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat, the gallery has
                fewer rows than the funnel returns, or the collection holds another gallery.
            ManifestError: If something else made the collection.
            KerasMrlError: If Qdrant fails.
            ImportError: If qdrant-client is not installed.
        """
        facts = IndexFacts(schedule, metric, encoder_fingerprint)
        gallery = check_embeddings(embeddings, "gallery", facts.width)
        checked = check_ids(ids, len(gallery))
        facts.check_rows(len(gallery))
        _check_stages("vectors", vectors, schedule.dims)
        index = cls(client, collection, facts, schedule.dims, params)
        missing = np.arange(len(checked))
        if index._collection.exists():
            missing = index._collection.missing(facts, checked)
        else:
            index._collection.create(facts, vectors or {}, options)
        index._upload(gallery, checked, missing, progress)
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
                with. A first stage that was a later one there is compared exhaustively.
            params: As for the class.

        Raises:
            ValueError: If the schedule has dims that are not stored.
            ManifestError: If there is no collection, or something else made it.
            KerasMrlError: If Qdrant fails.
        """
        facts = Collection(client, collection).facts()
        chosen = facts if schedule is None else replace(facts, schedule=schedule)
        return cls(client, collection, chosen, facts.schedule.dims, params)

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
        checked = check_ids(np.asarray(ids), len(gallery))  # an array, for None would number rows
        self._upload(gallery, checked, np.arange(len(checked)), progress)

    def remove(self, ids: npt.ArrayLike) -> None:
        """Remove rows; ids that are not there are passed over.

        Args:
            ids: int64 `(n,)`.

        Raises:
            ValueError: If they are none; nothing is removed then.
            KerasMrlError: If Qdrant fails.
        """
        try:
            checked = check_among(ids)
        except ValueError:
            given = np.asarray(ids)
            raise ValueError(
                "ids to remove must be int64 >= 0 in one dimension. "
                f"Received: {given.dtype} of shape {given.shape}. Give those of the rows."
            ) from None
        for some in _batches(checked, _ROWS):
            self._collection.delete(some)

    def search(
        self, queries: npt.ArrayLike, k: int | None = None, among: npt.ArrayLike | None = None
    ) -> Neighbors:
        """Return the nearest gallery rows of each query, best first, ties in order of id.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.
            k: Neighbours wanted, no more than the funnel returns; None for as many.
            among: The only ids that may be returned, int64 `(n,)`; those that are not in the
                gallery are passed over, and fewer than `k` give fewer columns. None: all.

        Returns:
            Where an approximate first stage found fewer for some query, its last ids are -1 and
            their scores -inf.

        Raises:
            ValueError: If queries, k or ids do not fit, or a value is not finite.
            KerasMrlError: If Qdrant fails.
        """
        vectors = check_embeddings(queries, "queries", self.width)
        keep = self.facts.check_k(k)
        allowed = None if among is None else check_among(among)
        limits = (*self.schedule.shortlists, keep)
        listed = 0 if allowed is None else len(allowed)
        # To count exactly is to read every id, and an engine that moves rows counts some twice.
        rows = self._collection.count(exact=False)
        is_whole = 2 * limits[0] >= (rows if allowed is None else min(rows, listed))
        step = max(1, min(_QUERIES, _NUMBERS // (sum(self.schedule.dims) + listed)))
        found: list[list[ScoredPoint]] = []
        for some in _batches(vectors, step):
            found += self._collection.search(self._stages(some, limits, is_whole), allowed)
        most = max(map(len, found), default=0)
        if most < keep:
            keep = max(most, min(keep, self._collection.count(allowed, exact=True)))
        return as_neighbors(found, keep, self.metric)

    def _stages(self, queries: Vectors, limits: tuple[int, ...], is_whole: bool) -> list[Narrowing]:
        params = self.params or {}
        return [
            Narrowing(
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
        for some in _batches(rows, max(1, min(_ROWS, _NUMBERS // sum(self.dims)))):
            taken = gallery[some]
            prefixes = {dim: self.facts.prefix(taken, dim) for dim in self.dims}
            self._collection.upsert(ids[some], prefixes)
            done += len(some)
            if progress is not None:
                progress(done, len(ids))


def _batches(values: Rows, step: int) -> Iterator[Rows]:
    return (values[start : start + step] for start in range(0, len(values), step))


def _check_stages(name: str, given: Mapping[int, Any] | None, dims: tuple[int, ...]) -> None:
    unknown = sorted(set(given or ()) - set(dims))
    if unknown:
        raise ValueError(
            f"{name} must be given by dims that are stored: {dims}. "
            f"Received: {name} for {unknown}. Name a stage by its dim."
        )
