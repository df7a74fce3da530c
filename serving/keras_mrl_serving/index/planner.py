"""Chooses a funnel by building and timing those there are, on the machine that will search."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..contract import as_int, check_dims
from ..errors import TargetNotReachedError
from ..funnel import FunnelSchedule
from .base import Ids, IndexFacts, Vectors, as_gallery, check_embeddings
from .faiss import FaissIndex, closest
from .first_stage import FirstStage, Shortlister, check_first_stage, lists_for
from .plan import Choice, Measure, Plan, cheapest, front, recall_against

# Funnels built and measured on a sample of queries: the planner's laboratory.

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


_SLACK = (1, 2, 4, 8, 16)  # shortlists of an approximate first stage, times what an exact needs
_ENOUGH_SLACK = 4  # beyond which a longer one is for those that reach the target with no shorter
_DOUBLINGS = 10  # of a setting
_PARTS = (5 / 8, 6 / 8, 7 / 8)  # of a setting or a shortlist that is enough, and may be more
_GAIN = 0.001  # of quality that a doubled setting must bring, to be doubled again
_TOO_MUCH = 8  # times the least that any dim's shortlists make a search read
_FLAT = "Flat"
_ALONE = "HNSW32"  # at the last dim, where nothing mends what int8 loses
LEAST_SAMPLE = 30  # queries, below which a standard error says little
_TOO_SLOW = 1.5  # wider dims are left alone once one is this many times slower than the best
_PER_CENTROID = 39  # rows FAISS wants to learn one from


def plan_funnel(
    embeddings: npt.NDArray[np.generic],
    queries: npt.ArrayLike,
    target: float,
    *,
    k: int = 10,
    dims: Sequence[int] | None = None,
    metric: str = "cosine",
    measure: Measure | None = None,
    own_rows: npt.ArrayLike | None = None,
    first_stages: Sequence[FirstStage] | None = None,
    batch: int = 1,
    says: Says | None = None,
) -> Plan:
    """Return the cheapest funnel that reaches a target, by measurement.

    Dims are ruled out whose exact prefixes do not reach it with a shortlist of 64 times `k`, or
    only with one that makes a search read 8 times what another dim does. For the others, narrow
    ones first, every kind of first stage is built and set ever harder until it reaches the
    target, with a shortlist as short as may be; dims wider than one that was 1.5 times slower
    than the best are left alone. Near the best, what lies between the settings and shortlists
    that were doubled is tried, and a stage in between. Cost is the median time per query, of rows
    in memory. A funnel reaches the target if its quality less one standard error does; fresh
    queries may still find a little less.

    Args:
        embeddings: The gallery `(rows, width)`, raw or scaled; two to three copies of its size are
            held in memory.
        queries: A sample of what will be asked `(queries, width)`; 30 at least, better hundreds.
        target: What the mean of the measure is to reach, 0..1.
        k: Neighbours wanted.
        dims: Dims a stage may have, such as those the model was trained at; an answer at the
            last counts as exact. None: powers of two from 8, and the width.
        metric: How embeddings are compared: "cosine", "dot" or "l2".
        measure: From rows found `(queries, k)` to a quality per query; None is the share of the
            exact neighbours at the last dim that are found.
        own_rows: Which gallery row each query is, where the sample is of the gallery itself: these
            rows are left out of the gallery while it plans. None: queries are no rows.
        first_stages: Kinds to try; their first setting is doubled until it is enough. None tries
            flat search, a graph of int8 and inverted lists, and a graph of float32 at the last.
        batch: How many queries come at once.
        says: Told what is tried.

    Raises:
        TargetNotReachedError: If no funnel reaches it; it holds the front of those tried.
        ValueError: If the arguments do not fit one another.
        ImportError: If FAISS is not installed.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> gallery = rng.normal(size=(500, 16)) * 0.7 ** np.arange(16)
        >>> found = plan_funnel(gallery, gallery[:50], 0.8, k=5, own_rows=np.arange(50))
        >>> found.choice.quality >= 0.8
        True
    """
    gallery = as_gallery(embeddings, 1)
    widths = check_dims(tuple(dims) if dims is not None else _powers(gallery))
    gallery = as_gallery(gallery, widths[-1])
    sample = check_embeddings(queries, "queries", widths[-1])
    own = None if own_rows is None else _checked_rows(own_rows, len(gallery), len(sample))
    rows = len(gallery) - (0 if own is None else len(np.unique(own)))
    k, batch = _checked_numbers(target, batch, k, rows, len(sample))
    trials = Trials(
        gallery, sample, widths[-1], k, metric, measure, own, batch, says or (lambda _: None)
    )
    if trials.exact_quality - trials.exact_error < target:
        raise _beyond_exact(target, trials.exact_quality, widths[-1])
    specs = first_stages if first_stages is not None else _usual(rows)
    for spec in specs:
        check_first_stage(spec)
    enough = {dim: trials.shortest_shortlist(dim, target) for dim in widths}
    choices: list[Choice] = []
    for dim in widths:
        best = cheapest(choices, target)
        worth = [spec for spec in specs if _is_worth(dim, spec, enough, rows)]
        if first_stages is None and dim == widths[-1]:
            worth.append(FirstStage.least(_ALONE))
        here = list(_at(trials, dim, target, enough[dim] or 0, worth))
        choices += here
        reached = cheapest(here, target)
        if best is not None and reached is not None and reached.seconds > _TOO_SLOW * best.seconds:
            break
    if not choices and trials.refused is not None:
        raise trials.refused
    best = cheapest(choices, target)
    if best is not None:
        choices += _finer(trials, best, widths, target)
        best = cheapest(choices, target)
    if best is None:
        raise _not_reached(target, front(choices))
    return Plan(best, target, front(choices))


def _is_worth(dim: int, spec: FirstStage, enough: Mapping[int, int | None], rows: int) -> bool:
    """Return whether a first stage at a dim reads so little that it may be the cheapest."""
    width = max(enough)
    reads = {
        d: shortlist * width + (rows * d if spec.factory == _FLAT else 0)
        for d, shortlist in enough.items()
        if shortlist is not None
    }
    return dim in reads and reads[dim] <= _TOO_MUCH * min(reads.values())


def _at(
    trials: Trials, dim: int, target: float, enough: int, specs: Sequence[FirstStage]
) -> Iterator[Choice]:
    """Measure funnels whose first stage looks at one dim, with shortlists that are long enough."""
    for spec in specs:
        first = trials.first(dim, spec)
        if first is None:
            continue
        is_alone = spec.factory == _FLAT or not trials.funnel(dim, enough).shortlists
        reached = False
        for slack in (1,) if is_alone else _SLACK:
            if reached and slack > _ENOUGH_SLACK:
                break
            last = -1.0
            for harder in _doubled(spec):
                choice = trials.measured(first, harder, trials.funnel(dim, enough * slack))
                yield choice
                reached = reached or choice.quality_less_error >= target
                if choice.quality_less_error >= target or choice.quality < last + _GAIN:
                    break
                last = choice.quality


def _finer(trials: Trials, coarse: Choice, dims: Sequence[int], target: float) -> Iterator[Choice]:
    """Measure what lies between the settings and shortlists that were doubled; then a stage."""
    dim, best = coarse.schedule.dims[0], coarse
    efforts = list(_between(coarse.first_stage))
    sizes = [round(part * size) for size in coarse.schedule.shortlists[:1] for part in _PARTS]
    first = trials.first(dim, coarse.first_stage) if efforts or sizes else None
    if first is None:
        return
    for effort in efforts:
        choice = trials.measured(first, effort, best.schedule)
        yield choice
        if choice.quality_less_error >= target:
            best = choice
            break
    for size in sizes:
        if size >= best.schedule.k:
            choice = trials.measured(first, best.first_stage, trials.funnel(dim, size))
            yield choice
            if choice.quality_less_error >= target:
                best = choice
                break
    for schedule in trials.with_middle(best.schedule, dims):
        yield trials.measured(first, best.first_stage, schedule)


def _between(spec: FirstStage) -> Iterator[FirstStage]:
    """Return a first stage at settings that lie between half of its own and its own."""
    name, value, rest = _effort(spec)
    for effort in sorted({round(part * value) for part in _PARTS} - {value}):
        if effort > value / 2:
            yield replace(spec, settings=",".join((f"{name}={effort}", *rest)))


def _doubled(spec: FirstStage) -> Iterator[FirstStage]:
    """Return a first stage at ever harder settings."""
    name, value, rest = _effort(spec)
    if not name:
        yield spec
        return
    for doubling in range(_DOUBLINGS):
        harder = f"{name}={round(value * 2**doubling)}"
        yield replace(spec, settings=",".join((harder, *rest)))


def _effort(spec: FirstStage) -> tuple[str, float, list[str]]:
    """Return the setting that is made harder, its value, and the other settings."""
    head, *rest = spec.settings.split(",")
    name, _, value = head.partition("=")
    return name, float(value or 0), rest


def _usual(rows: int) -> list[FirstStage]:
    kinds = [_FLAT, "HNSW32_SQ8"]
    lists = lists_for(rows)
    if rows >= 1.1 * _PER_CENTROID * lists:  # some may be left out as the sample
        kinds.append(f"IVF{lists},Flat")
    return [FirstStage.least(kind) for kind in kinds]


def _powers(gallery: npt.NDArray[np.generic]) -> tuple[int, ...]:
    width = gallery.shape[-1]
    return (*(2**power for power in range(3, 31) if 2**power < width), width)


def _checked_numbers(target: float, batch: int, k: int, rows: int, queries: int) -> tuple[int, int]:
    try:
        size, wanted = as_int(batch), as_int(k)
        fits = 0 < target <= 1 and 1 <= size <= queries and 1 <= wanted < rows
    except TypeError:
        fits = False
    if not fits or queries < LEAST_SAMPLE:
        raise ValueError(
            "A plan needs a target in (0, 1], a k below the gallery's rows, and a sample of at "
            f"least {LEAST_SAMPLE} queries and one batch. Received: target={target!r}, k={k!r}, "
            f"{rows} rows, batch={batch!r}, {queries} queries. Give for example target=0.95."
        )
    return wanted, size


def _checked_rows(own_rows: npt.ArrayLike, rows: int, queries: int) -> Ids:
    try:
        checked = np.asarray(own_rows)
    except ValueError:  # ragged
        checked = np.empty(0)
    is_right = checked.shape == (queries,) and checked.dtype.kind in "iu"
    if not is_right or (checked < 0).any() or (checked >= rows).any():
        raise ValueError(
            "own_rows must name the gallery row of every query. "
            f"Received: {checked.dtype} of shape {checked.shape} for {queries} queries and {rows} "
            "rows. Leave it out if the queries are no rows."
        )
    return checked.astype(np.int64)


def _beyond_exact(target: float, quality: float, dim: int) -> TargetNotReachedError:
    return TargetNotReachedError(
        "A target must be one that exact search reaches, by more than a standard error. "
        f"Received: target={target}; exact search at dim {dim} reaches {quality:.4f}. "
        "Lower the target."
    )


def _not_reached(target: float, tried: tuple[Choice, ...]) -> TargetNotReachedError:
    could = tried[-1].line().strip() if tried else "nothing at these dims"
    error = TargetNotReachedError(
        "A target must be one that some funnel reaches, by more than a standard error. "
        f"Received: target={target}; the best that was found: {could}. "
        "Lower the target, allow wider dims, or give more queries to be surer by."
    )
    error.front = tried
    return error
