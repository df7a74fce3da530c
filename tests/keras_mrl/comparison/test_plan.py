"""Plans of a comparison: kept as they were made, and fitted to a budget."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keras_mrl.comparison.data import ComparisonError
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


def fit(plan: Plan, seconds: float, measure: Callable[[int], Speed]) -> Plan:
    """The plan for 600 images of two classes, on a clock that stands still."""
    return fit_to_budget(plan, random_images(600, 2), seconds, measure, clock=lambda: 0.0)


@pytest.mark.parametrize(
    ("seconds", "filters", "epochs", "rows"),
    [(10_000, 64, 30, 600), (60, 32, 11, 600), (2, 8, 6, 148)],
)
def test_a_budget_takes_the_largest_net_that_has_time(
    seconds: float, filters: int, epochs: int, rows: int
) -> None:
    plan = fit(PLAN, seconds, lambda filters: Speed(32_000 / filters, 0.0))
    assert plan == replace(PLAN, filters=filters, epochs=epochs, rows=rows)
    costs = len(PLAN.nets) - 1 + 2.2
    assert costs * epochs * rows / (32_000 / filters) <= 0.8 * seconds


def test_a_budget_without_room_leaves_some_images_of_every_class() -> None:
    plan = fit(PLAN, 0.1, lambda _: Speed(1000, 1.0))
    assert plan == replace(PLAN, filters=8, epochs=6, rows=20)


def test_measuring_stops_where_the_next_net_would_find_no_time() -> None:
    measured: list[int] = []

    def measure(filters: int) -> Speed:
        measured.append(filters)
        return Speed(4_000 * 8 / filters, 0.0)

    assert fit(PLAN, 20, measure).filters == 16
    assert measured == [8, 16]


def test_measuring_is_paid_from_the_budget() -> None:
    seconds = iter([0.0, 15.0])
    images = random_images(600, 2)
    plan = fit_to_budget(PLAN, images, 20, lambda _: Speed(4_000, 0.0), lambda: next(seconds))
    assert (plan.filters, plan.epochs) == (8, 6)
    assert plan.rows == int(4_000 * 1.0 / (len(PLAN.nets) - 1 + 2.2) / 6)


def test_time_to_start_a_net_is_not_time_to_train_it() -> None:
    quick = fit(PLAN, 60, lambda _: Speed(500, 0.0))
    slow = fit(PLAN, 60, lambda _: Speed(500, 3.0))
    assert slow.epochs * slow.rows < 0.8 * quick.epochs * quick.rows


def test_a_budget_counts_the_nets_that_do_not_see_all() -> None:
    plan = replace(PLAN, unseen=True)
    assert len(plan.nets) == len(PLAN.nets) + 1 + len(PLAN.dims)
    fitted = fit(plan, 10, lambda _: Speed(1_000, 0.0))
    costs = len(PLAN.nets) - 1 + 2.2 + 0.8 * (1 + len(PLAN.dims))
    assert fitted.rows == int(0.8 * 10 * 1_000 / costs / fitted.epochs)


def test_fewer_images_are_a_share_of_every_class() -> None:
    images = random_images(90)
    some = subset(images, 30)
    assert np.bincount(some.labels).tolist() == [10, 10, 10]
    assert set(digests(some)) <= set(digests(images))
    assert subset(images, 90) is images
