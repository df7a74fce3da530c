"""Where funnels are tried: a gallery and a sample of queries on the machine that will search.

A first stage is built once and kept as long as a funnel over it is among the fastest. Single
queries are timed by the processor time of their thread, which other work on the machine moves
little; the fastest funnels are timed once more at the end, in laps, one after the other, so that
what still moves it moves all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..funnel import FunnelSchedule
from ..projection import Projection, principal_directions
from .base import Ids, Index, Vectors, check_embeddings
from .facts import IndexFacts
from .faiss import FaissIndex, closest, wider_dims
from .first_stage import FirstStage
from .plan import Choice, Measure, recall_against, sure, time_per_query
from .shortlister import Shortlister

Says = Callable[[str], object]  # called with a line about what is tried
Timer = Callable[[Index, Vectors, int], float]  # (index, queries, batch) -> seconds per query

_GROWTH = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # shortlists tried, times k
_ROWS_AT_ONCE = 65_536
_LAPS = 5  # in which the fastest funnels are timed once more
_PCA_ROWS = 10_000  # of the gallery, that components are made of
_FLAT = "Flat"


class Trials:
    """A gallery and a sample of queries that funnels are tried on.

    Args:
        gallery: `(rows, width)`, raw or scaled. Its prefixes of the last dim, and of those a third
            stage is tried at, are held in memory.
        queries: The sample `(queries, width)`.
        dim: The last dim, at which an answer counts as exact.
        k: Number of neighbours.
        metric: "cosine", "dot" or "l2".
        measure: From neighbours to a quality per query; None: recall against the exact answer.
        own_rows: Which gallery row each query is: left out of the gallery, since a graph finds
            its own nodes more easily than it finds the neighbours of others. None: queries are
            no rows.
        batch: How many queries come at once.
        says: Called with a line about each thing that is tried.
        timer: Returns the cost of an index.
        projection: What projected first stages look at; None: principal components of the gallery.

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
        timer: Timer = time_per_query,
        projection: Projection | None = None,
    ) -> None:
        self._gallery = gallery
        self._projection = projection
        self._firsts: dict[tuple[int, str], Shortlister] = {}
        everything = np.arange(len(gallery))
        self._rows = everything if own_rows is None else np.setdiff1d(everything, own_rows)
        self._queries = queries
        self._dim = dim
        self._k = k
        self._batch = batch
        self._timer = timer
        self._facts = IndexFacts(FunnelSchedule((dim,), (), k), metric)
        self._prefixes_by_dim: dict[int, Vectors] = {}
        self.refused: ValueError | None = None  # why FAISS could not make the last first stage
        self.says = says
        says(f"exact neighbours of {len(queries)} queries at dim {dim}")
        truth = self._rows[self._exact(self._held_prefixes(dim), k)]
        self._measure = measure or recall_against(truth)
        self.exact_quality, self.exact_error = self._mean_and_error(truth)
        if measure is None:
            self.exact_error = 0.0  # its recall is 1 by definition, not an estimate

    @property
    def num_rows(self) -> int:
        """Number of gallery rows that are searched."""
        return len(self._rows)

    @property
    def projection(self) -> Projection:
        """What projected first stages look at."""
        if self._projection is None:
            self.says("principal components of the gallery")
            step = max(1, self.num_rows // _PCA_ROWS)
            rows = self._gallery[self._rows[::step][:_PCA_ROWS]]
            components = principal_directions(rows[:, : self._dim])
            self._projection = Projection(components, (self._dim,))
        return self._projection

    def shortest_shortlist(
        self, dim: int, target: float, projection: Projection | None = None
    ) -> int | None:
        """Return the shortest shortlist of exact prefixes that reaches the target; None: none.

        Args:
            dim: Dim of the prefixes.
            target: The least quality less 1.64 standard errors.
            projection: What the prefixes are of; None: the embeddings as they are.
        """
        if dim == self._dim:
            return self._k
        self.says(f"what prefixes of dim {dim} can reach{', projected' if projection else ''}")
        sizes = sorted({min(round(self._k * growth), self.num_rows) for growth in _GROWTH})
        if projection is None:
            nearest = self._exact(self._prefixes(dim), sizes[-1])
        else:
            rows, queries = (
                self._facts.prefix(projection.transform(vectors, dim), dim)
                for vectors in (self._held_prefixes(self._dim), self._queries[:, : self._dim])
            )
            nearest = closest(queries, rows, None, sizes[-1], self._facts.metric)[0]
        for size in sizes:
            best, _ = closest(
                self._facts.prefix(self._queries, self._dim),
                self._held_prefixes(self._dim),
                np.ascontiguousarray(nearest[:, :size]),
                self._k,
                self._facts.metric,
            )
            quality, error = self._mean_and_error(self._rows[best])
            if sure(quality, error) >= target:
                self.says(f"  {quality:.4f} with a shortlist of {size}")
                return size
        self.says(f"  no more than {quality:.4f}, with a shortlist of {size}")
        return None

    def first(self, dim: int, spec: FirstStage) -> Shortlister | None:
        """Build a first stage; None if FAISS cannot make it of this gallery (see `refused`)."""
        if (dim, spec.factory) in self._firsts:
            return self._firsts[dim, spec.factory]
        self.says(f"building {spec.factory} over dim {dim}")
        try:
            prefixes = self._held_prefixes(dim) if dim == self._dim else self._prefixes(dim)
            first = Shortlister.build(prefixes, spec, self._facts.metric, lambda _done, _rows: None)
        except ValueError as error:
            self.says(str(error))
            self.refused = error
            return None
        self._firsts[dim, spec.factory] = first
        return first

    def keep(self, choices: Iterable[Choice]) -> None:
        """Let go of all first stages but those of these funnels."""
        kept = {(choice.schedule.dims[0], choice.first_stage.factory) for choice in choices}
        self._firsts = {key: first for key, first in self._firsts.items() if key in kept}

    def timed_again(self, choices: Sequence[Choice]) -> list[Choice]:
        """Return funnels whose first stages are kept, with the median time of interleaved laps."""
        firsts = [
            self._firsts.get((choice.schedule.dims[0], choice.first_stage.factory))
            for choice in choices
        ]
        seconds: list[list[float]] = [[] for _ in choices]
        for _ in range(_LAPS):
            for choice, first, laps in zip(choices, firsts, seconds, strict=True):
                if first is not None:
                    index = self._index(first, choice.first_stage, choice.schedule)
                    laps.append(self._timer(index, self._queries, self._batch))
        return [
            replace(choice, seconds=float(np.median(laps))) if laps else choice
            for choice, laps in zip(choices, seconds, strict=True)
        ]

    def measured(self, first: Shortlister, spec: FirstStage, schedule: FunnelSchedule) -> Choice:
        """Set a first stage, search by a schedule, and return how good and how fast it is."""
        index = self._index(first, spec, schedule)
        quality, error = self._mean_and_error(np.asarray(index.search(self._queries).ids, np.int64))
        if schedule.dims == (self._dim,) and spec.factory == _FLAT:
            error = self.exact_error
        seconds = self._timer(index, self._queries, self._batch)
        choice = Choice(spec, schedule, quality, error, seconds)
        self.says(choice.line())
        return choice

    def _index(self, first: Shortlister, spec: FirstStage, schedule: FunnelSchedule) -> FaissIndex:
        first.set(spec.settings)
        facts = IndexFacts(schedule, self._facts.metric)
        stages = {dim: self._held_prefixes(dim) for dim in wider_dims(schedule)}
        return FaissIndex(facts, self._rows, first, stages)

    def funnel(self, dim: int, shortlist: int) -> FunnelSchedule:
        """Return the funnel from a dim to the last one; from the last to itself, if it is longer.

        Args:
            dim: Dim of the first stage.
            shortlist: Its length; at the last dim `k` is the first stage alone.
        """
        if dim == self._dim and shortlist <= self._k:
            return FunnelSchedule((dim,), (), self._k)
        return FunnelSchedule((dim, self._dim), (shortlist,), self._k)

    def _mean_and_error(self, neighbors: Ids) -> tuple[float, float]:
        values = self._measure(neighbors)
        # No sample is certain: one neighbour more or less is the least error there is.
        least = 1 / values.size / self._k
        error = float(values.std(ddof=1) / np.sqrt(values.size))
        return float(values.mean()), max(error, least)

    def _exact(self, rows: Vectors, n: int) -> Ids:
        """Return which of these rows are nearest to each query, compared at the rows' dim."""
        queries = self._facts.prefix(self._queries, rows.shape[1])
        return closest(queries, rows, None, n, self._facts.metric)[0]

    def _held_prefixes(self, dim: int) -> Vectors:
        if dim not in self._prefixes_by_dim:
            self._prefixes_by_dim[dim] = self._prefixes(dim)
        return self._prefixes_by_dim[dim]

    def _prefixes(self, dim: int) -> Vectors:
        prefixes = np.empty((self.num_rows, dim), np.float32)
        for start in range(0, self.num_rows, _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            rows = check_embeddings(self._gallery[self._rows[part]], "gallery", self._dim)
            prefixes[part] = self._facts.prefix(rows, dim)
        return prefixes
