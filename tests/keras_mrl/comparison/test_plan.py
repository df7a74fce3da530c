"""Plans of a comparison: kept as they were made, and fitted to a budget."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest

from keras_mrl.comparison.data import ComparisonError, Part
from keras_mrl.comparison.nets import Net
from keras_mrl.comparison.plan import Plan, Speed, fit_to_budget, load_or_make_plan, subset
from keras_mrl.comparison.splits import digests
from tests.helpers.comparisons import random_images

PLAN = Plan(dims=(4, 8), epochs=3, filters=8, flip=False, rows=60)


def test_a_comparison_goes_on_as_it_was_asked_for(tmp_path: Path) -> None:
    path, wishes = tmp_path / "plan.json", {"epochs": 3, "dims": [4, 8]}
    assert load_or_make_plan(path, wishes, lambda: PLAN) == PLAN

    def never() -> Plan:
        raise AssertionError

    assert load_or_make_plan(path, wishes, never) == PLAN
    with pytest.raises(ComparisonError, match=r"Received: epochs=4 after 3\. "):
        load_or_make_plan(path, {**wishes, "epochs": 4}, never)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ComparisonError, match="which is damaged"):
        load_or_make_plan(path, wishes, never)


def fit(plan: Plan, seconds: float, measure: Callable[[Net, int], Speed]) -> Plan:
    """The plan for 600 images of two classes, on a clock that stands still."""
    return fit_to_budget(plan, random_images(600, 2), seconds, measure, clock=lambda: 0.0)


@pytest.mark.parametrize(
    ("seconds", "filters", "epochs", "seeds", "variants"),
    [(10_000, 64, 30, 3, True), (540, 64, 30, 2, True), (60, 32, 9, 1, True), (7, 8, 6, 1, False)],
)
def test_a_budget_takes_the_largest_net_that_has_time(
    seconds: float, filters: int, epochs: int, seeds: int, variants: bool
) -> None:
    plan = fit(PLAN, seconds, lambda _, filters: Speed(32_000 / filters, 0.0))
    found = (plan.filters, plan.epochs, plan.seeds, plan.rows, plan.variants)
    assert found == (filters, epochs, seeds, 600, variants)
    costs = sum(0.5 if net.half else 2.2 if net.method == "slimmable" else 1 for net in plan.nets)
    assert costs * epochs * 600 / (32_000 / filters) <= 0.8 * seconds


def test_seeds_that_are_asked_for_stay() -> None:
    asked = replace(PLAN, seeds=4)
    assert fit(asked, 10_000, lambda *_: Speed(4_000, 0.0)).seeds == 4


def test_a_budget_that_building_the_nets_uses_up_is_refused_with_one_that_would_do() -> None:
    """Rows are never left out to pay for compiling: fewer rows compile no faster."""
    sentence = r"Received: 0\.5 minutes for 7 nets, each of which takes 20 s"
    with pytest.raises(ComparisonError, match=sentence) as info:
        fit(PLAN, 30, lambda *_: Speed(1000, 20.0))
    minutes = int(re.findall(r"Give (\d+) minutes", str(info.value))[0])
    plan = fit(PLAN, 60 * minutes, lambda *_: Speed(1000, 20.0))
    assert plan.epochs >= 6
    assert plan.rows == 600


def test_rows_are_left_out_where_there_are_thousands() -> None:
    many = random_images(20_000, 2)
    plan = fit_to_budget(PLAN, many, 100, lambda *_: Speed(1000, 0.1), clock=lambda: 0.0)
    assert 2_000 <= plan.rows < 20_000
    assert (plan.epochs, plan.variants) == (6, False)


def test_measuring_stops_where_the_next_net_would_find_no_time() -> None:
    measured: list[tuple[str, int]] = []

    def measure(net: Net, filters: int) -> Speed:
        measured.append((net.method, filters))
        return Speed(4_000 * 8 / filters, 0.0)

    assert fit(PLAN, 20, measure).filters == 16
    assert measured == [("ff", 8), ("mrl", 8), ("mrl", 16)]


def test_what_the_first_net_of_a_process_takes_to_start_does_not_count() -> None:
    speeds = chain([Speed(4_000, 60.0)], repeat(Speed(4_000, 0.0)))
    assert fit(PLAN, 40, lambda *_: next(speeds)) == fit(PLAN, 40, lambda *_: Speed(4_000, 0.0))


@pytest.mark.parametrize("separate", [3_000, 12_000])
def test_separate_nets_cost_what_they_take(separate: float) -> None:
    """They are not counted as dear as the nested one, nor ever dearer."""

    def measure(net: Net, _: int) -> Speed:
        return Speed(separate if net.method == "ff" else 4_000, 0.0)

    embeddings = Part(np.zeros((600, 4), np.float32), np.arange(600) % 2, ("a", "b"))
    plan = fit_to_budget(PLAN, embeddings, 30, measure, clock=lambda: 0.0)
    cost = {"slimmable": 2.2, "ff": min(1, 4_000 / separate)}
    costs = sum((0.5 if net.half else 1) * cost.get(net.method, 1) for net in plan.nets)
    assert plan.epochs == int(0.8 * 30 * 4_000 / costs / 600)


def test_with_more_filters_a_separate_net_costs_as_much_as_the_nested_one() -> None:
    def measure(net: Net, filters: int) -> Speed:
        return Speed(8e9 if net.method == "ff" else 32_000 / filters, 0.0)

    assert fit(PLAN, 60, measure) == fit(PLAN, 60, lambda _, filters: Speed(32_000 / filters, 0.0))


def test_measuring_is_paid_from_the_budget() -> None:
    free = fit(PLAN, 40, lambda *_: Speed(4_000, 0.0))
    seconds = chain([0.0], repeat(15.0))
    images = random_images(600, 2)
    plan = fit_to_budget(PLAN, images, 40, lambda *_: Speed(4_000, 0.0), lambda: next(seconds))
    assert plan.epochs < free.epochs


def test_time_to_start_a_net_is_not_time_to_train_it() -> None:
    quick = fit(PLAN, 300, lambda *_: Speed(500, 0.0))
    slow = fit(PLAN, 300, lambda *_: Speed(500, 10.0))
    assert slow.epochs * slow.rows < 0.8 * quick.epochs * quick.rows


def test_a_budget_counts_the_nets_that_do_not_see_all() -> None:
    plan = replace(PLAN, unseen=True)
    assert len(plan.nets) == len(PLAN.nets) + 1 + len(PLAN.dims)
    fitted = fit(plan, 60, lambda *_: Speed(1_000, 0.0))
    assert fitted.epochs * fitted.rows < fit(PLAN, 60, lambda *_: Speed(1_000, 0.0)).epochs * 600


def test_fewer_images_are_a_share_of_every_class() -> None:
    images = random_images(90)
    some = subset(images, 30)
    assert np.bincount(some.labels).tolist() == [10, 10, 10]
    assert set(digests(some)) <= set(digests(images))
    assert subset(images, 90) is images
