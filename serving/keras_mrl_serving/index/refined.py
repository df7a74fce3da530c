"""A whole funnel as one FAISS index, which answers a query in one call.

Around the first stage come FAISS's own parts: an `IndexPreTransform` that cuts the query to the dim
of the stage, and an `IndexRefine` that compares the shortlist at the next one. The rows of a stage
are not copied: FAISS reads them where they lie, in memory or in a mapped file.

Between the stages nothing of ours runs. So nothing sees whether the edge of a shortlist ran through
rows that look equal, of which the lower ids are to pass. An answer is given here only where that
cannot have been: none of its rows has a copy in the first stage, and no two of its scores are
equal. The others are searched again stage by stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..embeddings import inverse_length
from ..funnel import FunnelSchedule
from .base import Ids, Vectors

Rows = npt.NDArray[Any]  # float32 or float16 `(rows, dim)`

# Squared lengths of queries that FAISS takes as they are.
_LEAST_SQUARE, _MOST_SQUARE = 1e-6, 1e6
_NUMBERS_AT_ONCE = 1 << 21  # of codes that are hashed, 16 MiB of uint64


Found = tuple[Ids, Vectors]
Answer = Callable[[npt.NDArray[Any]], Found | None]


class RefinedIndex:
    """A funnel that FAISS searches in one call, one query at a time.

    Args:
        faiss: The module.
        first: FAISS index of the first stage: a graph, or codes of 4 bits. Others promise more of
            equal rows than this can keep.
        schedule: The funnel.
        stages: Rows by dim, as the metric compares them.
        metric: "cosine", "dot" or "l2".
        copied: Which rows look like another to the first stage, `(rows,)`; None: none does, or
            any may.
        inner: FAISS's parameters for the first stage; None for its own.

    Attributes:
        copies_as_set: At most so many rows of `copied` are kept as a set (100,000 are megabytes).

    Examples:
        >>> import faiss
        >>> rows = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
        >>> first = faiss.index_factory(4, "HNSW8", faiss.METRIC_INNER_PRODUCT)
        >>> first.add(np.ascontiguousarray(rows[:, :4]))
        >>> funnel = FunnelSchedule((4, 8), (100,), 1)
        >>> refined = RefinedIndex(faiss, first, funnel, {8: rows}, "dot", None)
        >>> found, scores = refined.search_one(rows[7:8], 1)
        >>> found[0].tolist() == np.argsort(-rows @ rows[7])[:1].tolist()
        True
    """

    copies_as_set = 100_000

    def __init__(
        self,
        faiss: Any,
        first: Any,
        schedule: FunnelSchedule,
        stages: Mapping[int, Rows],
        metric: str,
        copied: npt.NDArray[np.bool_] | None,
        inner: Any = None,
    ) -> None:
        self._faiss = faiss
        self._inner = inner
        self._copied = copied
        # Of a few rows a set tells in a fraction of the time that NumPy takes to look them up.
        self._are_single: Callable[[list[int]], bool] | None = None
        if copied is not None and np.count_nonzero(copied) <= self.copies_as_set:
            self._are_single = frozenset(np.flatnonzero(copied).tolist()).isdisjoint
        elif copied is not None:
            self._are_single = lambda numbers: not copied[numbers].any()
        self._sizes = schedule.shortlists
        self._width = schedule.dims[-1]
        self._parts: list[Any] = [first, stages]  # FAISS frees what Python no longer holds
        self._is_cut: list[bool] = []  # for each later stage, whether the one before is narrower
        self._index = first
        dim = schedule.dims[0]
        for wider in schedule.dims[1:] or schedule.dims:
            self._is_cut.append(wider != dim)
            if wider != dim:
                cut = faiss.RemapDimensionsTransform(wider, dim, False)
                self._index = faiss.IndexPreTransform(cut, self._index)
                self._parts += [cut, self._index]
            rows = over_rows(faiss, stages[wider], metric)
            self._index = faiss.IndexRefine(self._index, rows)
            self._parts += [rows, self._index]
            dim = wider
        self._search = self._index.search_c
        # What may answer a query, by the number of neighbours: more than one where threads ask.
        self._answers: dict[int, list[Answer]] = {}
        self._is_cosine, self._sign = metric == "cosine", -1 if metric == "l2" else 1

    def search_one(self, query: npt.NDArray[Any], k: int) -> Found | None:
        """Return the rows nearest to a query, and their scores.

        None where equal rows may have decided, where the first stage found too few, and for a query
        that is not finite or of an odd length.

        Args:
            query: float32 `(1, width)`.
            k: Number of neighbours, at most the last shortlist.

        Shapes:
            Returns int64 and float32 `(1, k)`.
        """
        answers = self._answers.get(k)
        if answers is None:
            answers = self._answers.setdefault(k, [])
        try:
            answer = answers.pop()  # no other thread has it from here on
        except IndexError:
            answer = self._answer(k)
        found = answer(query)
        answers.append(answer)
        return found

    def _answer(self, k: int) -> Answer:
        """Return what answers one query after the other.

        FAISS empties the caches of the processor. So what follows it touches as little as it can:
        memory made once, and what was looked up before.
        """
        count, parameters = self._parameters(k)
        taken = np.empty((1, self._width), np.float32)
        scores, rows = np.empty((1, count), np.float32), np.empty((1, count), np.int64)
        x, values, numbers = map(self._faiss.swig_ptr, (taken, scores, rows))
        search = functools.partial(self._index.search_c, 1, x, count, values, numbers, parameters)
        best_scores, best_rows = scores[:, :k], rows[:, :k]
        # A number that is an array NumPy multiplies by in half the time.
        factor = np.full((), self._sign, np.float32)
        squared = functools.partial(self._faiss.fvec_norm_L2sqr, x, self._width)
        score_list, row_list = scores[0].tolist, rows[0].tolist
        are_single, is_cosine, sqrt = self._are_single, self._is_cosine, math.sqrt

        def answer(query: npt.NDArray[Any]) -> Found | None:
            taken[...] = query
            # One product is the test of the numbers and the squared length.
            square = squared()
            if not _LEAST_SQUARE <= square <= _MOST_SQUARE:
                return None
            search()
            # By Python's numbers: of so few they take a fraction of the time that NumPy does.
            if len(set(score_list())) < count:
                return None
            found = row_list()
            if found[-1] < 0 or (are_single is not None and not are_single(found)):
                return None
            if is_cosine:
                factor.fill(1 / sqrt(square))
            return best_rows.copy(), best_scores * factor

        return answer

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors, npt.NDArray[np.bool_]]:
        """Return the rows nearest to each query, their scores, and which answers do not count.

        Args:
            queries: `(batch, width)`, contiguous.
            k: Number of neighbours.

        Shapes:
            Returns int64, float32 `(batch, k)` and bool `(batch,)`.
        """
        count, parameters = self._parameters(k)
        scores = np.empty((len(queries), count), np.float32)
        rows = np.empty((len(queries), count), np.int64)
        x, values, numbers = map(self._faiss.swig_ptr, (queries, scores, rows))
        self._search(len(queries), x, count, values, numbers, parameters)
        is_open = (scores[:, 1:] == scores[:, :-1]).any(axis=1) | (rows[:, -1] < 0)
        if self._copied is not None:
            is_open |= self._copied[rows].any(axis=1)
        return rows[:, :k], scores[:, :k], is_open

    def _parameters(self, k: int) -> tuple[int, Any]:
        """Return for how many neighbours FAISS is asked, and how long its shortlists are."""
        sizes = self._sizes or (k,)
        count = min(k + 1, sizes[-1])  # one more shows whether the edge runs through equal scores
        parameters = self._inner
        for is_cut, size, next_size in zip(self._is_cut, sizes, (*sizes[1:], count), strict=True):
            if parameters is not None and is_cut:
                parameters = self._faiss.SearchParametersPreTransform(index_params=parameters)
            # FAISS multiplies and rounds down; the half keeps that from being one too few.
            options = {"k_factor": (size + 0.5) / next_size}
            if parameters is not None:
                options["base_index_params"] = parameters
            parameters = self._faiss.IndexRefineSearchParameters(**options)
        return count, parameters


def unscaled(faiss: Any, queries: Vectors, metric: str) -> tuple[Vectors, Vectors]:
    """Return queries as FAISS takes them, and what its scores of each are multiplied by.

    A cosine is a product divided by the query's length, which changes no order: so queries are not
    scaled, but those so short or long that FAISS might round them to nothing.

    Args:
        faiss: The module.
        queries: `(batch, width)`, contiguous.
        metric: "cosine", "dot" or "l2".

    Shapes:
        Returns float32 `(batch, width)` and `(batch, 1)`.

    Examples:
        >>> import faiss
        >>> queries, factors = unscaled(faiss, np.float32([[3, 4], [0, 0]]), "cosine")
        >>> queries.tolist(), factors.round(3).tolist()
        ([[3.0, 4.0], [0.0, 0.0]], [[0.20000000298023224], [1.0]])
    """
    if metric != "cosine":
        return queries, np.full((len(queries), 1), -1 if metric == "l2" else 1, np.float32)
    squared = np.empty(len(queries), np.float32)
    x, lengths = map(faiss.swig_ptr, (queries, squared))
    faiss.fvec_norms_L2sqr(lengths, x, queries.shape[1], len(queries))
    squares = squared.tolist()
    is_odd = [not _LEAST_SQUARE <= square <= _MOST_SQUARE for square in squares]
    factors = [
        1 if odd else 1 / math.sqrt(square) for odd, square in zip(is_odd, squares, strict=True)
    ]
    if any(is_odd):
        queries = queries * np.where(is_odd, inverse_length(squared), np.float32(1))[:, None]
    return queries, np.array(factors, np.float32)[:, None]


def over_rows(faiss: Any, rows: Rows, metric: str) -> Any:
    """Return a FAISS index of rows that are not copied; hold on to them as long as to it.

    Examples:
        >>> import faiss
        >>> rows = np.eye(3, dtype=np.float32)
        >>> over_rows(faiss, rows, "dot").search(rows[1:2], 1)[1].tolist()
        [[1]]
    """
    number, dim = rows.shape
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if rows.dtype == np.float16:
        index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, kind)
    else:
        index = faiss.IndexFlat(dim, kind)
    index.codes = faiss.MaybeOwnedVectorUInt8.create_view(
        faiss.swig_ptr(rows.view(np.uint8)), rows.nbytes, index.codes.owner
    )
    index.ntotal = number
    return index


def has_copies(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return which rows equal another one, `(rows,)`; once in 2**64 also one that equals none.

    Examples:
        >>> has_copies(np.uint8([[1, 2], [3, 4], [1, 2]])).tolist()
        [True, False, True]
    """
    words = codes.view(np.uint32) if codes.shape[1] % 4 == 0 else codes
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.empty(len(codes), np.uint64)
    step = max(1, _NUMBERS_AT_ONCE // words.shape[1])
    for start in range(0, len(codes), step):
        hashes[start : start + step] = words[start : start + step].astype(np.uint64) @ factors
    order = np.argsort(hashes)
    same = hashes[order][1:] == hashes[order][:-1]
    copied = np.zeros(len(codes), bool)
    copied[order[1:]] = same
    copied[order[:-1]] |= same
    return copied
