"""What `plan_funnel` promises of the funnel it chooses."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.errors import TargetNotReachedError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import FaissIndex, FirstStage, Plan, plan_funnel, planner, trials
from keras_mrl_serving.index.measures import precision_by_label
from keras_mrl_serving.index.plan import Choice, cheapest, front
from tests.serving.index.truth import FLAT, METRICS, Array, Refuses, clusters, true_scores

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
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    if not SOAK:
        monkeypatch.setattr(trials, "_TIMED", 10)  # searches that a choice is timed by


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """Every choice that is measured, its time as the work it is: the same on every machine."""
    seen: list[Choice] = []

    def seconds(_: trials.Trials, index: FaissIndex) -> float:
        schedule, first = index.schedule, index.first_stage
        looked_at = 4 * schedule.dims[0] * (400 if first == FLAT else 60)
        return 1e-9 * (looked_at + sum(map(int, np.multiply(schedule.shortlists, 32))))

    measure = trials.Trials.measured

    def remembered(self: trials.Trials, *args: Any) -> Choice:
        seen.append(measure(self, *args))
        return seen[-1]

    monkeypatch.setattr(trials.Trials, "_seconds", seconds)
    monkeypatch.setattr(trials.Trials, "measured", remembered)
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


@metrics
@pytest.mark.parametrize("target", [0.5, 1.0])
def test_the_index_that_is_planned_reaches_the_target_on_the_sample(
    target: float, metric: str
) -> None:
    found = plan(target, metric=metric)
    index = built(found, metric)
    reached = recalls(index.search(QUERIES).ids, nearest(QUERIES, GALLERY, metric)[:, :K])
    assert reached.mean() - reached.std() / np.sqrt(120) >= target
    np.testing.assert_allclose(found.choice.quality, reached.mean(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.choice.error, reached.std() / np.sqrt(120), rtol=0, atol=1e-12)
    assert found.choice.sure_quality == found.choice.quality - found.choice.error
    assert (found.target, index.plan) == (target, found.to_json())


@metrics
@pytest.mark.parametrize("target", [0.3, 0.97])
def test_the_choice_is_the_fastest_that_reaches_the_target(
    target: float, metric: str, measured: list[Choice]
) -> None:
    found = plan(target, metric=metric)
    reaching = [choice for choice in measured if choice.sure_quality >= target]
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
    qualities = [choice.sure_quality for choice in found.front]
    times = [choice.seconds for choice in found.front]
    assert qualities == sorted(set(qualities))
    assert times == sorted(set(times))
    assert set(found.front) <= set(measured)
    for choice in measured:
        assert any(
            kept.sure_quality >= choice.sure_quality and kept.seconds <= choice.seconds
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


def test_a_target_that_no_funnel_reaches_tells_what_could_be(
    labels: tuple[Array, Array], measured: list[Choice]
) -> None:
    with pytest.raises(TargetNotReachedError) as caught:
        plan(0.9, measure=precision_by_label(*labels))
    assert type(caught.value) is TargetNotReachedError
    best = caught.value.front[-1]
    assert caught.value.front == front(measured)
    assert best.sure_quality == max(choice.sure_quality for choice in measured) < 0.2
    assert str(caught.value) == (
        "A target must be one that some funnel reaches, by more than a standard error. "
        f"Received: target=0.9; the best that was found: {best.line().strip()}. "
        "Lower the target, allow wider dims, or give more queries to be surer by."
    )


def test_a_quality_of_ones_own() -> None:
    """Precision by label, not the exact neighbours: rows that lie to one side are of a kind."""
    measure = precision_by_label(GALLERY[:, 0] > 0, QUERIES[:, 0] > 0)
    found = plan(0.6, measure=measure)
    reached = measure(built(found).search(QUERIES).ids)
    np.testing.assert_allclose(found.choice.quality, reached.mean(), rtol=0, atol=1e-12)
    assert found.choice.sure_quality >= 0.6


@metrics
def test_a_row_never_finds_itself(metric: str) -> None:
    """Of 100 rows, three of which have a copy elsewhere, which is a neighbour like any."""
    gallery = GALLERY.copy()
    gallery[300:303] = gallery[:3]
    seen = []

    def measure(found: Array) -> Array:
        seen.append(found)
        return recalls(found, truth)

    all_ = nearest(gallery[:100], gallery, metric)
    truth = np.array([row[row != own][:K] for own, row in enumerate(all_)])
    found = plan(
        0.9,
        gallery=gallery,
        queries=gallery[:100],
        own_rows=np.arange(100),
        metric=metric,
        measure=measure,
    )
    assert found.schedule.k == K
    assert len(seen) > 5
    for rows in seen:
        assert rows.shape == (100, K)
        assert not (rows == np.arange(100)[:, None]).any()
    if metric != "dot":  # by which a longer row may be nearer than the copy
        assert (seen[-1][:3] == np.arange(300, 303)[:, None]).any(axis=1).all()


@metrics
def test_the_plan_for_rows_counts_the_others_alone(metric: str) -> None:
    found = plan(0.9, queries=GALLERY[:100], own_rows=np.arange(100), metric=metric)
    sizes = tuple(size + 1 for size in found.schedule.shortlists)
    one_more = FunnelSchedule(found.schedule.dims, sizes, K + 1)
    index = FaissIndex.build(GALLERY, one_more, None, metric, first_stage=found.first_stage)
    others, truth = (
        np.array([row[row != own][:K] for own, row in enumerate(rows)])
        for rows in (index.search(GALLERY[:100]).ids, nearest(GALLERY[:100], GALLERY, metric))
    )
    np.testing.assert_allclose(found.choice.quality, recalls(others, truth).mean(), atol=1e-12)


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
    enough = next(n for n, choice in enumerate(measured) if choice.sure_quality >= 0.97)
    assert efforts[: enough + 1] == [f"nprobe={2**n}" for n in range(enough + 1)]
    assert set(efforts) == set(efforts[: enough + 1])
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
    [(39, ["Flat", "HNSW32_SQ8"]), (6, ["Flat", "HNSW32_SQ8", "IVF64,Flat"])],
)
def test_lists_are_tried_where_the_gallery_can_teach_them(
    per_centroid: int, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(planner, "_PER_CENTROID", per_centroid)
    plan(0.5, first_stages=None, dims=(16,), says=said.append)
    assert [word for word in said if word.startswith("building")] == [
        f"building {kind} over dim 16" for kind in kinds
    ]


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
    monkeypatch.setattr("keras_mrl_serving.index.trials.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr(trials, "_LONGEST_S", 1e9)
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
    assert header == "  quality    per query  funnel"
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
    ],
    ids=str,
)
def test_a_plan_needs_a_target_a_k_and_a_sample(changed: Any, refuses: Refuses) -> None:
    given = {"target": 0.9, "k": 5, "batch": 1, "queries": QUERIES, **changed}
    text = (
        "A plan needs a target in (0, 1], a k below the gallery's rows, and a sample of at least "
        f"one batch of queries. Received: target={given['target']}, k={given['k']}, 400 rows, "
        f"batch={given['batch']}, {len(given['queries'])} queries. Give for example target=0.95."
    )
    with refuses(ValueError, text):
        plan(**changed)


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
            "The queries must be (rows, width) with a width of at least 64. "
            "Received: shape (120, 32). Embed them at the funnel's last dim, one row each.",
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
