"""What `plan_funnel` promises of the funnel it chooses, and what `choose_funnel` tries."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.errors import TargetNotReachedError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import FaissIndex, FirstStage, Plan, plan_funnel
from keras_mrl_serving.index.first_stage import import_faiss
from keras_mrl_serving.index.plan import Choice, Measure, front, precision_by_label, time_per_query
from keras_mrl_serving.index.planner import Trials, choose_funnel
from keras_mrl_serving.index.shortlister import Shortlister
from keras_mrl_serving.projection import Projection
from keras_mrl_serving.results import Neighbors
from tests.helpers.galleries import FLAT, METRICS, Array, Refuses, clusters, true_scores

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))

IVF = FirstStage("IVF8,Flat", "nprobe=1")
GALLERY, QUERIES = clusters(0, 400, 32, decay=0.9), clusters(1, 120, 32, decay=0.9)
DIMS = (8, 16, 32)
K = 5

metrics = pytest.mark.parametrize("metric", METRICS)


def nearest(queries: Array, gallery: Array, metric: str) -> Array:
    return np.argsort(-true_scores(queries, gallery, queries.shape[1], metric), axis=1)


def recalls(neighbors: Array, truth: Array) -> Array:
    return np.array([len(set(n) & set(t)) / len(t) for n, t in zip(neighbors, truth, strict=True)])


def error_of(values: Array, k: int = K) -> float:
    return max(float(values.std(ddof=1) / np.sqrt(len(values))), 1 / (k * len(values)))


def ignore(_: str) -> None:
    """Nobody listens."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More wait for one another, where other work has the cores."""
    faiss = import_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def work(index: Any, _queries: Array, _batch: int) -> float:
    """The work of a search in place of its time: the same on every machine."""
    schedule, is_flat = index.schedule, index.first_stage.factory == "Flat"
    numbers = 4 * schedule.dims[0] * (400 if is_flat else 60)
    return 1e-9 * (numbers + 32 * sum(schedule.shortlists))


def plan(target: float = 0.9, **changed: Any) -> Plan:
    arguments: dict[str, Any] = {"k": K, "first_stages": [FLAT, IVF], "timer": work, **changed}
    gallery, queries = arguments.pop("gallery", GALLERY), arguments.pop("queries", QUERIES)
    return plan_funnel(gallery, queries, target, **arguments)


class Recorded(Trials):
    """Trials that remember every choice they measured."""

    def __init__(self, *arguments: Any) -> None:
        self.choices: list[Choice] = []
        super().__init__(*arguments)

    def measured(self, *arguments: Any) -> Choice:
        self.choices.append(super().measured(*arguments))
        return self.choices[-1]


def recorded(
    dims: tuple[int, ...] = DIMS,
    metric: str = "cosine",
    measure: Measure | None = None,
    k: int = K,
) -> Recorded:
    return Recorded(GALLERY, QUERIES, dims[-1], k, metric, measure, None, 1, ignore, work)


def built(found: Plan, metric: str = "cosine") -> FaissIndex:
    assert found.schedule.k == K
    return FaissIndex.build(
        GALLERY, found.schedule, None, metric, first_stage=found.first_stage, plan=found.to_json()
    )


@metrics
@pytest.mark.parametrize("target", [0.5, 0.99, 1.0])
def test_the_index_that_is_planned_reaches_the_target_on_the_sample(
    target: float, metric: str
) -> None:
    planned = plan(target, metric=metric)
    index = built(planned, metric)
    reached = recalls(index.search(QUERIES).ids, nearest(QUERIES, GALLERY, metric)[:, :K])
    is_exact = planned.schedule.dims == (32,) and planned.first_stage == FLAT
    error = 0.0 if is_exact else error_of(reached)  # what is exact is not estimated
    assert is_exact or target < 1
    assert reached.mean() - 1.64 * error >= target
    np.testing.assert_allclose(planned.choice.quality, reached.mean(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(planned.choice.error, error, rtol=0, atol=1e-12)
    assert planned.choice.sure_quality == planned.choice.quality - 1.64 * planned.choice.error
    assert (planned.target, index.plan) == (target, planned.to_json())


@metrics
@pytest.mark.parametrize("target", [0.3, 0.97])
def test_the_choice_is_the_fastest_that_reaches_the_target(target: float, metric: str) -> None:
    trials = recorded(metric=metric)
    planned = choose_funnel(trials, target, DIMS, [FLAT, IVF])
    reaching = [choice for choice in trials.choices if choice.sure_quality >= target]
    assert planned.choice in reaching
    assert planned.choice.seconds == min(choice.seconds for choice in reaching)
    assert planned.choice in planned.front
    assert planned.schedule == planned.choice.schedule
    assert planned.first_stage == planned.choice.first_stage
    assert len(trials.choices) > 3


def test_a_higher_target_costs_more() -> None:
    costs = [plan(target).choice.seconds for target in (0.3, 0.9, 1.0)]
    assert costs[0] < costs[1] < costs[2]


@metrics
def test_the_front_is_what_no_other_beats(metric: str) -> None:
    trials = recorded(metric=metric)
    planned = choose_funnel(trials, 0.9, DIMS, [FLAT, IVF])
    qualities = [choice.sure_quality for choice in planned.front]
    times = [choice.seconds for choice in planned.front]
    assert qualities == sorted(set(qualities))
    assert times == sorted(set(times))
    assert set(planned.front) <= set(trials.choices)
    for choice in trials.choices:
        assert any(
            other.sure_quality >= choice.sure_quality and other.seconds <= choice.seconds
            for other in planned.front
        )
    assert 1 < len(planned.front) < len(trials.choices)


def test_a_target_that_no_funnel_reaches_names_the_best_there_is() -> None:
    """Of a first stage that need not be exact, no sample is sure that it always is."""
    trials = recorded()
    with pytest.raises(TargetNotReachedError) as caught:
        choose_funnel(trials, 1.0, DIMS, [IVF])
    assert type(caught.value) is TargetNotReachedError
    best = caught.value.front[-1]
    assert caught.value.front == front(trials.choices)
    assert best.sure_quality == max(c.sure_quality for c in trials.choices) > 0.99
    assert str(caught.value) == (
        "A target must be one that some funnel reaches, by more than 1.64 standard errors. "
        f"Received: target=1.0; the best that was found: {best.line().strip()}. "
        "Lower the target, allow wider dims, or give more queries to be surer by."
    )


def test_a_target_beyond_exact_search_is_refused_before_anything_is_tried(
    refuses: Refuses,
) -> None:
    rng = np.random.default_rng(3)
    measure = precision_by_label(rng.integers(0, 10, 400), rng.integers(0, 10, 120))
    reached = measure(nearest(QUERIES, GALLERY, "cosine")[:, :K])
    text = (
        "A target must be one that exact search reaches, by more than 1.64 standard errors. "
        f"Received: target={{}}; exact search at dim 32 reaches {reached.mean():.4f}. "
        "Lower the target."
    )
    sure = reached.mean() - 1.64 * error_of(reached)
    trials = recorded(measure=measure)
    for target in (0.9, sure + 1e-6):
        with refuses(TargetNotReachedError, text.format(target)):
            choose_funnel(trials, target, DIMS, [FLAT])
    assert trials.choices == []
    planned = plan(sure - 1e-6, measure=measure, dims=(32,), first_stages=[FLAT])
    assert planned.choice.quality == reached.mean()


def test_a_quality_of_ones_own() -> None:
    """Precision by label, not the exact neighbours: rows that lie to one side are of a kind."""
    measure = precision_by_label(GALLERY[:, 0] > 0, QUERIES[:, 0] > 0)
    planned = plan(0.6, measure=measure)
    reached = measure(np.asarray(built(planned).search(QUERIES).ids, np.int64))
    np.testing.assert_allclose(planned.choice.quality, reached.mean(), rtol=0, atol=1e-12)
    assert planned.choice.sure_quality >= 0.6


OWN = np.random.default_rng(5).permutation(400)[:100]  # rows of the gallery that are the queries
OTHERS = np.setdiff1d(np.arange(400), OWN)


@metrics
def test_queries_of_the_gallery_are_never_neighbours(metric: str) -> None:
    """Not of themselves, nor of one another; three have copies, which are rows like any."""
    gallery = GALLERY.copy()
    gallery[OTHERS[:3]] = gallery[OWN[:3]]
    truth = OTHERS[nearest(gallery[OWN], gallery[OTHERS], metric)[:, :K]]
    measured = []

    def measure(neighbors: Array) -> Array:
        measured.append(neighbors)
        return recalls(neighbors, truth)

    planned = plan(
        0.9, gallery=gallery, queries=gallery[OWN], own_rows=OWN, metric=metric, measure=measure
    )
    assert planned.schedule.k == K
    assert planned.choice.sure_quality >= 0.9
    assert len(measured) > 5
    for rows in measured:
        assert rows.shape == (100, K)
        assert np.isin(rows, OTHERS).all()
    if metric != "dot":  # by which a longer row may be nearer than the copy
        assert (measured[-1][:3] == OTHERS[:3, None]).any(axis=1).all()


@metrics
@pytest.mark.parametrize("own_rows", [OWN, OWN.tolist(), OWN.astype(np.uint16)], ids=type)
def test_a_plan_for_rows_is_one_for_the_others(own_rows: Any, metric: str) -> None:
    lines: list[str] = []
    expected_lines: list[str] = []
    planned = plan(0.9, queries=GALLERY[OWN], own_rows=own_rows, metric=metric, says=lines.append)
    expected = plan(
        0.9,
        gallery=GALLERY[OTHERS],
        queries=GALLERY[OWN],
        metric=metric,
        says=expected_lines.append,
    )
    assert planned == expected
    assert lines == expected_lines  # every funnel that was tried, its quality and its time
    others, all_ = (nearest(GALLERY[OWN], rows, metric) for rows in (GALLERY[OTHERS], GALLERY))
    without = np.array([row[row != own] for row, own in zip(all_, OWN, strict=True)])
    assert recalls(OTHERS[others[:, :K]], without[:, :K]).mean() < 0.9  # or nothing was left out
    assert lines[0] == "exact neighbours of 100 queries at dim 32"


def test_a_row_may_be_a_query_twice() -> None:
    twice = np.concatenate([OWN, OWN[:20]])
    planned = plan(0.9, queries=GALLERY[twice], own_rows=twice)
    assert planned == plan(0.9, gallery=GALLERY[OTHERS], queries=GALLERY[twice])


def of(values: Array) -> Measure:
    return lambda _: values


@pytest.mark.parametrize("num", [30, 120])
def test_an_error_is_that_of_a_sample(num: int) -> None:
    """By hand: half of the queries at 0.4, half at 0.8; divided by one less than they are."""
    values = np.tile([0.4, 0.8], num // 2)
    planned = plan(0.3, queries=QUERIES[:num], measure=of(values), first_stages=[FLAT], dims=(32,))
    assert planned.choice.quality == pytest.approx(0.6, rel=1e-12)
    assert planned.choice.error == pytest.approx(0.2 / np.sqrt(num - 1), rel=1e-12)


@pytest.mark.parametrize("k", [1, 5])
def test_an_error_is_at_least_one_neighbour(k: int) -> None:
    """No sample is sure: of 120 queries that all found the same, one may have found one less."""
    least = 1 / (120 * k)
    whole = FirstStage("IVF8,Flat", "nprobe=8")  # of 8 lists
    for measure, kind in ((None, whole), (of(np.ones(120)), FLAT)):
        arguments: dict[str, Any] = {
            "first_stages": [kind],
            "dims": (32,),
            "k": k,
            "measure": measure,
        }
        choice = plan(1 - 1.01 * 1.64 * least, **arguments).choice
        assert choice.quality == 1
        assert choice.error == pytest.approx(least, rel=1e-12)
        with pytest.raises(TargetNotReachedError):
            plan(1 - 0.99 * 1.64 * least, **arguments)


class Scripted(Trials):
    """Trials with invented results, so that what is tried next is the planner's own decision.

    At the start every funnel has the same quality and time; `needs[dim]` is the shortest shortlist
    at a dim, which at the last is K.
    """

    def __init__(self, needs: dict[int, int | None], num_rows: int = 400) -> None:
        self.rows = len(GALLERY)
        super().__init__(GALLERY, QUERIES, max(needs), K, "cosine", None, None, 1, ignore)
        self.rows = num_rows
        self.needs = needs
        self.projected: dict[int, int] = {}
        self.quality: Callable[[int, int], float] = lambda _dim, _effort: 0.5
        self.seconds: Callable[[int], float] = lambda _dim: 1.0
        self.error = 0.0
        self.tried: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = []
        self.targets: set[float] = set()

    @property
    def num_rows(self) -> int:
        return self.rows

    def shortest_shortlist(
        self, dim: int, target: float, projection: Projection | None = None
    ) -> int | None:
        self.targets.add(target)
        return self.needs[dim] if projection is None else self.projected.get(dim)

    def first(self, dim: int, _spec: FirstStage) -> Shortlister:
        return Shortlister(import_faiss().IndexFlatL2(dim), FLAT)

    def measured(self, _first: Shortlister, spec: FirstStage, schedule: FunnelSchedule) -> Choice:
        self.tried.append((spec.factory, spec.settings, schedule.dims, schedule.shortlists))
        dim, effort = schedule.dims[0], int(spec.settings.rpartition("=")[2] or 0)
        return Choice(spec, schedule, self.quality(dim, effort), self.error, self.seconds(dim))

    @property
    def first_dims(self) -> list[int]:
        """First dims that were tried, each once."""
        return list(dict.fromkeys(dims[0] for _, _, dims, _ in self.tried))

    def settings(self) -> list[str]:
        return [settings for _, settings, _, _ in self.tried]

    def plan(self, first_stages: list[FirstStage] | None, target: float = 0.9) -> Plan | None:
        try:
            return choose_funnel(self, target, tuple(self.needs), first_stages)
        except TargetNotReachedError:
            return None


def test_every_funnel_that_is_tried_by_hand() -> None:
    """None reaches: longer shortlists, but of no exact stage, nor of the full width alone."""
    trials = Scripted({8: 20, 16: None, 32: K})
    assert trials.plan([IVF, FLAT]) is None
    assert trials.tried == [
        *(
            ("IVF8,Flat", f"nprobe={effort}", (8, 32), (shortlist,))
            for shortlist in (20, 40, 80, 160, 320)
            for effort in (1, 2)
        ),
        ("Flat", "", (8, 32), (20,)),
        ("IVF8,Flat", "nprobe=1", (32,), ()),
        ("IVF8,Flat", "nprobe=2", (32,), ()),
        ("Flat", "", (32,), ()),
    ]
    assert trials.targets == {0.9}


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
    qualities: list[float], tries: int
) -> None:
    trials = Scripted({32: K})
    rest = iter([*qualities, *[0.8] * 9])
    trials.quality = lambda _dim, _effort: next(rest)
    planned = trials.plan([IVF])
    between = [5, 6, 7] if planned is not None and tries == 4 else []
    efforts = (*(2**n for n in range(tries)), *between)
    assert trials.settings() == [f"nprobe={effort}" for effort in efforts]
    assert (planned is not None) == (0.9 in qualities)


def test_a_setting_is_doubled_until_its_quality_less_its_error_is_enough() -> None:
    trials = Scripted({32: K})
    trials.error = 0.05
    trials.quality = lambda _, effort: {1: 0.90, 2: 0.95, 3: 0.97, 4: 0.99}[effort]
    planned = trials.plan([IVF])
    assert planned is not None
    assert planned.first_stage.settings == "nprobe=4"
    assert trials.settings() == [f"nprobe={effort}" for effort in (1, 2, 4, 3)]


def test_less_than_what_was_doubled_may_be_enough() -> None:
    trials = Scripted({8: 20, 32: K})
    trials.seconds = lambda _dim: 1 / len(trials.tried)  # what is tried later is faster
    trials.quality = lambda _dim, effort: (
        0.95 if effort >= 11 and max(trials.tried[-1][3], default=0) >= 50 else 0.1
    )
    planned = trials.plan([replace(IVF, settings="nprobe=16")])
    assert planned is not None
    assert planned.first_stage.settings == "nprobe=12"  # of 10, 12, 14
    assert planned.schedule.shortlists == (50,)  # of 50, 60, 70, which follow 80


def test_shortlists_of_up_to_four_times_the_need_are_tried_though_a_shorter_one_is_enough() -> None:
    """With a longer one less effort may do."""
    trials = Scripted({8: 20, 32: K})
    trials.quality = lambda _dim, _effort: 1.0
    trials.plan([IVF])
    sizes = dict.fromkeys(shortlists for _, _, dims, shortlists in trials.tried if dims == (8, 32))
    assert list(sizes)[:3] == [(20,), (40,), (80,)]
    assert max(sizes) == (80,)


@pytest.mark.parametrize("slack", [1, 2, 4, 8, 16])
def test_a_longer_shortlist_may_be_what_it_takes(slack: int) -> None:
    trials = Scripted({8: 20, 32: K})
    trials.quality = lambda _dim, _effort: 0.95 if trials.tried[-1][3] == (20 * slack,) else 0.1
    planned = trials.plan([IVF])
    assert planned is not None
    assert planned.schedule == FunnelSchedule((8, 32), (20 * slack,), K)


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
def test_dims_wider_than_one_that_is_too_slow_are_not_tried(
    seconds: dict[int, float], unreached: tuple[int, ...], tried: list[int]
) -> None:
    trials = Scripted(dict.fromkeys(seconds, K))
    trials.quality = lambda dim, _: 0.5 if dim in unreached else 1.0
    trials.seconds = seconds.__getitem__
    planned = trials.plan([FLAT])
    assert trials.first_dims == tried
    assert planned is not None
    best = min((dim for dim in tried if dim not in unreached), key=seconds.__getitem__)
    assert planned.schedule.dims[0] == best


def test_once_the_time_is_over_no_other_first_stage_is_begun() -> None:
    trials = Scripted({8: 20, 16: 20, 32: K})
    trials.quality = lambda dim, _: 1.0 if dim >= 16 else 0.1  # dim 8 does not reach the target
    planned = choose_funnel(trials, 0.9, (8, 16, 32), None, lambda: True)
    kinds = [(dims[0], factory) for factory, _, dims, _ in trials.tried]
    assert planned.schedule.dims[0] == 16
    assert planned.first_stage.factory == kinds[-1][1]
    assert [dim for dim, _ in dict.fromkeys(kinds)].count(16) == 1
    assert 32 not in trials.first_dims


def test_without_time_a_plan_still_reaches_its_target() -> None:
    said: list[str] = []
    planned = plan(0.9, seconds=0, says=said.append)
    assert planned.choice.sure_quality >= 0.9
    assert said[-1] == "no more is tried: the time is over"
    assert len([line for line in said if line.startswith("building")]) == 1


def test_the_full_width_alone_may_be_the_cheapest() -> None:
    trials = Scripted({8: 20, 32: K})
    trials.quality = lambda _dim, _effort: 1.0
    trials.seconds = {8: 1.0, 32: 0.9}.__getitem__
    planned = trials.plan([FLAT])
    assert planned is not None
    assert planned.schedule == FunnelSchedule((32,), (), K)


@pytest.mark.parametrize(
    ("needs", "kind", "tried"),
    [
        ({8: 120, 16: 10, 32: 5}, IVF, [8, 16, 32]),
        ({8: 121, 16: 10, 32: 5}, IVF, [16, 32]),  # more than 24 times 5 rows of the last dim
        ({8: 121, 16: 10, 32: 5}, FLAT, [8, 16, 32]),  # which reads every prefix too
        ({8: None, 16: 120, 32: 5}, IVF, [16, 32]),
        ({8: None, 16: 121, 32: 5}, FLAT, [16, 32]),
        ({1: 5, 16: 5, 32: 5}, FLAT, [1, 16]),  # 4160, 64160 and 128160 numbers
    ],
    ids=str,
)
def test_dims_that_read_far_more_than_another_are_left_out(
    needs: dict[int, int | None], kind: FirstStage, tried: list[int]
) -> None:
    trials = Scripted(needs, 4000)
    assert trials.plan([kind]) is None
    assert trials.first_dims == tried


@pytest.mark.parametrize(
    ("num_rows", "inverted_lists"),
    [
        (400, []),
        (21_964, []),
        (21_965, ["IVF512,PQ{}x4fs"]),  # 39 rows for each of 512 lists, a tenth of them to spare
    ],
)
def test_the_kinds_that_are_tried_at_a_prefix_and_at_the_full_width(
    num_rows: int, inverted_lists: list[str]
) -> None:
    """Lists where the gallery can teach them; codes that lose something with rescoring."""
    trials = Scripted({16: K, 32: K}, num_rows)
    trials.quality = lambda _dim, _effort: 0.95
    trials.error = 0.1
    trials.plan(None)
    by_dim: dict[int, dict[str, set[int]]] = {16: {}, 32: {}}
    for factory, _, dims, _ in trials.tried:
        by_dim[dims[0]].setdefault(factory, set()).add(len(dims))
    both = ["Flat", "HNSW32_SQ8", "PQ{}x4fs", *inverted_lists]
    assert list(by_dim[16]) == [factory.format(8) for factory in both]
    assert list(by_dim[32]) == [*(factory.format(16) for factory in both), "HNSW32", "BFlat"]
    assert {factory for factory, stages in by_dim[32].items() if 2 not in stages} == {
        "Flat",
        "HNSW32",
    }


@pytest.mark.parametrize("codes", ["PQ8x4fs", "IVF512,PQ8x4fs"])
def test_near_the_best_bfloat16_and_projections_are_tried(codes: str) -> None:
    """And OPQ, for those codes that were faster behind principal components."""
    trials = Scripted({8: None, 16: None, 32: K}, 21_965)
    trials.projected = {8: 121, 16: 10}  # more than 24 times 5 at 8
    trials.quality = lambda _dim, _effort: 0.95
    fast = {"HNSW32_SQ8": 1.0, f"Projected16,{codes}": 1.9}
    trials.seconds = lambda _dim: fast.get(trials.tried[-1][0], 1.95)
    trials.plan(None)
    factories = list(dict.fromkeys(factory for factory, _, _, _ in trials.tried))
    assert factories[-5:] == [
        "HNSW32_SQbf16",
        "Projected16,HNSW32_SQbf16",
        "Projected16,PQ8x4fs",
        "Projected16,IVF512,PQ8x4fs",
        f"OPQ8_16,{codes}",
    ]


@pytest.mark.parametrize(
    ("seconds", "widest"), [((1.5, 1.4, 1.3), 24), ((1.5, 1.4, 1.45), 24), ((1.4, 1.5, 1.0), 16)]
)
def test_wider_projections_are_tried_while_each_is_faster(
    seconds: tuple[float, ...], widest: int
) -> None:
    trials = Scripted({8: None, 16: None, 24: None, 32: K})
    trials.projected = {8: 10, 16: 10, 24: 10}
    trials.quality = lambda _dim, _effort: 0.95
    fast = {f"Projected{d},PQ{d // 2}x4fs": s for d, s in zip((8, 16, 24), seconds, strict=True)}
    trials.seconds = lambda _dim: fast.get(trials.tried[-1][0], 1.6)
    trials.plan(None)
    tried = {
        int(dim) for name, *_ in trials.tried for dim in re.findall("^Projected([0-9]+)", name)
    }
    assert tried == {dim for dim in (8, 16, 24) if dim <= widest}


@pytest.mark.parametrize(("graph", "is_tried"), [(1.4, True), (1.6, False)])
def test_bfloat16_is_tried_of_a_graph_that_may_win(graph: float, *, is_tried: bool) -> None:
    """Though codes of 4 bits are faster."""
    trials = Scripted({32: K})
    trials.quality = lambda _dim, _effort: 0.95
    fast = {"HNSW32_SQ8": graph, "PQ16x4fs": 1.0}
    trials.seconds = lambda _dim: fast.get(trials.tried[-1][0], 3.0)
    trials.plan(None)
    assert ("HNSW32_SQbf16" in {factory for factory, _, _, _ in trials.tried}) == is_tried


@pytest.mark.parametrize(("seconds", "efforts"), [(2.01, [1]), (2.0, [1, 2, 4, 8])])
def test_what_takes_twice_as_long_as_the_best_is_set_no_harder(
    seconds: float, efforts: list[int]
) -> None:
    """Nor is it given shortlists of more than four times the need."""
    trials = Scripted({8: 20, 32: K})
    trials.quality = lambda _dim, effort: 0.95 if effort == 0 else 0.01 * min(effort, 4)
    trials.seconds = lambda _dim: 1.0 if trials.tried[-1][0] == "Flat" else seconds
    trials.plan([FLAT, IVF])
    at_prefixes = [tried for tried in trials.tried if tried[0] != "Flat" and len(tried[2]) == 2]
    settings = list(dict.fromkeys(settings for _, settings, _, _ in at_prefixes))
    assert settings == [f"nprobe={effort}" for effort in efforts]
    slacks = {shortlists[0] // 20 for _, _, _, shortlists in at_prefixes}
    assert slacks == ({1, 2, 4} if seconds > 2 else {1, 2, 4, 8, 16})


@pytest.mark.parametrize("kind", ["Flat", "PQ16x4fs"])
def test_lists_are_not_tried_where_their_codes_without_lists_find_too_little(kind: str) -> None:
    trials = Scripted({8: 20, 32: K})
    trials.quality = lambda _dim, _effort: 0.95 if trials.tried[-1][3] == (40,) else 0.85
    trials.plan([FirstStage("PQ16x4fs"), FirstStage(f"IVF8,{kind}", "nprobe=1")])
    sizes = {sizes for factory, _, dims, sizes in trials.tried if factory[:3] == "IVF" and dims[1:]}
    assert ((20,) in sizes) == (kind == "Flat")
    assert (40,) in sizes


@pytest.mark.parametrize(("seconds", "is_refined"), [(1.45, True), (1.55, False)])
def test_settings_between_are_tried_of_each_first_stage_that_may_win(
    seconds: float, *, is_refined: bool
) -> None:
    """The best of doubled settings may lose to another between its two last."""
    trials = Scripted({32: K})
    trials.quality = lambda _dim, effort: 0.95 if effort in (0, 12, 14, 16) else 0.02 * effort
    trials.seconds = lambda _dim: {"": 1.0, "nprobe=12": 0.9}.get(trials.tried[-1][1], seconds)
    planned = trials.plan([FLAT, IVF])
    assert planned is not None
    assert planned.first_stage.settings == ("nprobe=12" if is_refined else "")


def test_the_fastest_are_timed_again_in_laps() -> None:
    """Each lap times them one after the other; what counts is the median of its laps."""
    timed: list[str] = []
    seconds = iter([0.0, 0.0, *(1.0, 7.0), *(5.0, 8.0), *(2.0, 9.0), *(3.0, 6.0), *(9.0, 1.0)])

    def timer(index: Any, _queries: Array, _batch: int) -> float:
        timed.append(index.first_stage.settings)
        return next(seconds)

    trials = Trials(GALLERY, QUERIES, 32, K, "cosine", None, None, 1, ignore, timer)
    first = trials.first(32, IVF)
    assert first is not None
    both = [replace(IVF, settings=f"nprobe={effort}") for effort in (1, 2)]
    choices = []
    for spec in both:
        first.set(spec.settings)
        choices.append(trials.measured(first, spec, trials.funnel(32, K)))
    again = trials.timed_again(choices)
    assert [choice.seconds for choice in again] == [3.0, 7.0]
    assert [replace(choice, seconds=0.0) for choice in again] == choices
    assert len(timed) == 2 + 10
    trials.keep([])
    assert trials.timed_again(again) == again
    assert len(timed) == 12


def test_a_machine_that_slows_down_leaves_the_choice_in_its_front() -> None:
    """What was timed before, in quieter times, does not take the place of what was chosen."""

    class Slowing(Recorded):
        def timed_again(self, choices: Any) -> list[Choice]:
            return [replace(choice, seconds=9 * choice.seconds) for choice in choices]

    trials = Slowing(GALLERY, QUERIES, 32, K, "cosine", None, None, 1, ignore, work)
    planned = choose_funnel(trials, 0.9, DIMS, [FLAT, IVF])
    once = [choice.seconds for choice in trials.choices if choice.sure_quality >= 0.9]
    assert min(once) < planned.choice.seconds / 2
    assert planned.choice in planned.front
    assert planned.choice == min(
        (choice for choice in planned.front if choice.sure_quality >= 0.9),
        key=lambda choice: choice.seconds,
    )


@pytest.mark.parametrize(("batch", "clock"), [(1, "thread_time"), (5, "perf_counter")])
def test_single_queries_are_timed_by_their_thread(
    batch: int, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(f"keras_mrl_serving.index.plan.time.{clock}", lambda: float(next(ticks)))
    index: Any = Clocked(lambda _: 0.0)
    assert time_per_query(index, QUERIES, batch) == 1 / batch


@metrics
@pytest.mark.parametrize("dim", [4, 8, 16])
def test_the_shortest_shortlist_is_found_by_lengthening_it(dim: int, metric: str) -> None:
    trials = recorded(metric=metric)
    truth, order = (nearest(QUERIES[:, :d], GALLERY[:, :d], metric) for d in (32, dim))
    sizes = (5, 8, 10, 15, 20, 30, 40, 60, 80, 120, 160, 320)  # 5 times 1, 1.5, 2, 3, ...
    reached = [recalls(order[:, :size], truth[:, :K]) for size in sizes]  # the rest is exact
    lowered = [values.mean() - 1.64 * error_of(values) for values in reached]
    for target in (0.3, 0.6, 0.9, 0.97, 0.997):
        enough = (size for size, least in zip(sizes, lowered, strict=True) if least >= target)
        assert trials.shortest_shortlist(dim, target) == next(enough, None)
    assert trials.shortest_shortlist(dim, 0.998) is None  # the error is 0.0017 at least
    assert trials.shortest_shortlist(32, 0.999) == K


def test_a_shortlist_is_no_longer_than_the_gallery() -> None:
    measured = []

    def measure(neighbors: Array) -> Array:
        measured.append(neighbors)
        return np.full(120, 0.5)

    trials = Trials(GALLERY[:50], QUERIES, 32, K, "l2", measure, np.arange(3), 1, ignore)
    assert trials.shortest_shortlist(8, 0.9) is None
    assert len(measured) == 1 + 8  # the exact answer; and of 5, 8, 10, 15, 20, 30, 40 and 47
    np.testing.assert_array_equal(measured[-1], 3 + nearest(QUERIES, GALLERY[3:50], "l2")[:, :K])
    assert trials.shortest_shortlist(8, 0.4) == K


@pytest.mark.parametrize("dims", [(4, 8, 32), (16, 24), (32,)])
def test_stages_are_of_the_dims_that_are_given(dims: tuple[int, ...]) -> None:
    trials = recorded(dims)
    choose_funnel(trials, 0.9, dims, [FLAT, IVF])
    for choice in trials.choices:
        assert set(choice.schedule.dims) <= set(dims)
        assert choice.schedule.dims[-1] == dims[-1]
        assert choice.first_stage.factory in {"Flat", "IVF8,Flat"}


def test_without_dims_they_are_powers_of_two_and_the_width() -> None:
    gallery, queries = GALLERY[:, :20], QUERIES[:, :20]
    lines: list[str] = []
    planned = plan(0.9, gallery=gallery, queries=queries, says=lines.append)
    assert [line for line in lines if line.startswith("what prefixes")] == [
        "what prefixes of dim 8 can reach",
        "what prefixes of dim 16 can reach",
    ]
    assert planned.schedule.dims[-1] == 20


def test_a_stage_between_is_tried() -> None:
    trials = recorded(k=2)
    choose_funnel(trials, 0.97, DIMS, [FLAT])
    between = [c.schedule for c in trials.choices if len(c.schedule.dims) == 3]
    assert between
    for schedule in between:
        assert schedule.dims == (8, 16, 32)
        assert schedule.shortlists[0] > schedule.shortlists[1] >= schedule.k


def test_a_first_stage_is_set_harder_until_it_is_enough() -> None:
    trials = recorded((32,))
    choose_funnel(trials, 0.97, (32,), [IVF])
    efforts = [choice.first_stage.settings for choice in trials.choices]
    enough = next(n for n, c in enumerate(trials.choices) if c.sure_quality >= 0.97)
    assert efforts[: enough + 1] == [f"nprobe={2**n}" for n in range(enough + 1)]
    assert set(efforts[enough + 1 :]) <= {
        f"nprobe={effort}" for effort in range(2 ** (enough - 1) + 1, 2**enough)
    }
    assert enough > 0


def test_a_kind_that_faiss_cannot_make_is_passed_over_with_a_word() -> None:
    lines: list[str] = []
    nope = FirstStage("Nope", "")
    assert plan(0.9, first_stages=[nope, FLAT], says=lines.append).first_stage == FLAT
    assert any(line.startswith("The first stage must be an index FAISS can make") for line in lines)
    assert lines[0] == "exact neighbours of 120 queries at dim 32"
    assert {
        "what prefixes of dim 8 can reach",
        "building Nope over dim 8",
        "building Flat over dim 8",
    } <= set(lines)


def test_where_faiss_can_make_none_its_reason_is_raised() -> None:
    kinds = [FirstStage("Never", ""), FirstStage("Nope", "")]
    with pytest.raises(ValueError, match=r"Received: 'Nope' for 400 rows of dim 32 ") as caught:
        plan(0.9, first_stages=kinds)
    assert str(caught.value).startswith("The first stage must be an index FAISS can make")


class Clocked:
    """An index whose searches take a scripted time, on the clock that it is."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.searched: list[list[float]] = []

    def search(self, queries: Array) -> Neighbors:
        self.now += self.seconds(len(self.searched))
        self.searched.append(queries[:, 0].tolist())
        shape = (len(queries), 0)
        return Neighbors(np.empty(shape, np.int64), np.empty(shape, np.float32))

    def time(self, queries: Array, batch: int) -> float:
        index: Any = self
        return time_per_query(index, queries, batch, clock=lambda: self.now)


def test_time_is_per_query_and_of_the_middle() -> None:
    """Each search takes 7 ms, but every fifth 900."""
    index = Clocked(lambda turn: 0.9 if turn % 5 == 4 else 0.007)
    assert index.time(QUERIES, 10) == pytest.approx(7e-4)
    assert len(index.searched) == 10  # the second is over


def test_timing_takes_three_searches_at_least_and_300_at_most() -> None:
    slow, quick = Clocked(lambda _: 60.0), Clocked(lambda _: 1e-6)
    assert (slow.time(QUERIES, 1), len(slow.searched)) == (60.0, 3)
    assert quick.time(QUERIES, 1) == pytest.approx(1e-6)
    assert len(quick.searched) == 300


@pytest.mark.parametrize(("batch", "starts"), [(1, range(30)), (7, (0, 7, 14, 21)), (30, (0,))])
def test_time_is_taken_of_batches(batch: int, starts: range | tuple[int, ...]) -> None:
    index = Clocked(lambda _: 1e-6)
    index.time(np.arange(30.0)[:, None], batch)
    assert {len(batch_) for batch_ in index.searched} == {batch}
    assert set(starts) <= {batch_[0] for batch_ in index.searched}
    assert max(map(max, index.searched)) <= 29


@pytest.mark.parametrize("batch", [1, 7, 120])
def test_the_timer_is_given_the_index_the_sample_and_the_batch(batch: int) -> None:
    schedules = []

    def timer(index: Any, queries: Array, size: int) -> float:
        np.testing.assert_array_equal(queries, QUERIES)
        assert size == batch
        schedules.append(index.schedule)
        return float(schedules.index(index.schedule) + 1)  # the first is the fastest

    planned = plan(0.5, batch=batch, first_stages=[FLAT], timer=timer)
    assert (planned.choice.seconds, planned.schedule) == (1.0, schedules[0])


def test_a_plan_times_searches_unless_it_is_given_a_timer() -> None:
    planned = plan_funnel(GALLERY, QUERIES, 0.5, k=K, dims=(32,), first_stages=[FLAT])
    assert planned.choice.seconds > 0


# What is refused, and in which words.

NUMBERS = (
    "A plan needs a target in (0, 1], a k below the gallery's rows, and a sample of at least "
    "30 queries and one batch. Received: target={target!r}, k={k!r}, {rows} "
    "rows, batch={batch!r}, {queries} queries. Give for example target=0.95."
)


def numbers(**changed: Any) -> str:
    defaults = {"target": 0.9, "k": 5, "batch": 1, "queries": 120, "rows": 400}
    return NUMBERS.format(**{**defaults, **changed})


OWN_ROWS = (
    "own_rows must name the gallery row of every query. "
    "Received: {} for 120 queries and 400 rows. Leave it out if the queries are no rows."
)
WIDTH = (
    "The {} must be (rows, width) with a width of at least {}. "
    "Received: shape {}. Embed them at the funnel's last dim, one row each."
)
FEW = np.arange(120)

REFUSALS: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, numbers(**{name: value}))
        for name, values in {
            "target": (0, -0.1, 1.01, float("nan"), "0.9", None),
            "k": (0, 400, 5.0, "5", True),
            "batch": (0, 121, 1.0, None),
        }.items()
        for value in values
    ),
    ({"queries": QUERIES[:0]}, numbers(queries=0)),
    ({"queries": QUERIES[:29]}, numbers(queries=29)),
    # Rows that are queries must leave more than k.
    *(
        (
            {"gallery": GALLERY[:rows], "queries": GALLERY[:120], "own_rows": FEW},
            numbers(rows=rows - 120),
        )
        for rows in (120, 121, 125)
    ),
    *(
        ({"own_rows": rows}, OWN_ROWS.format(received))
        for rows, received in (
            (np.arange(119), "int64 of shape (119,)"),
            (np.arange(120)[:, None], "int64 of shape (120, 1)"),
            (np.arange(120.0), "float64 of shape (120,)"),
            (np.arange(120) > 60, "bool of shape (120,)"),
            (np.arange(120) - 1, "int64 of shape (120,)"),
            (np.arange(281, 401), "int64 of shape (120,)"),
            (np.full(120, 2**63, np.uint64), "uint64 of shape (120,)"),
            ([[1], [2, 3]], "float64 of shape (0,)"),
            (7, "int64 of shape ()"),
        )
    ),
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
    ({"dims": (8, 64)}, WIDTH.format("gallery", 64, (400, 32))),
    ({"queries": QUERIES[:, :16]}, WIDTH.format("queries", 32, (120, 16))),
]


@pytest.mark.parametrize(("changed", "text"), REFUSALS)
def test_a_plan_that_is_refused(changed: dict[str, Any], text: str, refuses: Refuses) -> None:
    with refuses(ValueError, text):
        plan(**changed)


def test_first_stages_are_not_names(refuses: Refuses) -> None:
    names: list[Any] = ["Flat"]
    text = "A first stage is a FirstStage. Received: 'Flat'. "
    text += "Write FirstStage('HNSW32', 'efSearch=64')."
    with refuses(TypeError, text):
        plan(0.9, first_stages=names)


def test_without_a_first_stage_no_funnel_reaches_a_target(refuses: Refuses) -> None:
    text = (
        "A target must be one that some funnel reaches, by more than 1.64 standard errors. "
        "Received: target=0.9; the best that was found: nothing at these dims. "
        "Lower the target, allow wider dims, or give more queries to be surer by."
    )
    with refuses(TargetNotReachedError, text):
        plan(0.9, first_stages=[])


def test_the_least_that_a_plan_takes() -> None:
    planned = plan(0.9, queries=QUERIES[:30], batch=30)
    assert planned.choice.sure_quality >= 0.9
    assert plan(0.01, gallery=GALLERY[:6], first_stages=[FLAT]).schedule.k == 5
    plan(own_rows=np.arange(280, 400))  # the last row is one
    few = {"queries": GALLERY[:120], "own_rows": FEW, "first_stages": [FLAT]}
    assert plan(0.1, gallery=GALLERY[:126], **few).schedule.k == 5
    once = np.minimum(FEW, 60)  # each row is left out once
    plan(0.1, gallery=GALLERY[:125], **{**few, "queries": GALLERY[once], "own_rows": once})


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
        faster: dict[str, Any] = {} if SOAK else {"first_stages": [FLAT, IVF], "timer": work}
        planned = plan_funnel(gallery, queries[mine], target, **faster)
        index = FaissIndex.build(gallery, planned.schedule, first_stage=planned.first_stage)
        reached.append(recalls(index.search(queries[others]).ids, truth[others]).mean())
    assert sum(recall >= target - 0.01 for recall in reached) >= splits - splits // 20, reached
