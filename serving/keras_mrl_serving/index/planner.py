"""Chooses a funnel by building and timing funnels on the machine that will search.

Multiply-adds say nothing of graphs, caches and Python. So the planner builds, searches and times:
`Trials` is its laboratory, `choose_funnel` decides what to try next. A target counts as reached
only if the mean quality less 1.64 standard errors reaches it, so that the mean of all queries does
with 95%: a plan is the best of many funnels, and the best of many is lucky.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..errors import TargetNotReachedError
from ..funnel import FunnelSchedule
from ..integers import as_int, check_dims
from ..projection import Projection
from .base import Ids, as_gallery, check_embeddings
from .first_stage import FirstStage, check_first_stage, lists_for
from .plan import Choice, Measure, Plan, cheapest, front, sure, time_per_query
from .projected import PROJECTED
from .trials import Says, Timer
from .trials import Trials as Trials

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
    projection: Projection | None = None,
    seconds: float | None = None,
) -> Plan:
    """Return the cheapest funnel that reaches a target, by measurement.

    A first stage may look at prefixes, and the shortlist is then compared at the last dim; or, in
    codes of 4 bits, int8, bfloat16 or signs, at the last dim itself, or at its projection. Dims are
    ruled out whose exact prefixes do not reach it with a shortlist of 64 times `k`, or
    only with one that makes a search read 24 times what another dim does. For the others, narrow
    ones first, every kind of first stage is built and set ever harder until it reaches the
    target or takes twice as long as the best, with a shortlist as short as may be; once a dim is
    1.5 times slower than the best, wider dims are not tried but the last. Then come other codes and
    projections, wider ones while each is faster than the one before; and for the fastest first
    stages settings and shortlists between the doubled ones, and a stage in between. Cost is the
    median time per query, of rows in memory: for single queries the processor time of their thread.
    The fastest are timed once more, in laps one after the other. A funnel reaches the target if its
    quality less 1.64 standard errors does, which is 95% sure; fresh queries may still find a little
    less.

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
            flat search, graphs of int8, bfloat16 and float32, codes of 4 bits with and without
            inverted lists, signs, and graphs and lists over projections.
        batch: How many queries come at once.
        says: Called with a line about each thing that is tried.
        timer: Returns the cost of an index, from the index, the sample and `batch`; for example
            another quantile than the median.
        projection: What projected first stages look at, such as one that was learnt; the shortlist
            is compared by the embeddings as they are. None: principal components of the gallery.
        seconds: After so many, as soon as a funnel reaches the target, no other first stage is
            begun, and the best so far is the plan. None: all are tried.

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
    began_s = time.monotonic()
    gallery = as_gallery(embeddings, 1)
    widths = check_dims(tuple(dims) if dims is not None else _powers_of_two(gallery.shape[-1]))
    gallery = as_gallery(gallery, widths[-1])
    sample = check_embeddings(queries, "queries", widths[-1])
    own = None if own_rows is None else _checked_rows(own_rows, len(gallery), len(sample))
    num_rows = len(gallery) - (0 if own is None else len(np.unique(own)))
    k, batch = _checked_numbers(target, batch, k, num_rows, len(sample))
    say = says or (lambda _: None)
    trials = Trials(
        gallery, sample, widths[-1], k, metric, measure, own, batch, say, timer, projection
    )
    return choose_funnel(
        trials,
        target,
        widths,
        first_stages,
        lambda: seconds is not None and time.monotonic() - began_s >= seconds,
    )


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


_SLACK = (1, 2, 4, 8, 16)  # shortlists of an approximate first stage, times what an exact needs
_ENOUGH_SLACK = 4  # longer ones are tried only where none of these reached the target
_DOUBLINGS = 10  # of a setting
_PARTS = (5 / 8, 6 / 8, 7 / 8)  # of a setting or a shortlist that was doubled: less may be enough
_GAIN = 0.001  # of quality that a doubled setting must bring, to be doubled again
_MIDDLES = (2, 4, 8)  # shortlists of a stage in between, times k
_TOO_MUCH = 24  # times the least that any dim's shortlists make a search read
_FLAT = "Flat"
_TOO_SLOW = 1.5  # times the best: dims wider than one so slow are not tried
_TWICE = 2  # times the best: a first stage so slow is set no harder
_TIMED_AGAIN = 4  # of the fastest funnels, and of the fastest first stages those that are kept
_ROWS_PER_CENTROID = 39  # that FAISS wants at least


def choose_funnel(
    trials: Trials,
    target: float,
    dims: Sequence[int],
    first_stages: Sequence[FirstStage] | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> Plan:
    """Return the cheapest funnel that reaches a target: decide what to try, and try it.

    Args:
        trials: Where funnels are measured.
        target: The least quality less 1.64 standard errors.
        dims: Dims a stage may have, ascending; the last is that of `trials`.
        first_stages: As in `plan_funnel`.
        is_over: Whether to begin no other first stage, once a funnel reaches the target.

    Raises:
        TargetNotReachedError: If no funnel reaches it; it holds the front of those tried.
        ValueError: If FAISS can make none of the first stages.

    Examples:
        >>> rows = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
        >>> trials = Trials(rows, rows, 8, 5, "l2", None, None, 1, lambda line: None)
        >>> choose_funnel(trials, 1.0, (8,), [FirstStage("Flat")]).schedule.dims
        (8,)
    """
    if sure(trials.exact_quality, trials.exact_error) < target:
        raise TargetNotReachedError(
            "A target must be one that exact search reaches, by more than 1.64 standard errors. "
            f"Received: target={target}; exact search at dim {dims[-1]} reaches "
            f"{trials.exact_quality:.4f}. Lower the target."
        )
    for spec in first_stages or ():
        check_first_stage(spec)
    shortlists = {dim: trials.shortest_shortlist(dim, target) for dim in dims}
    choices: list[Choice] = []
    is_too_slow = False

    def is_enough(*more: Choice) -> bool:
        return is_over() and cheapest([*choices, *more], target) is not None

    for dim in dims:
        if is_too_slow and (first_stages is not None or dim != dims[-1]):
            continue
        best = cheapest(choices, target)
        specs = _usual(dim, dims[-1], trials.num_rows) if first_stages is None else first_stages
        worth = [spec for spec in specs if _is_worth(dim, spec, shortlists, trials.num_rows)]
        at_dim: list[Choice] = []
        for spec in worth:
            if is_enough(*at_dim):
                break
            so_far = [*choices, *at_dim]
            at_dim += _coarse_choices(trials, dim, target, shortlists[dim] or 0, spec, so_far)
            trials.keep(_fastest_of_each([*choices, *at_dim], target))
        choices += at_dim
        best_at_dim = cheapest(at_dim, target)
        if best and best_at_dim and best_at_dim.seconds > _TOO_SLOW * best.seconds:
            is_too_slow = True
    if not choices and trials.refused is not None:
        raise trials.refused
    best = cheapest(choices, target)
    if best is not None and first_stages is None and not is_over():
        choices += _other_codes(trials, _fastest_of_each(choices, target))
        choices += _projected_choices(trials, choices, dims, target)
    if is_enough():
        trials.says("no more is tried: the time is over")
    for coarse in () if is_enough() else _fastest_of_each(choices, target):
        choices += _fine_choices(trials, coarse, dims, target)
    if best is not None:
        fastest = _fastest(choices, target)
        trials.keep(fastest)
        again = {
            id(old): new for old, new in zip(fastest, trials.timed_again(fastest), strict=True)
        }
        choices = [again.get(id(choice), choice) for choice in choices]
        best = cheapest([*again.values()], target)
    if best is None:
        raise _not_reached(target, front(choices))
    # What was timed once may look faster than the best of those timed in laps: that is noise.
    beside = (c for c in choices if c.seconds > best.seconds or c.sure_quality < target)
    return Plan(best, target, front((best, *beside)))


def _fastest(choices: Sequence[Choice], target: float) -> list[Choice]:
    """Return the fastest few that reach the target, the fastest first."""
    reaching = [choice for choice in choices if choice.sure_quality >= target]
    return sorted(reaching, key=lambda choice: choice.seconds)[:_TIMED_AGAIN]


def _fastest_of_each(choices: Sequence[Choice], target: float) -> list[Choice]:
    """Return the fastest funnel of each first stage that may win, the fastest first.

    Settings were doubled: what is 1.5 times slower than the best may be faster between two of them.
    """
    best = cheapest(choices, target)
    if best is None:
        return []
    reaching = [choice for choice in choices if choice.sure_quality >= target]
    by_first: dict[tuple[int, str], Choice] = {}
    for choice in sorted(reaching, key=lambda choice: choice.seconds):
        if choice.seconds <= _TOO_SLOW * best.seconds:
            key = (choice.schedule.dims[0], choice.first_stage.factory)
            by_first.setdefault(key, choice)
    return list(by_first.values())[:_TIMED_AGAIN]


def _usual(dim: int, last_dim: int, num_rows: int) -> list[FirstStage]:
    """Return the kinds that are tried at a dim where none are given."""
    factories = [_FLAT, "HNSW32_SQ8"]
    if dim % 2 == 0:
        factories += [f"PQ{dim // 2}x4fs", *_lists(f"PQ{dim // 2}x4fs", num_rows)]
    else:
        factories += _lists("Flat", num_rows)
    if dim == last_dim:
        factories += ["HNSW32"] + (["BFlat"] if dim % 8 == 0 else [])
    return [FirstStage.least(factory) for factory in factories]


def _lists(codes: str, num_rows: int) -> list[str]:
    """Return inverted lists of such codes, if the gallery is large enough to learn them from."""
    lists = lists_for(num_rows)
    # A tenth to spare: the sample's own rows may be left out.
    return [f"IVF{lists},{codes}"] if num_rows >= 1.1 * _ROWS_PER_CENTROID * lists else []


def _other_codes(trials: Trials, fastest: Sequence[Choice]) -> Iterator[Choice]:
    """Measure the fastest graph of int8 with its rows in bfloat16."""
    graphs = [choice for choice in fastest if choice.first_stage.factory == "HNSW32_SQ8"]
    if not graphs:
        return
    best = graphs[0]
    dim, sizes = best.schedule.dims[0], best.schedule.shortlists
    spec = replace(best.first_stage, factory="HNSW32_SQbf16")
    first = trials.first(dim, spec)
    if first is not None:
        for settings in (*_between(spec), spec):
            yield trials.measured(first, settings, trials.funnel(dim, sizes[0] if sizes else 0))


def _projected_choices(
    trials: Trials, choices: Sequence[Choice], dims: Sequence[int], target: float
) -> Iterator[Choice]:
    """Measure funnels whose first stage looks at a projection, from the narrowest that may do.

    Wider ones are tried while each is faster than the one before it.
    """
    best = cheapest(choices, target)
    if best is None or len(dims) < 2:
        return
    last, fastest = dims[-1], math.inf
    for dim in dims[:-1]:
        if dim > len(trials.projection.components):
            break
        shortlist = trials.shortest_shortlist(dim, target, trials.projection)
        if shortlist is None or shortlist > _TOO_MUCH * best.schedule.k:
            continue
        codes = f"PQ{dim // 2}x4fs"
        coded = [codes, *_lists(codes, trials.num_rows)] if dim % 2 == 0 else []
        kinds = [f"{PROJECTED}{dim},{kind}" for kind in ("HNSW32_SQbf16", *coded)]
        measured: list[Choice] = []
        while kinds:
            spec = replace(FirstStage.least(kinds.pop(0)), projection=trials.projection)
            so_far = [*choices, *measured]
            measured += _coarse_choices(trials, last, target, shortlist, spec, so_far)
            trials.keep(_fastest_of_each([*choices, *measured], target))
            if not kinds and coded:  # OPQ learns long: for the codes that were faster
                found = [c for c in measured if c.first_stage.factory.endswith("x4fs")]
                faster = cheapest(found, target)
                if faster is not None:
                    kinds = [faster.first_stage.factory.replace(PROJECTED, f"OPQ{dim // 2}_")]
                coded = []
        yield from measured
        choices = [*choices, *measured]
        best_here = cheapest(measured, target)
        if best_here is not None and best_here.seconds > fastest:
            break
        fastest = math.inf if best_here is None else best_here.seconds


def _is_worth(
    dim: int, spec: FirstStage, shortlists: Mapping[int, int | None], num_rows: int
) -> bool:
    """Return whether a first stage at a dim reads so little that it may be the cheapest."""
    last_dim = max(shortlists)
    numbers_read = {
        d: shortlist * last_dim + num_rows * d * _share_read(spec.factory)
        for d, shortlist in shortlists.items()
        if shortlist is not None
    }
    return dim in numbers_read and numbers_read[dim] <= _TOO_MUCH * min(numbers_read.values())


def _share_read(factory: str) -> float:
    """Return the share of a float32 row that a search reads of every row of the gallery."""
    if factory == _FLAT:
        return 1
    if re.fullmatch(r"PQ[0-9]+x4fs", factory):
        return 1 / 16  # half a byte for two coordinates
    return 1 / 32 if factory == "BFlat" else 0


_EXACT = re.compile(r"(IVF[0-9]+(_HNSW[0-9]+)?,)?Flat|HNSW[0-9]*(,Flat)?")


def _coarse_choices(
    trials: Trials,
    dim: int,
    target: float,
    shortlist: int,
    spec: FirstStage,
    so_far: Sequence[Choice],
) -> Iterator[Choice]:
    """Measure funnels from one dim, doubling settings and shortlists until they are enough.

    Or until they take twice as long as the best so far. Lists are not tried at shortlists at which
    their codes without lists, which look at every row, found too little.
    """
    first = trials.first(dim, spec)
    if first is None:
        return
    # A longer shortlist changes nothing for an exact first stage, nor for rows as they are.
    is_alone = not trials.funnel(dim, shortlist).shortlists
    is_exact = spec.factory == _FLAT or (is_alone and _EXACT.fullmatch(spec.factory) is not None)
    best, is_enough = cheapest(so_far, target), False
    unlisted = re.sub("IVF[0-9]+,", "", spec.factory)
    others = [choice for choice in so_far if choice.first_stage.factory == unlisted]
    lacking = {choice.schedule for choice in others if choice.quality < target}
    for slack in (1,) if is_exact else _SLACK:
        if is_enough and slack > _ENOUGH_SLACK:
            break
        schedule = trials.funnel(dim, shortlist * slack)
        if schedule in lacking:
            continue
        last_quality = -1.0
        for harder in _doubled(spec):
            choice = trials.measured(first, harder, schedule)
            yield choice
            reaches = choice.sure_quality >= target
            is_slow = best is not None and choice.seconds > _TWICE * best.seconds
            is_enough = is_enough or reaches or is_slow
            if reaches or is_slow or choice.quality < last_quality + _GAIN:
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
        if choice.sure_quality >= target:
            best = choice
            break
    for size in sizes:
        if size >= best.schedule.k:
            choice = trials.measured(first, best.first_stage, trials.funnel(dim, size))
            yield choice
            if choice.sure_quality >= target:
                best = choice
                break
    for schedule in _with_middle_stage(best.schedule, dims):
        yield trials.measured(first, best.first_stage, schedule)


def _with_middle_stage(schedule: FunnelSchedule, dims: Sequence[int]) -> list[FunnelSchedule]:
    """Return funnels of two stages with a third between them."""
    if len(schedule.dims) != 2 or schedule.rescores:
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
        "A target must be one that some funnel reaches, by more than 1.64 standard errors. "
        f"Received: target={target}; the best that was found: {best}. "
        "Lower the target, allow wider dims, or give more queries to be surer by."
    )
    error.front = choices
    return error
