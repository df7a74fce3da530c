"""What `plan_funnel` promises of the funnel it chooses."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.errors import TargetNotReachedError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import FaissIndex, FirstStage, Plan, plan_funnel, planner
from keras_mrl_serving.index.first_stage import Shortlister, import_faiss
from keras_mrl_serving.index.plan import Choice, Measure, cheapest, front, precision_by_label
from tests.helpers.galleries import FLAT, METRICS, Array, Refuses, clusters, true_scores

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))

IVF = FirstStage("IVF8,Flat", "nprobe=1")
GALLERY, QUERIES = clusters(0, 400, 32, decay=0.9), clusters(1, 120, 32, decay=0.9)
K = 5

metrics = pytest.mark.parametrize("metric", METRICS)


def nearest(queries: Array, gallery: Array, metric: str) -> Array:
    return np.argsort(-true_scores(queries, gallery, queries.shape[1], metric), axis=1)


def recalls(found: Array, truth: Array) -> Array:
    return np.array([len(set(f) & set(t)) / len(t) for f, t in zip(found, truth, strict=True)])


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if SOAK:
        yield
        return
    monkeypatch.setattr(planner, "_TIMED", 10)  # searches that a choice is timed by
    faiss = import_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # more wait for one another, where other work has the cores
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """Every choice that is measured, its time as the work it is: the same on every machine."""
    seen: list[Choice] = []

    def seconds(_: planner.Trials, index: FaissIndex) -> float:
        schedule, first = index.schedule, index.first_stage
        looked_at = 4 * schedule.dims[0] * (400 if first == FLAT else 60)
        return 1e-9 * (looked_at + sum(map(int, np.multiply(schedule.shortlists, 32))))

    measure = planner.Trials.measured

    def remembered(self: planner.Trials, *args: Any) -> Choice:
        seen.append(measure(self, *args))
        return seen[-1]

    monkeypatch.setattr(planner.Trials, "_seconds", seconds)
    monkeypatch.setattr(planner.Trials, "measured", remembered)
    return seen


def plan(target: float = 0.9, **changed: Any) -> Plan:
    given: dict[str, Any] = {"k": K, "first_stages": [FLAT, IVF], **changed}
    gallery, queries = given.pop("gallery", GALLERY), given.pop("queries", QUERIES)
    return plan_funnel(gallery, queries, target, **given)


def built(found: Plan, metric: str = "cosine", k: int = K) -> FaissIndex:
    assert found.schedule.k == k
    return FaissIndex.build(
        GALLERY, found.schedule, None, metric, first_stage=found.first_stage, plan=found.to_json()
    )


def error_of(values: Array, k: int = K) -> float:
    return max(float(values.std(ddof=1) / np.sqrt(len(values))), 1 / (k * len(values)))


@metrics
@pytest.mark.parametrize("target", [0.5, 0.99, 1.0])
def test_the_index_that_is_planned_reaches_the_target_on_the_sample(
    target: float, metric: str
) -> None:
    found = plan(target, metric=metric)
    index = built(found, metric)
    reached = recalls(index.search(QUERIES).ids, nearest(QUERIES, GALLERY, metric)[:, :K])
    is_exact = found.schedule.dims == (32,) and found.first_stage == FLAT
    error = 0.0 if is_exact else error_of(reached)  # what is exact is not estimated
    assert is_exact or target < 1
    assert reached.mean() - error >= target
    np.testing.assert_allclose(found.choice.quality, reached.mean(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.choice.error, error, rtol=0, atol=1e-12)
    assert found.choice.quality_less_error == found.choice.quality - found.choice.error
    assert (found.target, index.plan) == (target, found.to_json())


@metrics
@pytest.mark.parametrize("target", [0.3, 0.97])
def test_the_choice_is_the_fastest_that_reaches_the_target(
    target: float, metric: str, measured: list[Choice]
) -> None:
    found = plan(target, metric=metric)
    reaching = [choice for choice in measured if choice.quality_less_error >= target]
    assert found.choice in reaching
    assert found.choice.seconds == min(choice.seconds for choice in reaching)
    assert found.choice in found.front
    assert (found.schedule, found.first_stage) == (found.choice.schedule, found.choice.first_stage)
    assert len(measured) > 3


def test_a_higher_target_costs_more(measured: list[Choice]) -> None:
    costs = [plan(target).choice.seconds for target in (0.3, 0.9, 1.0)]
    assert costs[0] < costs[1] < costs[2]
    assert measured


@metrics
def test_the_front_is_what_no_other_beats(metric: str, measured: list[Choice]) -> None:
    found = plan(0.9, metric=metric)
    qualities = [choice.quality_less_error for choice in found.front]
    times = [choice.seconds for choice in found.front]
    assert qualities == sorted(set(qualities))
    assert times == sorted(set(times))
    assert set(found.front) <= set(measured)
    for choice in measured:
        assert any(
            kept.quality_less_error >= choice.quality_less_error and kept.seconds <= choice.seconds
            for kept in found.front
        )
    assert 1 < len(found.front) < len(measured)


def choice(quality: float, seconds: float, error: float = 0.0) -> Choice:
    return Choice(FLAT, FunnelSchedule((8, 32), (40,), 5), quality, error, seconds)


def test_a_front_by_hand() -> None:
    good, fast, sure = choice(0.9, 2.0), choice(0.5, 1.0), choice(0.95, 3.0, 0.01)
    doubtful, slow, twin = choice(0.94, 3.5, 0.02), choice(0.8, 2.5), choice(0.9, 2.0)
    assert front([slow, good, doubtful, twin, sure, fast]) == (fast, good, sure)
    assert front([]) == ()
    assert cheapest([slow, good, doubtful, sure, fast], 0.85) == good
    assert cheapest([slow, good, doubtful, sure, fast], 0.91) == sure
    assert cheapest([slow, good, doubtful], 0.93) is None  # 0.94, give or take 0.02


@pytest.fixture
def labels() -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    return rng.integers(0, 10, 400), rng.integers(0, 10, 120)


def test_a_target_that_no_funnel_reaches_tells_what_could_be(measured: list[Choice]) -> None:
    """Of a first stage that need not be exact, no sample is sure that it always is."""
    with pytest.raises(TargetNotReachedError) as caught:
        plan(1.0, first_stages=[IVF])
    assert type(caught.value) is TargetNotReachedError
    best = caught.value.front[-1]
    assert caught.value.front == front(measured)
    assert best.quality_less_error == max(choice.quality_less_error for choice in measured) > 0.99
    assert str(caught.value) == (
        "A target must be one that some funnel reaches, by more than a standard error. "
        f"Received: target=1.0; the best that was found: {best.line().strip()}. "
        "Lower the target, allow wider dims, or give more queries to be surer by."
    )


def test_a_target_beyond_exact_search_is_refused_before_anything_is_tried(
    labels: tuple[Array, Array], measured: list[Choice], refuses: Refuses
) -> None:
    measure = precision_by_label(*labels)
    reached = measure(nearest(QUERIES, GALLERY, "cosine")[:, :K])
    text = (
        "A target must be one that exact search reaches, by more than a standard error. "
        f"Received: target={{}}; exact search at dim 32 reaches {reached.mean():.4f}. "
        "Lower the target."
    )
    sure = reached.mean() - error_of(reached)
    for target in (0.9, sure + 1e-6):
        with refuses(TargetNotReachedError, text.format(target)):
            plan(target, measure=measure)
    assert measured == []
    found = plan(sure - 1e-6, measure=measure, dims=(32,), first_stages=[FLAT])
    assert found.choice.quality == reached.mean()


def test_a_quality_of_ones_own() -> None:
    """Precision by label, not the exact neighbours: rows that lie to one side are of a kind."""
    measure = precision_by_label(GALLERY[:, 0] > 0, QUERIES[:, 0] > 0)
    found = plan(0.6, measure=measure)
    reached = measure(built(found).search(QUERIES).ids)
    np.testing.assert_allclose(found.choice.quality, reached.mean(), rtol=0, atol=1e-12)
    assert found.choice.quality_less_error >= 0.6


OWN = np.random.default_rng(5).permutation(400)[:100]  # rows of the gallery that ask
OTHERS = np.setdiff1d(np.arange(400), OWN)


@metrics
def test_rows_that_ask_are_found_by_none(metric: str) -> None:
    """Not by themselves, nor by one another; three have copies, which are rows like any."""
    gallery = GALLERY.copy()
    gallery[OTHERS[:3]] = gallery[OWN[:3]]
    truth = OTHERS[nearest(gallery[OWN], gallery[OTHERS], metric)[:, :K]]
    seen = []

    def measure(found: Array) -> Array:
        seen.append(found)
        return recalls(found, truth)

    found = plan(
        0.9, gallery=gallery, queries=gallery[OWN], own_rows=OWN, metric=metric, measure=measure
    )
    assert found.schedule.k == K
    assert found.choice.quality_less_error >= 0.9
    assert len(seen) > 5
    for rows in seen:
        assert rows.shape == (100, K)
        assert np.isin(rows, OTHERS).all()
    if metric != "dot":  # by which a longer row may be nearer than the copy
        assert (seen[-1][:3] == OTHERS[:3, None]).any(axis=1).all()


@metrics
@pytest.mark.parametrize("given", [OWN, OWN.tolist(), OWN.astype(np.uint16)], ids=type)
def test_a_plan_for_rows_is_one_for_the_others(
    given: Any, metric: str, measured: list[Choice]
) -> None:
    said: list[str] = []
    found = plan(0.9, queries=GALLERY[OWN], own_rows=given, metric=metric, says=said.append)
    mine, measured[:] = list(measured), []
    expected = plan(0.9, gallery=GALLERY[OTHERS], queries=GALLERY[OWN], metric=metric)
    assert (found, mine) == (expected, measured)
    kept, all_ = (nearest(GALLERY[OWN], rows, metric) for rows in (GALLERY[OTHERS], GALLERY))
    without = np.array([row[row != own] for row, own in zip(all_, OWN, strict=True)])
    assert recalls(OTHERS[kept[:, :K]], without[:, :K]).mean() < 0.9  # or nothing was left out
    assert said[0] == "exact neighbours of 100 queries at dim 32"


def test_a_row_may_ask_twice(measured: list[Choice]) -> None:
    twice = np.concatenate([OWN, OWN[:20]])
    found = plan(0.9, queries=GALLERY[twice], own_rows=twice)
    assert found == plan(0.9, gallery=GALLERY[OTHERS], queries=GALLERY[twice])
    assert measured


@pytest.mark.parametrize(
    ("own_rows", "received"),
    [
        (np.arange(119), "int64 of shape (119,)"),
        (np.arange(120)[:, None], "int64 of shape (120, 1)"),
        (np.arange(120.0), "float64 of shape (120,)"),
        (np.arange(120) > 60, "bool of shape (120,)"),
        (np.arange(120) - 1, "int64 of shape (120,)"),
        (np.arange(281, 401), "int64 of shape (120,)"),
        (np.full(120, 2**63, np.uint64), "uint64 of shape (120,)"),
        (7, "int64 of shape ()"),
    ],
)
def test_own_rows_are_rows_of_the_gallery(own_rows: Any, received: str, refuses: Refuses) -> None:
    text = (
        "own_rows must name the gallery row of every query. "
        f"Received: {received} for 120 queries and 400 rows. "
        "Leave it out if the queries are no rows."
    )
    with refuses(ValueError, text):
        plan(own_rows=own_rows)
    plan(own_rows=np.arange(280, 400))  # the last row is one


@pytest.mark.parametrize(("rows", "left"), [(120, 0), (121, 1), (125, 5)])
def test_rows_that_ask_leave_more_than_are_wanted(rows: int, left: int, refuses: Refuses) -> None:
    gallery, own = GALLERY[:rows], np.arange(120)
    text = (
        "A plan needs a target in (0, 1], a k below the gallery's rows, and a sample of at least "
        f"30 queries and one batch. Received: target=0.9, k=5, {left} rows, batch=1, 120 queries. "
        "Give for example target=0.95."
    )
    with refuses(ValueError, text):
        plan(gallery=gallery, queries=gallery[:120], own_rows=own)
    kept = plan(
        0.1, gallery=GALLERY[:126], queries=GALLERY[:120], own_rows=own, first_stages=[FLAT]
    )
    assert kept.schedule.k == 5
    again = np.minimum(own, 60)  # each row is left out once
    plan(0.1, gallery=gallery, queries=gallery[again], own_rows=again, first_stages=[FLAT])


def of(values: Array) -> Measure:
    return lambda _: values


@pytest.mark.parametrize("num", [30, 120])
def test_an_error_is_that_of_a_sample(num: int) -> None:
    """By hand: half of the queries at 0.4, half at 0.8; divided by one less than they are."""
    values = np.tile([0.4, 0.8], num // 2)
    found = plan(0.3, queries=QUERIES[:num], measure=of(values), first_stages=[FLAT], dims=(32,))
    assert found.choice.quality == pytest.approx(0.6, rel=1e-12)
    assert found.choice.error == pytest.approx(0.2 / np.sqrt(num - 1), rel=1e-12)


@pytest.mark.parametrize("k", [1, 5])
def test_an_error_is_at_least_one_neighbour(k: int) -> None:
    """No sample is sure: of 120 queries that all found the same, one may have found one less."""
    least = 1 / (120 * k)
    whole = FirstStage("IVF8,Flat", "nprobe=8")  # of 8 lists
    for measure, kind in ((None, whole), (of(np.ones(120)), FLAT)):
        given: dict[str, Any] = {"first_stages": [kind], "dims": (32,), "k": k, "measure": measure}
        choice = plan(1 - 1.01 * least, **given).choice
        assert choice.quality == 1
        assert choice.error == pytest.approx(least, rel=1e-12)
        with pytest.raises(TargetNotReachedError):
            plan(1 - 0.99 * least, **given)


Asked = tuple[str, str, tuple[int, ...], tuple[int, ...]]


class Told:
    """What trials are told to find, so that what is tried next is the planner's own decision.

    It starts with: quality, and seconds, of a funnel (its first dim, its effort); a shortlist of
    `needs[dim]`, where that of the last dim is K.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.needs: dict[int, int | None] = {}
        self.quality: Callable[[int, int], float] = lambda _dim, _effort: 0.5
        self.seconds: Callable[[int], float] = lambda _dim: 1.0
        self.error = 0.0
        self.asked: list[Asked] = []
        self.targets: set[float] = set()
        monkeypatch.setattr(planner.Trials, "shortest_shortlist", self._shortest)
        monkeypatch.setattr(planner.Trials, "measured", self._measured)

    def _shortest(self, dim: int, target: float) -> int | None:
        self.targets.add(target)
        return self.needs[dim]

    def _measured(self, _: Shortlister, spec: FirstStage, schedule: FunnelSchedule) -> Choice:
        self.asked.append((spec.factory, spec.settings, schedule.dims, schedule.shortlists))
        dim, effort = schedule.dims[0], int(spec.settings.rpartition("=")[2] or 0)
        return Choice(spec, schedule, self.quality(dim, effort), self.error, self.seconds(dim))

    @property
    def dims(self) -> list[int]:
        """First dims that were asked, each once."""
        return list(dict.fromkeys(dims[0] for _, _, dims, _ in self.asked))

    def plan(self, target: float = 0.9, **changed: Any) -> Plan | None:
        try:
            return plan(target, dims=tuple(self.needs), **changed)
        except TargetNotReachedError:
            return None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(monkeypatch)


def test_every_funnel_that_is_tried_by_hand(told: Told) -> None:
    """None reaches: longer shortlists, but of no exact stage, nor of the full width alone."""
    told.needs = {8: 20, 16: None, 32: K}
    assert told.plan() is None
    assert told.asked == [
        ("Flat", "", (8, 32), (20,)),
        *(
            ("IVF8,Flat", f"nprobe={effort}", (8, 32), (shortlist,))
            for shortlist in (20, 40, 80, 160, 320)
            for effort in (1, 2)
        ),
        ("Flat", "", (32,), ()),
        ("IVF8,Flat", "nprobe=1", (32,), ()),
        ("IVF8,Flat", "nprobe=2", (32,), ()),
    ]
    assert told.targets == {0.9}


@pytest.mark.parametrize(
    ("qualities", "tries"),
    [
        ([0.5, 0.5], 2),
        ([0.5, 0.4], 2),
        ([0.5, 0.5009], 2),
        ([0.5, 0.5011, 0.5022, 0.5030], 4),  # each beside the one before it
        ([0.5, 0.6, 0.89, 0.9], 4),  # which is the target
        ([0.9], 1),
        ([0.02 * n for n in range(10)], 10),  # 1 to 512
    ],
    ids=str,
)
def test_a_setting_is_doubled_while_that_brings_something(
    qualities: list[float], tries: int, told: Told
) -> None:
    told.needs = {32: K}
    rest = iter([*qualities, *[0.8] * 9])
    told.quality = lambda _dim, _effort: next(rest)
    found = told.plan(first_stages=[IVF])
    between = [5, 6, 7] if found is not None and tries == 4 else []
    assert [settings for _, settings, _, _ in told.asked] == [
        f"nprobe={effort}" for effort in (*(2**n for n in range(tries)), *between)
    ]
    assert (found is not None) == (0.9 in qualities)


def test_a_setting_is_doubled_until_its_quality_less_its_error_is_enough(told: Told) -> None:
    told.needs, told.error = {32: K}, 0.05
    told.quality = lambda _, effort: {1: 0.90, 2: 0.93, 3: 0.94, 4: 0.96}[effort]
    found = told.plan(first_stages=[IVF])
    assert found is not None
    assert found.first_stage.settings == "nprobe=4"
    assert [settings for _, settings, _, _ in told.asked] == [
        f"nprobe={effort}" for effort in (1, 2, 4, 3)
    ]


def test_between_what_was_doubled_something_may_do(told: Told) -> None:
    told.needs = {8: 20, 32: K}
    told.seconds = lambda _dim: 1 / len(told.asked)  # what is asked later is faster
    told.quality = lambda _dim, effort: (
        0.95 if effort >= 11 and max(told.asked[-1][3], default=0) >= 50 else 0.1
    )
    found = told.plan(first_stages=[replace(IVF, settings="nprobe=16")])
    assert found is not None
    assert found.first_stage.settings == "nprobe=12"  # of 10, 12, 14
    assert found.schedule.shortlists == (50,)  # of 50, 60, 70, which follow 80


@pytest.mark.parametrize("slack", [1, 2, 4, 8, 16])
def test_a_longer_shortlist_may_be_what_it_takes(slack: int, told: Told) -> None:
    told.needs = {8: 20, 32: K}
    told.quality = lambda _dim, _effort: 0.95 if told.asked[-1][3] == (20 * slack,) else 0.1
    found = told.plan(first_stages=[IVF])
    assert found is not None
    assert found.schedule == FunnelSchedule((8, 32), (20 * slack,), K)


@pytest.mark.parametrize(
    ("seconds", "unreached", "tried"),
    [
        ({4: 1.0, 8: 1.49, 16: 1.49, 32: 9.0}, (), [4, 8, 16, 32]),
        ({4: 1.0, 8: 1.51, 16: 0.1, 32: 0.1}, (), [4, 8]),
        ({4: 1.0, 8: 0.5, 16: 0.76, 32: 0.1}, (), [4, 8, 16]),  # beside the best, not the last
        ({4: 1.0, 8: 0.5, 16: 0.74, 32: 0.1}, (), [4, 8, 16, 32]),
        ({4: 1.0, 8: 9.0, 16: 1.2, 32: 0.1}, (8,), [4, 8, 16, 32]),  # that reaches nothing
        ({4: 0.1, 8: 9.0, 16: 13.0, 32: 20.0}, (4,), [4, 8, 16, 32]),
        ({4: 0.1, 8: 9.0, 16: 14.0, 32: 0.1}, (4,), [4, 8, 16]),
    ],
    ids=str,
)
def test_dims_wider_than_one_that_is_too_slow_are_left_alone(
    seconds: dict[int, float], unreached: tuple[int, ...], tried: list[int], told: Told
) -> None:
    told.needs = dict.fromkeys(seconds, K)
    told.quality = lambda dim, _: 0.5 if dim in unreached else 1.0
    told.seconds = seconds.__getitem__
    found = told.plan(first_stages=[FLAT])
    assert told.dims == tried
    assert found is not None
    best = min((dim for dim in tried if dim not in unreached), key=seconds.__getitem__)
    assert found.schedule.dims[0] == best


def test_the_full_width_alone_may_be_the_cheapest(told: Told) -> None:
    told.needs = {8: 20, 32: K}
    told.quality = lambda _dim, _effort: 1.0
    told.seconds = {8: 1.0, 32: 0.9}.__getitem__
    found = told.plan(first_stages=[FLAT])
    assert found is not None
    assert found.schedule == FunnelSchedule((32,), (), K)


@pytest.mark.parametrize(
    ("needs", "kind", "tried"),
    [
        ({8: 40, 16: 10, 32: 5}, IVF, [8, 16, 32]),
        ({8: 41, 16: 10, 32: 5}, IVF, [16, 32]),  # more than 8 times 5 rows of the last dim
        ({8: 41, 16: 10, 32: 5}, FLAT, [8, 16, 32]),  # which reads every prefix too
        ({8: None, 16: 40, 32: 5}, IVF, [16, 32]),
        ({8: None, 16: 41, 32: 5}, FLAT, [16, 32]),
        ({2: 5, 16: 5, 32: 5}, FLAT, [2, 16]),  # 960, 6560 and 12960 numbers
    ],
    ids=str,
)
def test_dims_that_read_far_more_than_another_are_left_out(
    needs: dict[int, int | None], kind: FirstStage, tried: list[int], told: Told
) -> None:
    told.needs = needs
    assert told.plan(first_stages=[kind]) is None
    assert told.dims == tried


@metrics
@pytest.mark.parametrize("dim", [4, 8, 16])
def test_the_shortest_shortlist_is_found_by_lengthening_it(dim: int, metric: str) -> None:
    lab = planner.Trials(GALLERY, QUERIES, 32, K, metric, None, None, 1, str)
    truth, order = (nearest(QUERIES[:, :d], GALLERY[:, :d], metric) for d in (32, dim))
    sizes = (5, 8, 10, 15, 20, 30, 40, 60, 80, 120, 160, 320)  # 5 times 1, 1.5, 2, 3, ...
    reached = [recalls(order[:, :size], truth[:, :K]) for size in sizes]  # the rest is exact
    lowered = [values.mean() - error_of(values) for values in reached]
    for target in (0.3, 0.6, 0.9, 0.97, 0.998):
        enough = (size for size, least in zip(sizes, lowered, strict=True) if least >= target)
        assert lab.shortest_shortlist(dim, target) == next(enough, None)
    assert lab.shortest_shortlist(dim, 0.999) is None  # the error is 0.0017 at least
    assert lab.shortest_shortlist(32, 0.999) == K


def test_a_shortlist_is_no_longer_than_the_gallery() -> None:
    seen = []

    def measure(found: Array) -> Array:
        seen.append(found)
        return np.full(120, 0.5)

    lab = planner.Trials(GALLERY[:50], QUERIES, 32, K, "l2", measure, np.arange(3), 1, str)
    assert lab.shortest_shortlist(8, 0.9) is None
    assert len(seen) == 1 + 8  # the exact answer; and of 5, 8, 10, 15, 20, 30, 40 and 47
    np.testing.assert_array_equal(seen[-1], 3 + nearest(QUERIES, GALLERY[3:50], "l2")[:, :K])
    assert lab.shortest_shortlist(8, 0.4) == K


@pytest.mark.parametrize("dims", [(4, 8, 32), (16, 24), (32,), None])
def test_stages_are_of_the_dims_that_are_given(
    dims: tuple[int, ...] | None, measured: list[Choice]
) -> None:
    found = plan(0.9, dims=dims)
    allowed = dims or (8, 16, 32)
    for choice in measured:
        assert set(choice.schedule.dims) <= set(allowed)
        assert choice.schedule.dims[-1] == allowed[-1]
        assert choice.first_stage.factory in {"Flat", "IVF8,Flat"}
    assert found.schedule.dims[-1] == allowed[-1]


def test_a_stage_between_is_tried(measured: list[Choice]) -> None:
    plan(0.97, dims=(8, 16, 32), first_stages=[FLAT], k=2)
    between = [c.schedule for c in measured if len(c.schedule.dims) == 3]
    assert between
    for schedule in between:
        assert schedule.dims == (8, 16, 32)
        assert schedule.shortlists[0] > schedule.shortlists[1] >= schedule.k


def test_a_first_stage_is_set_harder_until_it_is_enough(measured: list[Choice]) -> None:
    plan(0.97, first_stages=[IVF], dims=(32,))
    efforts = [choice.first_stage.settings for choice in measured]
    enough = next(n for n, choice in enumerate(measured) if choice.quality_less_error >= 0.97)
    assert efforts[: enough + 1] == [f"nprobe={2**n}" for n in range(enough + 1)]
    assert set(efforts[enough + 1 :]) <= {
        f"nprobe={effort}" for effort in range(2 ** (enough - 1) + 1, 2**enough)
    }
    assert enough > 0


def test_a_kind_that_faiss_cannot_make_is_passed_over_with_a_word() -> None:
    said: list[str] = []
    nope = FirstStage("Nope", "")
    assert plan(0.9, first_stages=[nope, FLAT], says=said.append).first_stage == FLAT
    assert any(word.startswith("The first stage must be an index FAISS can make") for word in said)
    assert said[0] == "exact neighbours of 120 queries at dim 32"
    assert {
        "what prefixes of dim 8 can reach",
        "building Nope over dim 8",
        "building Flat over dim 8",
    } <= set(said)


def test_where_faiss_can_make_none_its_reason_is_told() -> None:
    kinds = [FirstStage("Never", ""), FirstStage("Nope", "")]
    with pytest.raises(ValueError, match=r"Received: 'Nope' for 400 rows of dim 32 ") as caught:
        plan(0.9, first_stages=kinds)
    assert str(caught.value).startswith("The first stage must be an index FAISS can make")


def test_first_stages_are_not_names(refuses: Refuses) -> None:
    names: list[Any] = ["Flat"]
    text = "A first stage is a FirstStage. Received: 'Flat'. "
    text += "Write FirstStage('HNSW32', 'efSearch=64')."
    with refuses(TypeError, text):
        plan(0.9, first_stages=names)


def test_without_a_first_stage_nothing_is_found(refuses: Refuses) -> None:
    text = (
        "A target must be one that some funnel reaches, by more than a standard error. "
        "Received: target=0.9; the best that was found: nothing at these dims. "
        "Lower the target, allow wider dims, or give more queries to be surer by."
    )
    with refuses(TargetNotReachedError, text):
        plan(0.9, first_stages=[])


@pytest.mark.parametrize(
    ("per_centroid", "kinds"),
    [
        (39, ["Flat", "HNSW32_SQ8"]),
        (6, ["Flat", "HNSW32_SQ8"]),  # 6 times 64 rows, and a tenth of them to spare
        (5, ["Flat", "HNSW32_SQ8", "IVF64,Flat"]),
    ],
)
def test_lists_are_tried_where_the_gallery_can_teach_them(
    per_centroid: int, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(planner, "_PER_CENTROID", per_centroid)
    plan(0.5, first_stages=None, dims=(16,), says=said.append)
    built = dict.fromkeys(word for word in said if word.startswith("building"))
    assert list(built) == [f"building {kind} over dim 16" for kind in (*kinds, "HNSW32")]


@pytest.mark.parametrize("batch", [1, 7, 120])
def test_time_is_taken_of_batches(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    search = FaissIndex.search

    def counted(self: FaissIndex, queries: Array) -> Any:
        sizes.append(len(queries))
        return search(self, queries)

    monkeypatch.setattr(FaissIndex, "search", counted)
    found = plan(0.9, batch=batch, first_stages=[FLAT])
    assert set(sizes) == {batch, 120}
    assert 0 < found.choice.seconds < 1


def test_time_is_per_query_and_of_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search takes 7 ms on the clock, but every fifth 900."""
    ticks = clock()
    monkeypatch.setattr("keras_mrl_serving.index.planner.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr(planner, "_LONGEST_S", 1e9)
    found = plan(0.9, batch=10, first_stages=[FLAT], dims=(32,))
    assert found.choice.seconds == pytest.approx(7e-4)


def clock() -> Iterator[float]:
    now, reads = 0.0, 0
    yield now  # when it must stop
    while True:
        yield now
        now += 0.9 if reads % 5 == 4 else 0.007
        reads += 1
        yield now


def test_a_table_marks_the_choice(measured: list[Choice]) -> None:
    found = plan(0.9)
    header, *rows = found.table().splitlines()
    assert header == "quality +- error     per query  funnel"
    assert [row.removesuffix("   <- chosen") for row in rows] == [c.line() for c in found.front]
    marked = [c for c, row in zip(found.front, rows, strict=True) if row.endswith("<- chosen")]
    assert marked == [found.choice]
    assert measured


def test_a_plan_as_json(measured: list[Choice]) -> None:
    found = plan(0.9)
    said = found.to_json()
    assert said["target"] == 0.9
    assert said["front"] == [choice.to_json() for choice in found.front]
    assert FunnelSchedule.from_json(said["schedule"]) == found.schedule
    assert FirstStage(said["factory"], said["settings"]) == found.first_stage
    assert said["quality"] == round(found.choice.quality, 5)
    assert measured


@pytest.mark.parametrize(
    "changed",
    [
        {"target": 0},
        {"target": -0.1},
        {"target": 1.01},
        {"target": float("nan")},
        {"k": 0},
        {"k": 400},
        {"batch": 0},
        {"batch": 121},
        {"queries": QUERIES[:0]},
        {"queries": QUERIES[:29]},
        {"target": "0.9"},
        {"target": None},
        {"k": 5.0},
        {"k": "5"},
        {"k": True},
        {"batch": 1.0},
        {"batch": None},
    ],
    ids=str,
)
def test_a_plan_needs_a_target_a_k_and_a_sample(changed: Any, refuses: Refuses) -> None:
    given = {"target": 0.9, "k": 5, "batch": 1, "queries": QUERIES, **changed}
    text = (
        "A plan needs a target in (0, 1], a k below the gallery's rows, and a sample of at least "
        f"30 queries and one batch. Received: target={given['target']!r}, k={given['k']!r}, 400 "
        f"rows, batch={given['batch']!r}, {len(given['queries'])} queries. "
        "Give for example target=0.95."
    )
    with refuses(ValueError, text):
        plan(**changed)


def test_the_least_that_a_plan_takes() -> None:
    found = plan(0.9, queries=QUERIES[:30], batch=30)
    assert found.choice.quality_less_error >= 0.9
    assert plan(0.01, gallery=GALLERY[:6], first_stages=[FLAT]).schedule.k == 5


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"metric": "hamming"},
            'metric must be "cosine", "dot" or "l2". Received: metric=\'hamming\'. '
            "Take cosine if unsure.",
        ),
        (
            {"dims": (16, 8)},
            "dims must be strictly increasing positive integers. Received: dims=(16, 8). "
            "Sort them and drop repeats: dims=(8, 16).",
        ),
        (
            {"dims": (8, 64)},
            "The gallery must be (rows, width) with a width of at least 64. "
            "Received: shape (400, 32). Embed them at the funnel's last dim, one row each.",
        ),
        (
            {"queries": QUERIES[:, :16]},
            "The queries must be (rows, width) with a width of at least 32. "
            "Received: shape (120, 16). Embed them at the funnel's last dim, one row each.",
        ),
    ],
)
def test_arguments_must_fit_one_another(changed: Any, text: str, refuses: Refuses) -> None:
    with refuses(ValueError, text):
        plan(0.9, **changed)


@pytest.mark.soak
@pytest.mark.parametrize("target", [0.9, 0.97])
def test_fresh_queries_reach_the_target_too(target: float) -> None:
    """Planned on half of the queries, measured on the others: 20 times in `make soak`."""
    rows, width, splits = (5000, 64, 20) if SOAK else (800, 32, 3)
    gallery = clusters(0, rows, width, decay=0.98)
    queries = clusters(1, 800, width, decay=0.98)
    truth = nearest(queries, gallery, "cosine")[:, :10]
    reached = []
    for split in range(splits):
        mine, others = np.array_split(np.random.default_rng(split).permutation(len(queries)), 2)
        kinds = None if SOAK else [FLAT, IVF]
        found = plan_funnel(gallery, queries[mine], target, first_stages=kinds)
        index = FaissIndex.build(gallery, found.schedule, first_stage=found.first_stage)
        reached.append(recalls(index.search(queries[others]).ids, truth[others]).mean())
    assert sum(recall >= target - 0.01 for recall in reached) >= splits - splits // 20, reached
