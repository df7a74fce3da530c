"""Funnels built and measured on a sample of queries: the planner's laboratory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..funnel import FunnelSchedule
from .arrays import Ids, Vectors, check_embeddings
from .facts import IndexFacts
from .faiss import FaissIndex
from .first_stage import FirstStage
from .measures import Measure, recall_against
from .plan import Choice
from .rerank import closest
from .shortlister import Shortlister

Says = Callable[[str], object]  # told what is tried

_GROWTH = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # shortlists tried, times k
_MIDDLES = (2, 4, 8)  # shortlists of a stage in between, times k
_TIMED = 300  # batches of queries a choice is timed by
_LONGEST_S = 1.0  # that timing one choice may take
_ROWS_AT_ONCE = 65_536


class Trials:
    """A gallery and a sample of queries that funnels are tried on.

    Args:
        gallery: `(rows, width)`, raw or scaled. Its prefixes of the last dim, and of those a third
            stage is tried at, are held in memory.
        queries: The sample `(queries, width)`.
        dim: The last dim, at which an answer counts as exact.
        k: Neighbours wanted.
        metric: "cosine", "dot" or "l2".
        measure: From rows found to a quality per query; None: recall against the exact answer.
        own_rows: Which gallery row each query is: left out of the gallery, since a graph finds
            its own nodes more easily than it finds the neighbours of others. None: they are none.
        batch: How many queries come at once.
        says: Told what is tried.

    Examples:
        >>> rows = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
        >>> trials = Trials(rows, rows[:20], 8, 5, "cosine", None, np.arange(20), 1, print)
        exact neighbours of 20 queries at dim 8
        >>> trials.shortest_shortlist(8, 0.9), trials.funnel(4, 20).shortlists
        (5, (20,))
    """

    def __init__(
        self,
        gallery: npt.NDArray[np.generic],
        queries: Vectors,
        dim: int,
        k: int,
        metric: str,
        measure: Measure | None,
        own_rows: Ids | None,
        batch: int,
        says: Says,
    ) -> None:
        self._gallery = gallery
        everything = np.arange(len(gallery))
        self._kept = everything if own_rows is None else np.setdiff1d(everything, own_rows)
        self._queries = queries
        self._dim = dim
        self._k = k
        self._batch = batch
        self._facts = IndexFacts(FunnelSchedule((dim,), (), k), metric)
        self._rows: dict[int, Vectors] = {}
        self.refused: ValueError | None = None  # what FAISS could not make, the last
        self.says = says
        says(f"exact neighbours of {len(queries)} queries at dim {dim}")
        truth = self._kept[self._exact(self._rows_at(dim), k)]
        self._measure = measure or recall_against(truth)
        self._is_recall = measure is None
        self.exact_quality, self.exact_error = self._mean_and_error(truth)
        if self._is_recall:
            self.exact_error = 0.0  # nothing is estimated

    def shortest_shortlist(self, dim: int, target: float) -> int | None:
        """Return the shortest shortlist of exact prefixes that reaches the target; None: none.

        Args:
            dim: Of the prefixes.
            target: What the quality less its standard error is to be.
        """
        if dim == self._dim:
            return self._k
        self.says(f"what prefixes of dim {dim} can reach")
        sizes = sorted({min(round(self._k * more), len(self._kept)) for more in _GROWTH})
        found = self._exact(self._prefixes(dim), sizes[-1])
        for size in sizes:
            shortlists = np.ascontiguousarray(found[:, :size])
            best, _ = closest(
                self._facts.prefix(self._queries, self._dim),
                self._rows_at(self._dim),
                shortlists,
                self._k,
                self._facts.metric,
            )
            quality, error = self._mean_and_error(self._kept[best])
            if quality - error >= target:
                self.says(f"  {quality:.4f} with a shortlist of {size}")
                return size
        self.says(f"  no more than {quality:.4f}, with a shortlist of {size}")
        return None

    def first(self, dim: int, spec: FirstStage) -> Shortlister | None:
        """Build a first stage; None, and a word, if FAISS cannot make it of this gallery."""
        self.says(f"building {spec.factory} over dim {dim}")
        try:
            prefixes = self._prefixes(dim)
            return Shortlister.build(prefixes, spec, self._facts.metric, lambda _done, _rows: None)
        except ValueError as error:
            self.says(str(error))
            self.refused = error
            return None

    def measured(self, first: Shortlister, spec: FirstStage, schedule: FunnelSchedule) -> Choice:
        """Set a first stage, search by a schedule, and return how good and how fast it is."""
        first.set(spec.settings)
        facts = IndexFacts(schedule, self._facts.metric)
        wider = schedule.dims[1:] or schedule.dims
        index = FaissIndex(facts, self._kept, first, {dim: self._rows_at(dim) for dim in wider})
        quality, error = self._mean_and_error(index.search(self._queries).ids)
        if schedule.dims == (self._dim,) and spec.factory == "Flat":
            error = self.exact_error
        choice = Choice(spec, schedule, quality, error, self._seconds(index))
        self.says(choice.line())
        return choice

    def funnel(self, dim: int, shortlist: int) -> FunnelSchedule:
        """Return the funnel from a dim to the last one."""
        if dim == self._dim:
            return FunnelSchedule((dim,), (), self._k)
        return FunnelSchedule((dim, self._dim), (shortlist,), self._k)

    def with_middle(self, schedule: FunnelSchedule, dims: Sequence[int]) -> list[FunnelSchedule]:
        """Return funnels of two stages with a third between them."""
        if len(schedule.dims) != 2:
            return []
        (low, high), (size,) = schedule.dims, schedule.shortlists
        between = [dim for dim in dims if low < dim < high]
        seconds = [self._k * more for more in _MIDDLES if self._k * more < size]
        return [
            FunnelSchedule((low, dim, high), (size, second), self._k)
            for dim in between
            for second in seconds
        ]

    def _mean_and_error(self, found: Ids) -> tuple[float, float]:
        values = self._measure(found)
        least = 1 / values.size / self._k  # one neighbour more or less: no sample is sure
        error = float(values.std(ddof=1) / np.sqrt(values.size))
        return float(values.mean()), max(error, least)

    def _seconds(self, index: FaissIndex) -> float:
        taken = []
        stop = time.perf_counter() + _LONGEST_S
        for turn in range(_TIMED):
            start = turn * self._batch % max(1, len(self._queries) - self._batch + 1)
            some = self._queries[start : start + self._batch]
            began = time.perf_counter()
            index.search(some)
            ended = time.perf_counter()
            taken.append((ended - began) / len(some))
            if ended > stop and turn >= 2:
                break
        return float(np.median(taken))

    def _exact(self, rows: Vectors, n: int) -> Ids:
        """Return which of the rows kept are nearest to each query, compared at the rows' dim."""
        queries = self._facts.prefix(self._queries, rows.shape[1])
        return closest(queries, rows, None, n, self._facts.metric)[0]

    def _rows_at(self, dim: int) -> Vectors:
        if dim not in self._rows:
            self._rows[dim] = self._prefixes(dim)
        return self._rows[dim]

    def _prefixes(self, dim: int) -> Vectors:
        rows = np.empty((len(self._kept), dim), np.float32)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            some = check_embeddings(self._gallery[self._kept[part]], "gallery", self._dim)
            rows[part] = self._facts.prefix(some, dim)
        return rows
