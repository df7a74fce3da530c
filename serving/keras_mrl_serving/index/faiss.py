"""The funnel over FAISS: any of its indexes for the first stage, memory-mapped rows after it.

Every wider stage is a matrix of whole prefixes, already scaled as the metric asks. So FAISS picks
the best of a shortlist in one call (`knn_inner_products_by_idx`), with no lengths to look up and no
Python per row; prefixes between the first and the last dim are stored twice for it, and most plans
have none. Queries are scaled once, at full width: their length changes no order at any prefix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..funnel import FunnelSchedule, check_schedule
from ..results import Neighbors
from .base import (
    Ids,
    LocalIndex,
    Progress,
    Vectors,
    as_gallery,
    best_first,
    check_embeddings,
    lowest_ids_first,
    rounding,
)
from .facts import IndexFacts, other_schedule
from .filters import Filter
from .first_stage import FirstStage, check_first_stage, import_faiss
from .ids import RowIds, check_ids
from .refined import RefinedIndex, over_rows, unscaled
from .shortlister import Shortlister
from .storage import IndexWriter, SavedFiles, open_saved, read_ids, write_ids

ENGINE = "faiss"
DEFAULT = FirstStage.usual("HNSW32")

_FEW = 1024  # rows of a filter: to compare them at the last dim costs less than a shortlist of them
_FLOAT32 = np.dtype(np.float32)
_ROWS_AT_ONCE = 65_536  # gallery rows that are checked, scaled or copied in memory


class FaissIndex(LocalIndex):
    """A gallery whose first stage is a FAISS index in memory, and whose wider stages are on disk.

    The first stage holds the prefixes of the first dim alone. Every later stage is a matrix of
    its prefixes, of which only the rows on the shortlist are read; opened from a folder, it is
    memory-mapped. A shortlist of the whole gallery skips the first stage. Of rows with equal
    scores the lower ids pass every edge, except in first stages that are graphs, signs or codes of
    4 bits. Made by `build` or `open`.

    Args:
        facts: Schedule, metric and encoder.
        ids: Ids of the gallery rows, int64 or strings.
        first: The first stage.
        stages: Rows by dim, float32 or float16 `(rows, dim)`, scaled as the metric asks: of all
            dims after the first, or of the only dim; empty where the first stage holds its rows.
        plan: How the schedule was chosen, as JSON; None if it was given.

    Attributes:
        exhaustive_below: A filter that leaves at most so many rows skips the first stage, and all
            of them are compared; of graphs and codes of 4 bits 1024 at most.
        candidates_at_once: Ids on the shortlists of all queries that a search holds in memory at
            once; queries that need more are searched in chunks.

    Examples:
        >>> gallery = np.eye(8, dtype=np.float32) + 0.1
        >>> schedule = FunnelSchedule(dims=(4, 8), shortlists=(5,), k=1)
        >>> index = FaissIndex.build(gallery, schedule, first_stage=FirstStage("Flat", ""))
        >>> index.search(gallery[:2]).ids.tolist()
        [[0], [1]]
    """

    exhaustive_below = 4096
    candidates_at_once = 1 << 24  # 128 MiB of int64

    def __init__(
        self,
        facts: IndexFacts,
        ids: RowIds | Ids,
        first: Shortlister,
        stages: Mapping[int, Vectors],
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(facts, ids)
        self.plan = plan
        self._first = first
        self._stages = stages or {facts.width: first.rows}
        self._one_query, self._k = (1, facts.width), facts.schedule.k
        self._most = (facts.schedule.k, *facts.schedule.shortlists)[-1]  # neighbours of a query
        # None where one call cannot keep what is promised of equal rows.
        self._refined = first.refined(facts.schedule, self._stages, facts.metric)

    @classmethod
    def build(
        cls,
        embeddings: npt.ArrayLike,
        schedule: FunnelSchedule,
        ids: npt.ArrayLike | None = None,
        metric: str = "cosine",
        encoder_fingerprint: str | None = None,
        prompt: str | None = None,
        *,
        first_stage: FirstStage | None = None,
        path: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
        plan: Mapping[str, Any] | None = None,
        half: bool = False,
    ) -> FaissIndex:
        """Return the index of a gallery.

        Args:
            embeddings: The gallery, raw or scaled; an array, which may be memory-mapped.
            schedule: The funnel; its last dim must not exceed the width.
            ids: One int64 >= 0 or one string per row, all different; None numbers the rows from 0.
            metric: How embeddings are compared: "cosine", "dot" or "l2"; see `IndexFacts`.
            encoder_fingerprint: Fingerprint of the model that embedded the gallery, from its
                manifest; a client then refuses to search by embeddings of another model.
            prompt: The prompt that stood before each text of the gallery, as text; None: none.
            first_stage: Which FAISS index; None takes `DEFAULT`, a graph.
            path: A folder to build in, for galleries whose rows do not fit in memory: the wider
                stages go straight there, and the index is saved. None builds in memory.
            progress: Called with the rows done and all rows, as rows are copied and again as
                they are added to the first stage.
            plan: How the schedule was chosen, saved with the index.
            half: Keep the rows of the wider stages in float16: half of the disk and of the memory
                that maps it, scores that differ in the fourth digit, and hardly another answer.

        Shapes:
            embeddings: `(rows, width)`. ids: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, ids repeat, the gallery has
                fewer rows than the funnel returns, or FAISS cannot make the first stage.
            ImportError: If FAISS is not installed.
        """
        gallery = as_gallery(embeddings, check_schedule(schedule).dims[-1])
        row_ids = RowIds.of(check_ids(ids, len(gallery)))
        facts = IndexFacts(schedule, metric, encoder_fingerprint, prompt, row_ids.names is not None)
        facts.check_rows(len(gallery))
        spec = check_first_stage(first_stage or DEFAULT)
        report = progress or (lambda _done, _rows: None)

        def build_with(new_array: _NewArray) -> FaissIndex:
            dtype = np.dtype(np.float16 if half else np.float32)
            dims = () if spec.holds_rows(facts.schedule) else wider_dims(facts.schedule)
            prefixes, stages = _prefixes_by_stage(gallery, facts, dims, dtype, new_array, report)
            first = Shortlister.build(prefixes, spec, metric, report)
            return cls(facts, row_ids, first, stages, plan)

        if path is None:
            return build_with(lambda _name, shape, dtype: np.empty(shape, dtype))
        with IndexWriter.at(path) as writer:
            build_with(writer.array)._commit(writer)
        return cls.open(path, verify=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a folder; an index that is there stays whole until this one is.

        Raises:
            OSError: If it cannot be written there.
        """
        with IndexWriter.at(path) as writer:
            held = self.first_stage.holds_rows(self.schedule)
            for dim, rows in () if held else self._stages.items():
                copy = writer.array(_stage_name(dim), rows.shape, rows.dtype)
                for start in range(0, len(rows), _ROWS_AT_ONCE):
                    copy[start : start + _ROWS_AT_ONCE] = rows[start : start + _ROWS_AT_ONCE]
            self._commit(writer)

    def _commit(self, writer: IndexWriter) -> None:
        """Write what is not a wider stage, and commit."""
        write_ids(writer, self.row_ids)
        self._first.write(writer.path_for("first", "faiss"))
        spec = self._first.spec
        writer.commit(
            {
                "engine": ENGINE,
                **self.facts.to_json(),
                "first_stage": {"factory": spec.factory, "settings": spec.settings},
                "plan": self.plan,
                "row_dtype": next(iter(self._stages.values())).dtype.name,
            }
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        schedule: FunnelSchedule | None = None,
        *,
        verify: bool = True,
    ) -> FaissIndex:
        """Return the index in a folder: the first stage in memory, the others mapped.

        Args:
            path: The folder.
            schedule: Another funnel than it was built with: other shortlists, another `k`, or fewer
                of its wider dims. The first stage stays.
            verify: Compare every byte with the digests written beside it, which reads it once.

        Raises:
            FileNotFoundError: If no index is there.
            DamagedIndexError: If it is not as it was written.
            ManifestError: If another engine wrote it.
            ValueError: If the schedule begins with another dim, has dims that were not built, or
                returns more rows than there are.
            ImportError: If FAISS is not installed.
        """
        return open_saved(path, lambda saved: cls.from_saved(saved, schedule), verify=verify)

    @classmethod
    def from_saved(cls, saved: SavedFiles, schedule: FunnelSchedule | None = None) -> FaissIndex:
        """Return the index of files that were checked; see `open`."""
        saved.check_engine(ENGINE)
        built = IndexFacts.from_json(saved.card)
        ids = read_ids(saved, built)
        facts = other_schedule(built, schedule, len(ids))
        _check_built(facts.schedule, built.schedule)
        spec = FirstStage.from_json(saved.card.get("first_stage"))
        dtype = np.float16 if saved.card.get("row_dtype") == "float16" else np.float32
        stages = {
            dim: saved.array(_stage_name(dim), (len(ids), dim), dtype)
            for dim in (() if spec.holds_rows(built.schedule) else wider_dims(facts.schedule))
        }
        first = Shortlister.read(saved.file("first"), spec, len(ids), facts)
        return cls(facts, ids, first, stages, saved.card.get("plan"))

    @property
    def first_stage(self) -> FirstStage:
        """Which FAISS index looks at the whole gallery."""
        return self._first.spec

    def search(
        self,
        queries: npt.ArrayLike,
        k: int | None = None,
        among: npt.ArrayLike | None = None,
        filter: Filter | Sequence[Filter] | None = None,
    ) -> Neighbors:
        """Return the nearest gallery rows of each query, best first, ties in order of id.

        One query, as a float32 array of the index's width, is answered by one call of FAISS.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.
            k: Number of neighbours, at most the last shortlist of the funnel; None for its `k`.
            among: The only ids that may be returned, `(n,)`; ids that are not in the gallery are
                passed over, and fewer than `k` give fewer columns. None: all.
            filter: The same, prepared once by `prepare_filter`; or a list, one per query.

        Raises:
            ValueError: If queries, k, filters or ids do not fit, or a value is not finite.
        """
        # Every line here is paid by every query, and the caches are cold after the one before it.
        if (
            among is None
            and type(queries) is np.ndarray
            and queries.shape == self._one_query
            and queries.dtype == _FLOAT32
        ):
            refined, number = self._refined, self._k if k is None else k
            if filter is not None and refined is not None:
                refined = self._within(filter) if type(filter) is Filter else None
            if refined is not None and type(number) is int and 0 < number <= self._most:
                found = refined.search_one(queries, number)
                if found is not None:
                    rows, scores = found
                    return Neighbors(rows if self._returns_rows else self._ids_of(rows), scores)
        return super().search(queries, k, among, filter)

    @cached_property
    def _returns_rows(self) -> bool:
        """Whether ids are the numbers of the rows, as the caller gave them."""
        return self.row_ids.names is None and self._are_row_numbers

    def _ids_of(self, rows: Ids) -> npt.NDArray[Any]:
        return self.row_ids.given(self.ids[rows])

    def _within(self, only: Filter) -> RefinedIndex | None:
        """Return the funnel that answers within a filter in one call; None if none does."""
        only.check(self)
        if "refined" not in only.prepared:
            refined = None
            few = min(self.exhaustive_below, _FEW)
            if len(only) > max(few, (*self.schedule.shortlists, self._most)[0]):
                refined = self._first.refined(self.schedule, self._stages, self.facts.metric, only)
            only.prepared.setdefault("refined", refined)
        within: RefinedIndex | None = only.prepared["refined"]
        return within

    def _vectors(self, rows: Ids) -> Vectors:
        return np.array(self._stages[self.width][rows], np.float32)

    def _nearest(self, queries: Vectors, k: int, only: Filter | None) -> Neighbors:
        if len(queries) > 1:
            return self._search_funnel(queries, k, only)
        # FAISS's threads would wait for each other longer than one query takes.
        faiss = import_faiss()
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            return self._search_funnel(queries, k, only)
        finally:
            faiss.omp_set_num_threads(threads)

    def _search_funnel(self, queries: Vectors, k: int, only: Filter | None) -> Neighbors:
        among = None if only is None else only.rows
        refined = self._refined if only is None else self._within(only)
        queries = np.ascontiguousarray(queries[:, : self.width])
        queries, factors = unscaled(import_faiss(), queries, self.metric)
        schedule = self.schedule
        size = schedule.shortlists[0] if schedule.shortlists else k
        total = len(self.ids) if among is None else len(among)
        is_exhaustive = size >= total or (
            only is not None and refined is None and total <= self.exhaustive_below
        )
        at_once = self.candidates_at_once
        if next(iter(self._stages.values())).dtype == np.float16:
            at_once //= self.width  # whose rows are made float32 to be compared
        step = max(1, at_once // (total if is_exhaustive else size))
        answers = []
        for start in range(0, len(queries), step):
            chunk = queries[start : start + step]
            if is_exhaustive:
                shortlists = None if among is None else np.tile(among, (len(chunk), 1))
                answers.append(self._rerank(chunk, k, shortlists, among))
            elif refined is not None:
                rows, scores, is_open = refined.search(chunk, k)
                if is_open.any():
                    rows[is_open], scores[is_open] = self._in_stages(chunk[is_open], k, size, only)
                answers.append((rows, scores))
            else:
                answers.append(self._in_stages(chunk, k, size, only))
        rows, scores = (
            answers[0] if len(answers) == 1 else map(np.concatenate, zip(*answers, strict=True))
        )
        scores = scores * factors
        ids = self.ids[rows]
        if np.count_nonzero(scores[:, 1:] == scores[:, :-1]):
            order = best_first(ids, scores)
            ids = np.take_along_axis(ids, order, axis=1)
            scores = np.take_along_axis(scores, order, axis=1)
        return Neighbors(ids, scores)

    def _in_stages(
        self, queries: Vectors, k: int, size: int, only: Filter | None
    ) -> tuple[Ids, Vectors]:
        """Search stage by stage, to look at the edges between them."""
        prefixes = _cut(queries, self.schedule.dims[0])
        shortlists = self._first.search(prefixes, size, only, self.ids)
        return self._rerank(queries, k, shortlists, None if only is None else only.rows)

    def _rerank(
        self, queries: Vectors, k: int, shortlists: Ids | None, among: Ids | None
    ) -> tuple[Ids, Vectors]:
        """Return the best rows of shortlists and their scores; None lists the whole gallery."""
        metric = self.facts.metric
        *between, (_, widest) = self._stages.items()
        for (dim, stage), size in zip(between, self.schedule.shortlists[1:], strict=True):
            shortlists, _ = closest(_cut(queries, dim), stage, shortlists, size, metric, self.ids)
        rows, scores = closest(queries, widest, shortlists, k, metric, self.ids)
        # -1 means that the first stage returned fewer than k rows: compare the query with all.
        # Tested on a list, which for one query takes a tenth of the time that NumPy does.
        if -1 in rows[:, -1].tolist():
            allowed = None if among is None else among[None]
            for query in np.flatnonzero(rows[:, -1] < 0):
                one = slice(query, query + 1)
                rows[one], scores[one] = closest(queries[one], widest, allowed, k, metric, self.ids)
        return rows, scores


def closest(
    queries: Vectors,
    rows: Vectors,
    shortlists: Ids | None,
    k: int,
    metric: str,
    ids: Ids | None = None,
) -> tuple[Ids, Vectors]:
    """Return the best rows of each query's shortlist, best first, and FAISS's scores of them.

    FAISS compares them, with no Python per row. Which of equal rows are among the best, their ids
    decide; in which order equal rows come, nothing does.

    Args:
        queries: As the metric compares them, contiguous `(batch, dim)`.
        rows: All rows of the gallery, likewise `(rows, dim)`; only those on a shortlist are read.
        shortlists: Row numbers `(batch, n)`, contiguous, -1 after the last; None: every row.
        k: Number of rows to return.
        metric: "cosine", "dot" or "l2".
        ids: Ids of all rows; None takes the row numbers.

    Shapes:
        Returns int64 and float32 `(batch, k)`, fewer columns where there are fewer rows, and
        -1 where a shortlist is shorter.

    Examples:
        >>> rows = np.float32([[1, 0], [0, 1], [1, 1]])
        >>> closest(rows[:1], rows, np.array([[1, 2]]), 1, "dot")[0].tolist()
        [[2]]
    """
    faiss = import_faiss()
    if shortlists is None:
        shortlists = _closest_of_all(queries, rows, k, metric, ids)

    def ask(some: slice, count: int) -> tuple[Vectors, Ids]:
        return _compared(faiss, queries[some], rows, shortlists[some], count, metric)

    distances, best = ask(slice(None), k + 1)
    if best.shape[1] > k:
        best = lowest_ids_first(distances, best, ids, 0.0, ask)
        distances = distances[:, :k]
    return best, distances


def _compared(
    faiss: Any, queries: Vectors, rows: Vectors, shortlists: Ids, count: int, metric: str
) -> tuple[Vectors, Ids]:
    """Return up to `count` of the best rows of shortlists, each compared by itself."""
    stride = shortlists.shape[1]
    count = min(count, stride)
    if rows.dtype == np.float16:
        listed = shortlists.ravel()
        rows = rows[np.maximum(listed, 0)].astype(np.float32)
        places = np.where(listed < 0, -1, np.arange(len(listed))).reshape(shortlists.shape)
        scores, best = _compared(faiss, queries, rows, places, count, metric)
        return scores, np.where(best < 0, -1, listed[best])
    scores = np.empty((len(queries), count), np.float32)
    best = np.empty((len(queries), count), np.int64)
    by_idx = faiss.knn_L2sqr_by_idx if metric == "l2" else faiss.knn_inner_products_by_idx
    x, y, subset, values, ids = map(faiss.swig_ptr, (queries, rows, shortlists, scores, best))
    sizes = queries.shape[1], len(queries), len(rows), stride, count
    by_idx(x, y, subset, *sizes, values, ids, stride)  # FAISS's own stride is len(rows)
    return scores, best


def _closest_of_all(queries: Vectors, rows: Vectors, k: int, metric: str, ids: Ids | None) -> Ids:
    """Return the rows of the whole gallery that are nearest to each query, in no order."""
    faiss = import_faiss()
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT

    def ask(some: slice, count: int) -> tuple[Vectors, Ids]:
        count = min(count, len(rows))
        if rows.dtype == np.float16:
            scores, best = over_rows(faiss, rows, metric).search(queries[some], count)
        else:
            scores, best = faiss.knn(queries[some], rows, count, metric=kind)
        return scores, best

    if k >= len(rows):
        return np.tile(np.arange(len(rows)), (len(queries), 1))
    scores, best = ask(slice(None), k + 1)
    at_the_edge = rows[best[:, k - 1 :].ravel()].astype(np.float32, copy=False)
    lengths = [np.sqrt(np.einsum("rd,rd->r", some, some).max()) for some in (queries, at_the_edge)]
    slack = rounding(metric.replace("cosine", "dot"), queries.shape[1], *lengths)
    return lowest_ids_first(scores, best, ids, slack, ask)


def _cut(queries: Vectors, dim: int) -> Vectors:
    return np.ascontiguousarray(queries[:, :dim])


_NewArray = Callable[[str, tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]


def _prefixes_by_stage(
    gallery: npt.NDArray[Any],
    facts: IndexFacts,
    dims: tuple[int, ...],
    dtype: np.dtype[Any],
    new_array: _NewArray,
    progress: Progress,
) -> tuple[Vectors, dict[int, Vectors]]:
    """Return the prefixes of the first stage, and by dim those of stages after it."""
    num_rows, first_dim = len(gallery), facts.schedule.dims[0]
    first = np.empty((num_rows, first_dim), np.float32)
    stages = {dim: new_array(_stage_name(dim), (num_rows, dim), dtype) for dim in dims}
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, num_rows))
        rows = check_embeddings(gallery[part], "gallery", facts.width)
        first[part] = facts.prefix(rows, first_dim)
        for dim, stage in stages.items():
            stage[part] = facts.prefix(rows, dim)
        progress(part.stop, num_rows)
    return first, stages


def wider_dims(schedule: FunnelSchedule) -> tuple[int, ...]:
    """Return the dims at which rows are reranked: all after the first, or the only one.

    Examples:
        >>> wider_dims(FunnelSchedule((8, 64), (20,), 5)), wider_dims(FunnelSchedule((8,), (), 5))
        ((64,), (8,))
    """
    return schedule.dims[1:] or schedule.dims


def _check_built(schedule: FunnelSchedule, built: FunnelSchedule) -> None:
    """Raise `ValueError` where a funnel needs a stage that was not built."""
    if schedule.dims[0] != built.dims[0] or not set(wider_dims(schedule)) <= set(wider_dims(built)):
        raise ValueError(
            "A schedule must begin with the dim of the first stage, and go on with wider dims that "
            f"were built: {built.dims}. Received: dims={schedule.dims}. Build another index for it."
        )


def _stage_name(dim: int) -> str:
    return f"rows_{dim}"
