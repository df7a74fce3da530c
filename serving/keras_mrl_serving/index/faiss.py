"""The funnel over FAISS: any of its indexes for the first stage, memory-mapped rows after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..funnel import FunnelSchedule
from ..results import Neighbors
from .base import (
    Ids,
    IndexFacts,
    LocalIndex,
    Vectors,
    as_gallery,
    best_first,
    check_embeddings,
    check_ids,
)
from .first_stage import FirstStage, Progress, Shortlister, check_first_stage, import_faiss
from .storage import Saved, Writing, check_engine, opened

# Compares queries with the rows on their shortlists, in FAISS: no Python per row.


def closest(
    queries: Vectors, rows: Vectors, shortlists: Ids | None, keep: int, metric: str
) -> tuple[Ids, Vectors]:
    """Return the best rows of each query's shortlist, best first, and their scores.

    Args:
        queries: As the metric compares them, contiguous `(batch, dim)`.
        rows: All rows of the gallery, likewise `(rows, dim)`; only those on a shortlist are read.
        shortlists: Row numbers `(batch, n)`, contiguous, -1 after the last; None: every row.
        keep: How many of them are wanted.
        metric: "cosine", "dot" or "l2".

    Shapes:
        Returns int64 and float32 `(batch, keep)`, fewer columns where there are fewer rows, and
        -1 where a shortlist is shorter.

    Examples:
        >>> rows = np.float32([[1, 0], [0, 1], [1, 1]])
        >>> closest(rows[:1], rows, np.array([[1, 2]]), 1, "dot")[0].tolist()
        [[2]]
    """
    faiss = import_faiss()
    is_distance = metric == "l2"
    if shortlists is None:
        kind = faiss.METRIC_L2 if is_distance else faiss.METRIC_INNER_PRODUCT
        scores, best = faiss.knn(queries, rows, min(keep, len(rows)), metric=kind)
    else:
        stride = shortlists.shape[1]
        keep = min(keep, stride)
        scores = np.empty((len(queries), keep), np.float32)
        best = np.empty((len(queries), keep), np.int64)
        by_idx = faiss.knn_L2sqr_by_idx if is_distance else faiss.knn_inner_products_by_idx
        x, y, subset, values, ids = map(faiss.swig_ptr, (queries, rows, shortlists, scores, best))
        sizes = queries.shape[1], len(queries), len(rows), stride, keep
        by_idx(x, y, subset, *sizes, values, ids, stride)  # FAISS's own stride is len(rows)
    return best, -scores if is_distance else scores


ENGINE = "faiss"
DEFAULT = FirstStage.usual("HNSW32")

_ROWS_AT_ONCE = 65_536  # of the gallery that are checked and scaled in memory
_FEW = 4096  # rows a filter leaves that are all compared: no first stage is faster
_MAX_CANDIDATES = 1 << 24  # ids held at once, of all queries: 128 MiB


class FaissIndex(LocalIndex):
    """A gallery whose first stage is a FAISS index in memory, and whose wider stages are on disk.

    The first stage holds the prefixes of the first dim alone. Every later stage is a matrix of
    its prefixes, scaled as the metric asks, of which only the rows on the shortlist are read;
    opened from a folder, it is memory-mapped. A shortlist of the whole gallery passes the first
    stage over. Made by `build` or `open`.

    Args:
        facts: Schedule, metric and encoder.
        ids: Of the gallery rows, int64 `(rows,)`.
        first: The first stage.
        stages: Rows by dim, float32 `(rows, dim)`: of all dims after the first, or of the only.
        plan: How the schedule was chosen, as JSON; None if it was given.

    Examples:
        >>> gallery = np.eye(8, dtype=np.float32) + 0.1
        >>> schedule = FunnelSchedule(dims=(4, 8), shortlists=(5,), k=1)
        >>> index = FaissIndex.build(gallery, schedule, first_stage=FirstStage("Flat", ""))
        >>> index.search(gallery[:2]).ids.tolist()
        [[0], [1]]
    """

    def __init__(
        self,
        facts: IndexFacts,
        ids: Ids,
        first: Shortlister,
        stages: Mapping[int, Vectors],
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(facts, ids)
        self.plan = plan
        self._first = first
        self._stages = stages

    @classmethod
    def build(
        cls,
        embeddings: npt.ArrayLike,
        schedule: FunnelSchedule,
        ids: npt.ArrayLike | None = None,
        metric: str = "cosine",
        encoder_fingerprint: str | None = None,
        *,
        first_stage: FirstStage | None = None,
        path: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        plan: Mapping[str, Any] | None = None,
    ) -> FaissIndex:
        """Return the index of a gallery.

        Args:
            embeddings: The gallery, raw or scaled; an array, memory-mapped ones too.
            schedule: The funnel; its last dim must not exceed the width.
            ids: One int64 >= 0 per row, all different; None numbers the rows from 0.
            metric: How embeddings are compared: "cosine", "dot" or "l2"; see `IndexFacts`.
            encoder_fingerprint: Of the model the gallery was embedded with, as its manifest
                gives it; a client then refuses to search by embeddings of another.
            first_stage: Which FAISS index; None takes `DEFAULT`, a graph.
            path: A folder to build in, for galleries whose rows do not fit in memory: the wider
                stages go straight there, and the index is saved. None builds in memory.
            progress: Called with the rows done and all rows, as rows are copied and again as
                they are added to the first stage.
            plan: How the schedule was chosen, kept beside it.

        Shapes:
            embeddings: `(rows, width)`. ids: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat, the gallery has
                fewer rows than the funnel returns, or FAISS cannot make the first stage.
            ImportError: If FAISS is not installed.
        """
        facts = IndexFacts(schedule, metric, encoder_fingerprint)
        gallery = as_gallery(embeddings, facts.width)
        checked = check_ids(ids, len(gallery))
        facts.check_rows(len(gallery))
        report = progress or (lambda _done, _rows: None)
        spec = check_first_stage(first_stage or DEFAULT)

        def first(prefixes: Vectors) -> Shortlister:
            return Shortlister.build(prefixes, spec, metric, report)

        if path is None:
            stages, prefixes = _stages(gallery, facts, _in_memory, report)
            return cls(facts, checked, first(prefixes), stages, plan)
        with Writing(path) as files:
            stages, prefixes = _stages(gallery, facts, files.array, report)
            cls(facts, checked, first(prefixes), stages, plan)._commit(files)
        return cls.open(path, verify=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a folder; one that is there stays whole until this one is.

        Raises:
            OSError: If it cannot be written there.
        """
        with Writing(path) as files:
            for dim, rows in self._stages.items():
                stage = files.array(_name(dim), rows.shape, rows.dtype)
                for start in range(0, len(rows), _ROWS_AT_ONCE):
                    stage[start : start + _ROWS_AT_ONCE] = rows[start : start + _ROWS_AT_ONCE]
            self._commit(files)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> FaissIndex:
        """Return the index a folder holds: the first stage in memory, the others mapped.

        Args:
            path: The folder.
            verify: Compare every byte with the digests written beside it, which reads it once.

        Raises:
            FileNotFoundError: If no index is there.
            DamagedIndexError: If it is not as it was written.
            ManifestError: If another engine wrote it.
            ImportError: If FAISS is not installed.
        """
        return opened(path, cls.of, verify=verify)

    @classmethod
    def of(cls, saved: Saved) -> FaissIndex:
        """Return the index of files that were read."""
        check_engine(saved, ENGINE)
        facts = IndexFacts.from_json(saved.card)
        first = Shortlister.read(saved.files["first"], FirstStage(**saved.card["first_stage"]))
        stages = {dim: saved.array(_name(dim)) for dim in _wider(facts.schedule)}
        return cls(facts, np.array(saved.array("ids")), first, stages, saved.card["plan"])

    @property
    def first_stage(self) -> FirstStage:
        """Which FAISS index looks at the whole gallery."""
        return self._first.spec

    def _commit(self, files: Writing) -> None:
        files.array("ids", self.ids.shape, np.int64)[:] = self.ids
        self._first.write(files.place("first", "faiss"))
        spec = self._first.spec
        said = {"factory": spec.factory, "settings": spec.settings}
        card = {"engine": ENGINE, **self.facts.to_json(), "first_stage": said, "plan": self.plan}
        files.commit(card)

    def _nearest(self, queries: Vectors, k: int, rows: Ids | None) -> Neighbors:
        if len(queries) > 1:
            return self._searched(queries, k, rows)
        faiss = import_faiss()  # whose threads wait for each other longer than one query takes
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            return self._searched(queries, k, rows)
        finally:
            faiss.omp_set_num_threads(threads)

    def _searched(self, queries: Vectors, k: int, rows: Ids | None) -> Neighbors:
        # Scaled once: how long a query is changes no order, at no prefix.
        queries = self.facts.prefix(queries, self.width)
        n = self.schedule.shortlists[0] if self.schedule.shortlists else k
        total = len(self) if rows is None else len(rows)
        few = n >= total
        if rows is not None:
            few = few or total <= _FEW or not self._first.can_choose
        step = max(1, _MAX_CANDIDATES // (total if few else n))
        parts = []
        for start in range(0, len(queries), step):
            some = queries[start : start + step]
            candidates: Ids | None
            if not few:
                candidates = self._first.search(_cut(some, self.schedule.dims[0]), n, rows)
            else:
                candidates = None if rows is None else np.tile(rows, (len(some), 1))
            parts.append(self._rerank(some, k, candidates, rows))
        found, scores = (
            parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        )
        ids = self.ids[found]
        if np.count_nonzero(scores[:, 1:] == scores[:, :-1]):
            order = best_first(ids, scores)
            ids = np.take_along_axis(ids, order, axis=1)
            scores = np.take_along_axis(scores, order, axis=1)
        return Neighbors(ids, scores)

    def _rerank(
        self, queries: Vectors, k: int, candidates: Ids | None, among: Ids | None
    ) -> tuple[Ids, Vectors]:
        """Narrow what the first stage found, stage by stage; None: the whole gallery."""
        *between, last = self._stages.items()
        for (dim, rows), keep in zip(between, self.schedule.shortlists[1:], strict=True):
            candidates, _ = closest(_cut(queries, dim), rows, candidates, keep, self.metric)
        found, scores = closest(queries, last[1], candidates, k, self.metric)
        if -1 in found[:, -1].tolist():  # of one query ten times as fast as to ask NumPy
            for query in np.flatnonzero(found[:, -1] < 0):  # too few: compare with every row
                one, every = slice(query, query + 1), None if among is None else among[None]
                found[one], scores[one] = closest(queries[one], last[1], every, k, self.metric)
        return found, scores


def _cut(queries: Vectors, dim: int) -> Vectors:
    return np.ascontiguousarray(queries[:, :dim])


def _stages(
    gallery: npt.NDArray[Any],
    facts: IndexFacts,
    make: Callable[[str, tuple[int, ...], type[np.float32]], npt.NDArray[Any]],
    progress: Progress,
) -> tuple[dict[int, Vectors], Vectors]:
    """Return the rows of the wider stages, and the prefixes of the first."""
    rows = len(gallery)
    first = facts.schedule.dims[0]
    prefixes = np.empty((rows, first), np.float32)
    stages = {dim: make(_name(dim), (rows, dim), np.float32) for dim in _wider(facts.schedule)}
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, rows))
        some = check_embeddings(gallery[part], "gallery", facts.width)
        prefixes[part] = facts.prefix(some, first)
        for dim, stage in stages.items():
            stage[part] = facts.prefix(some, dim)
        progress(part.stop, rows)
    return stages, prefixes


def _wider(schedule: FunnelSchedule) -> tuple[int, ...]:
    return schedule.dims[1:] or schedule.dims


def _in_memory(name: str, shape: tuple[int, ...], dtype: type[np.float32]) -> npt.NDArray[Any]:
    del name
    return np.empty(shape, dtype)


def _name(dim: int) -> str:
    return f"rows_{dim}"
