"""Chooses a funnel by building and timing funnels on the machine that will search.

Multiply-adds say nothing of graphs, caches and Python. So the planner builds, searches and times:
`Trials` is its laboratory, `choose_funnel` decides what to try next. A target counts as reached
only if the mean quality less one standard error reaches it: a plan is the best of many funnels, and
the best of many is lucky.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..errors import TargetNotReachedError
from ..funnel import FunnelSchedule
from ..integers import as_int, check_dims
from .base import Ids, Index, IndexFacts, Vectors, as_gallery, check_embeddings
from .faiss import FaissIndex, closest, wider_dims
from .first_stage import FirstStage, Shortlister, check_first_stage, lists_for
from .plan import Choice, Measure, Plan, cheapest, front, recall_against, time_per_query

Says = Callable[[str], object]  # called with a line about what is tried
Timer = Callable[[Index, Vectors, int], float]  # (index, queries, batch) -> seconds per query

LEAST_SAMPLE = 30  # queries, below which a standard error says little


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
    timer: Timer = time_per_query,
) -> Plan:
    """Return the cheapest funnel that reaches a target, by measurement.

    Dims are ruled out whose exact prefixes do not reach it with a shortlist of 64 times `k`, or
    only with one that makes a search read 8 times what another dim does. For the others, narrow
    ones first, every kind of first stage is built and set ever harder until it reaches the
    target, with a shortlist as short as may be; once a dim is 1.5 times slower than the best,
    wider dims are not tried. Near the best, settings and shortlists between the doubled ones are
    tried, and a stage in between. Cost is the median time per query, of rows in memory. A funnel
    reaches the target if its quality less one standard error does; fresh queries may still find a
    little less.

    Args:
        embeddings: The gallery `(rows, width)`, raw or scaled; two to three copies of its size are
            held in memory.
        queries: A sample of the queries to come `(queries, width)`; 30 at least, better hundreds.
        target: The least mean of the measure, 0..1.
        k: Number of neighbours.
        dims: Dims a stage may have, such as those the model was trained at; an answer at the
            last counts as exact. None: powers of two from 8, and the width.
        metric: How embeddings are compared: "cosine", "dot" or "l2".
        measure: From neighbours `(queries, k)` to a quality per query; None is the share of the
            exact neighbours at the last dim among them.
        own_rows: Which gallery row each query is, where the sample is of the gallery itself: these
            rows are left out of the gallery while it plans. None: queries are no rows.
        first_stages: Kinds to try; their first setting is doubled until it is enough. None tries
            flat search, a graph of int8 and inverted lists, and a graph of float32 at the last.
        batch: How many queries come at once.
        says: Called with a line about each thing that is tried.
        timer: Returns the cost of an index, from the index, the sample and `batch`; for example
            another quantile than the median.

    Raises:
        TargetNotReachedError: If no funnel reaches it; it holds the front of those tried.
        ValueError: If the arguments do not fit one another.
        ImportError: If FAISS is not installed.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> gallery = rng.normal(size=(500, 16)) * 0.7 ** np.arange(16)
        >>> plan = plan_funnel(gallery, gallery[:50], 0.8, k=5, own_rows=np.arange(50))
        >>> plan.choice.quality >= 0.8
        True
    """
    gallery = as_gallery(embeddings, 1)
    widths = check_dims(tuple(dims) if dims is not None else _powers_of_two(gallery.shape[-1]))
    gallery = as_gallery(gallery, widths[-1])
    sample = check_embeddings(queries, "queries", widths[-1])
    own = None if own_rows is None else _checked_rows(own_rows, len(gallery), len(sample))
    num_rows = len(gallery) - (0 if own is None else len(np.unique(own)))
    k, batch = _checked_numbers(target, batch, k, num_rows, len(sample))
    say = says or (lambda _: None)
    trials = Trials(gallery, sample, widths[-1], k, metric, measure, own, batch, say, timer)
    return choose_funnel(trials, target, widths, first_stages)


def _powers_of_two(width: int) -> tuple[int, ...]:
    return (*(2**power for power in range(3, 31) if 2**power < width), width)


def _checked_rows(own_rows: npt.ArrayLike, num_rows: int, num_queries: int) -> Ids:
    try:
        rows = np.asarray(own_rows)
    except ValueError:  # ragged
        rows = np.empty(0)
    is_right = rows.shape == (num_queries,) and rows.dtype.kind in "iu"
    if not is_right or (rows < 0).any() or (rows >= num_rows).any():
        raise ValueError(
            "own_rows must name the gallery row of every query. "
            f"Received: {rows.dtype} of shape {rows.shape} for {num_queries} queries and "
            f"{num_rows} rows. Leave it out if the queries are no rows."
        )
    return rows.astype(np.int64)


def _checked_numbers(
    target: float, batch: int, k: int, num_rows: int, num_queries: int
) -> tuple[int, int]:
    """Return `k` and `batch` as integers."""
    try:
        checked_batch, checked_k = as_int(batch), as_int(k)
        fit = 0 < target <= 1 and 1 <= checked_batch <= num_queries and 1 <= checked_k < num_rows
    except TypeError:
        fit = False
    if not fit or num_queries < LEAST_SAMPLE:
        raise ValueError(
            "A plan needs a target in (0, 1], a k below the gallery's rows, and a sample of at "
            f"least {LEAST_SAMPLE} queries and one batch. Received: target={target!r}, k={k!r}, "
            f"{num_rows} rows, batch={batch!r}, {num_queries} queries. "
            "Give for example target=0.95."
        )
    return checked_k, checked_batch


_GROWTH = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # shortlists tried, times k
_MIDDLES = (2, 4, 8)  # shortlists of a stage in between, times k
_ROWS_AT_ONCE = 65_536


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
    ) -> None:
        self._gallery = gallery
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

    def shortest_shortlist(self, dim: int, target: float) -> int | None:
        """Return the shortest shortlist of exact prefixes that reaches the target; None: none.

        Args:
            dim: Dim of the prefixes.
            target: The least quality less its standard error.
        """
        if dim == self._dim:
            return self._k
        self.says(f"what prefixes of dim {dim} can reach")
        sizes = sorted({min(round(self._k * growth), self.num_rows) for growth in _GROWTH})
        nearest = self._exact(self._prefixes(dim), sizes[-1])
        for size in sizes:
            best, _ = closest(
                self._facts.prefix(self._queries, self._dim),
                self._held_prefixes(self._dim),
                np.ascontiguousarray(nearest[:, :size]),
                self._k,
                self._facts.metric,
            )
            quality, error = self._mean_and_error(self._rows[best])
            if quality - error >= target:
                self.says(f"  {quality:.4f} with a shortlist of {size}")
                return size
        self.says(f"  no more than {quality:.4f}, with a shortlist of {size}")
        return None

    def first(self, dim: int, spec: FirstStage) -> Shortlister | None:
        """Build a first stage; None if FAISS cannot make it of this gallery (see `refused`)."""
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
        stages = {dim: self._held_prefixes(dim) for dim in wider_dims(schedule)}
        index = FaissIndex(facts, self._rows, first, stages)
        quality, error = self._mean_and_error(index.search(self._queries).ids)
        if schedule.dims == (self._dim,) and spec.factory == _FLAT:
            error = self.exact_error
        seconds = self._timer(index, self._queries, self._batch)
        choice = Choice(spec, schedule, quality, error, seconds)
        self.says(choice.line())
        return choice

    def funnel(self, dim: int, shortlist: int) -> FunnelSchedule:
        """Return the funnel from a dim to the last one."""
        if dim == self._dim:
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


_SLACK = (1, 2, 4, 8, 16)  # shortlists of an approximate first stage, times what an exact needs
_ENOUGH_SLACK = 4  # longer ones are tried only where none of these reached the target
_DOUBLINGS = 10  # of a setting
_PARTS = (5 / 8, 6 / 8, 7 / 8)  # of a setting or a shortlist that was doubled: less may be enough
_GAIN = 0.001  # of quality that a doubled setting must bring, to be doubled again
_TOO_MUCH = 8  # times the least that any dim's shortlists make a search read
_FLAT = "Flat"
_AT_THE_LAST_DIM = "HNSW32"  # where no later stage corrects what int8 loses
_TOO_SLOW = 1.5  # times the best: dims wider than one so slow are not tried
_ROWS_PER_CENTROID = 39  # that FAISS wants at least


def choose_funnel(
    trials: Trials,
    target: float,
    dims: Sequence[int],
    first_stages: Sequence[FirstStage] | None = None,
) -> Plan:
    """Return the cheapest funnel that reaches a target: decide what to try, and try it.

    Args:
        trials: Where funnels are measured.
        target: The least quality less its standard error.
        dims: Dims a stage may have, ascending; the last is that of `trials`.
        first_stages: As in `plan_funnel`.

    Raises:
        TargetNotReachedError: If no funnel reaches it; it holds the front of those tried.
        ValueError: If FAISS can make none of the first stages.

    Examples:
        >>> rows = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
        >>> trials = Trials(rows, rows, 8, 5, "l2", None, None, 1, lambda line: None)
        >>> choose_funnel(trials, 1.0, (8,), [FirstStage("Flat")]).schedule.dims
        (8,)
    """
    if trials.exact_quality - trials.exact_error < target:
        raise TargetNotReachedError(
            "A target must be one that exact search reaches, by more than a standard error. "
            f"Received: target={target}; exact search at dim {dims[-1]} reaches "
            f"{trials.exact_quality:.4f}. Lower the target."
        )
    specs = first_stages if first_stages is not None else _usual_first_stages(trials.num_rows)
    for spec in specs:
        check_first_stage(spec)
    shortlists = {dim: trials.shortest_shortlist(dim, target) for dim in dims}
    choices: list[Choice] = []
    for dim in dims:
        best = cheapest(choices, target)
        worth = [spec for spec in specs if _is_worth(dim, spec, shortlists, trials.num_rows)]
        if first_stages is None and dim == dims[-1]:
            worth.append(FirstStage.least(_AT_THE_LAST_DIM))
        at_dim = list(_coarse_choices(trials, dim, target, shortlists[dim] or 0, worth))
        choices += at_dim
        best_at_dim = cheapest(at_dim, target)
        if best and best_at_dim and best_at_dim.seconds > _TOO_SLOW * best.seconds:
            break
    if not choices and trials.refused is not None:
        raise trials.refused
    best = cheapest(choices, target)
    if best is not None:
        choices += _fine_choices(trials, best, dims, target)
        best = cheapest(choices, target)
    if best is None:
        raise _not_reached(target, front(choices))
    return Plan(best, target, front(choices))


def _usual_first_stages(num_rows: int) -> list[FirstStage]:
    factories = [_FLAT, "HNSW32_SQ8"]
    lists = lists_for(num_rows)
    # A tenth to spare: the sample's own rows may be left out.
    if num_rows >= 1.1 * _ROWS_PER_CENTROID * lists:
        factories.append(f"IVF{lists},Flat")
    return [FirstStage.least(factory) for factory in factories]


def _is_worth(
    dim: int, spec: FirstStage, shortlists: Mapping[int, int | None], num_rows: int
) -> bool:
    """Return whether a first stage at a dim reads so little that it may be the cheapest."""
    last_dim = max(shortlists)
    numbers_read = {
        d: shortlist * last_dim + (num_rows * d if spec.factory == _FLAT else 0)
        for d, shortlist in shortlists.items()
        if shortlist is not None
    }
    return dim in numbers_read and numbers_read[dim] <= _TOO_MUCH * min(numbers_read.values())


def _coarse_choices(
    trials: Trials, dim: int, target: float, shortlist: int, specs: Sequence[FirstStage]
) -> Iterator[Choice]:
    """Measure funnels from one dim, doubling settings and shortlists until they are enough."""
    for spec in specs:
        first = trials.first(dim, spec)
        if first is None:
            continue
        # A longer shortlist changes nothing for an exact first stage, nor where there is none.
        is_exact_or_alone = spec.factory == _FLAT or not trials.funnel(dim, shortlist).shortlists
        is_reached = False
        for slack in (1,) if is_exact_or_alone else _SLACK:
            if is_reached and slack > _ENOUGH_SLACK:
                break
            last_quality = -1.0
            for harder in _doubled(spec):
                choice = trials.measured(first, harder, trials.funnel(dim, shortlist * slack))
                yield choice
                reaches = choice.quality_less_error >= target
                is_reached = is_reached or reaches
                if reaches or choice.quality < last_quality + _GAIN:
                    break
                last_quality = choice.quality


def _fine_choices(
    trials: Trials, coarse: Choice, dims: Sequence[int], target: float
) -> Iterator[Choice]:
    """Measure settings and shortlists between the doubled ones, then a stage in between."""
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
    for schedule in _with_middle_stage(best.schedule, dims):
        yield trials.measured(first, best.first_stage, schedule)


def _with_middle_stage(schedule: FunnelSchedule, dims: Sequence[int]) -> list[FunnelSchedule]:
    """Return funnels of two stages with a third between them."""
    if len(schedule.dims) != 2:
        return []
    (low, high), (size,), k = schedule.dims, schedule.shortlists, schedule.k
    return [
        FunnelSchedule((low, dim, high), (size, k * times), k)
        for dim in dims
        if low < dim < high
        for times in _MIDDLES
        if k * times < size
    ]


def _between(spec: FirstStage) -> Iterator[FirstStage]:
    """Return a first stage at settings that lie between half of its own and its own."""
    name, value, others = _effort(spec)
    for effort in sorted({round(part * value) for part in _PARTS} - {value}):
        if effort > value / 2:
            yield replace(spec, settings=",".join((f"{name}={effort}", *others)))


def _doubled(spec: FirstStage) -> Iterator[FirstStage]:
    """Return a first stage at ever harder settings."""
    name, value, others = _effort(spec)
    if not name:
        yield spec
        return
    for doubling in range(_DOUBLINGS):
        setting = f"{name}={round(value * 2**doubling)}"
        yield replace(spec, settings=",".join((setting, *others)))


def _effort(spec: FirstStage) -> tuple[str, float, list[str]]:
    """Return the setting that is made harder, its value, and the other settings."""
    setting, *others = spec.settings.split(",")
    name, _, value = setting.partition("=")
    return name, float(value or 0), others


def _not_reached(target: float, choices: tuple[Choice, ...]) -> TargetNotReachedError:
    best = choices[-1].line().strip() if choices else "nothing at these dims"
    error = TargetNotReachedError(
        "A target must be one that some funnel reaches, by more than a standard error. "
        f"Received: target={target}; the best that was found: {best}. "
        "Lower the target, allow wider dims, or give more queries to be surer by."
    )
    error.front = choices
    return error
