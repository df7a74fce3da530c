"""Measures beside loops that say what they mean; fronts, tables and JSON of plans by hand."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.errors import ManifestError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index.plan import (
    Choice,
    Plan,
    average_precision_by_label,
    cheapest,
    front,
    precision_by_label,
    recall_against,
)
from tests.helpers.galleries import FLAT, Array


@st.composite
def answers(draw: st.DrawFn) -> tuple[Array, Array, Array, Array]:
    """Neighbours, the true ones, labels of the gallery and of the queries."""
    rows, queries = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    k = draw(st.integers(1, rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    neighbors, truth = (np.array([rng.permutation(rows)[:k] for _ in range(queries)]) for _ in "ft")
    return neighbors, truth, rng.integers(0, 3, rows), rng.integers(0, 3, queries)


@given(answers())
def test_recall_is_the_share_of_the_true_neighbours_found(answer: tuple[Array, ...]) -> None:
    neighbors, truth, _, _ = answer
    expected = [len(set(f) & set(t)) / len(t) for f, t in zip(neighbors, truth, strict=True)]
    measured = recall_against(truth)(neighbors)
    assert measured.dtype == np.float64
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)
    assert (recall_against(truth)(truth[:, ::-1]) == 1).all()


@given(answers())
def test_precision_is_the_share_of_neighbours_with_the_label(answer: tuple[Array, ...]) -> None:
    neighbors, _, gallery_labels, query_labels = answer
    expected = [
        np.mean([gallery_labels[row] == label for row in rows])
        for rows, label in zip(neighbors, query_labels, strict=True)
    ]
    measured = precision_by_label(gallery_labels.tolist(), query_labels.tolist())(neighbors)
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)


@given(answers())
def test_average_precision_is_the_precision_at_every_hit_over_k(answer: tuple[Array, ...]) -> None:
    neighbors, _, gallery_labels, query_labels = answer
    expected = []
    for rows, label in zip(neighbors, query_labels, strict=True):
        hits, total = 0, 0.0
        for rank, neighbour in enumerate(rows, start=1):
            if gallery_labels[neighbour] == label:
                hits += 1
                total += hits / rank
        expected.append(total / len(rows))
    measured = average_precision_by_label(gallery_labels, query_labels)(neighbors)
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)


def test_labels_may_be_names() -> None:
    names = ["lynx", "ibex", "lynx"]
    neighbors = np.array([[0, 1, 2]])
    assert precision_by_label(names, ["lynx"])(neighbors).tolist() == [2 / 3]
    assert average_precision_by_label(names, ["lynx"])(neighbors).tolist() == [(1 + 2 / 3) / 3]


def choice(quality: float, seconds: float, error: float = 0.0) -> Choice:
    return Choice(FLAT, FunnelSchedule((8, 32), (40,), 5), quality, error, seconds)


GOOD, FAST, SURE = choice(0.9, 2.0), choice(0.5, 1.0), choice(0.95, 3.0, 0.01)
DOUBTFUL, SLOW = choice(0.94, 3.5, 0.02), choice(0.8, 2.5)


def test_a_front_by_hand() -> None:
    twin = choice(0.9, 2.0)
    assert front([SLOW, GOOD, DOUBTFUL, twin, SURE, FAST]) == (FAST, GOOD, SURE)
    unsure = choice(0.96, 2.9, 0.03)  # surely 0.91: less than SURE, though it looks better
    assert front([SURE, GOOD, unsure]) == (GOOD, unsure, SURE)
    assert front([]) == ()


def test_the_cheapest_by_hand() -> None:
    assert cheapest([SLOW, GOOD, DOUBTFUL, SURE, FAST], 0.85) == GOOD
    assert cheapest([SLOW, GOOD, DOUBTFUL, SURE, FAST], 0.91) == SURE
    assert cheapest([SLOW, GOOD, DOUBTFUL], 0.93) is None  # 0.94, give or take 0.02


PLAN = Plan(GOOD, 0.85, (FAST, GOOD, SURE))


def test_a_table_marks_the_choice() -> None:
    assert PLAN.table().splitlines() == [
        "quality +- error     per query  funnel",
        FAST.line(),
        f"{GOOD.line()}   <- chosen",
        SURE.line(),
    ]


def test_a_plan_is_json_and_comes_back() -> None:
    written = PLAN.to_json()
    assert written["target"] == 0.85
    assert written["front"] == [choice.to_json() for choice in PLAN.front]
    assert FunnelSchedule.from_json(written["schedule"]) == PLAN.schedule
    assert (written["factory"], written["settings"]) == ("Flat", "")
    awkward = choice(0.123456, 1.23456789e-5, error=0.0143496)  # rounded twice, it is 0.0144
    assert Choice.from_json(json.loads(json.dumps(awkward.to_json()))).line() == awkward.line()
    assert Plan.from_json(json.loads(json.dumps(written))) == PLAN


@pytest.mark.parametrize(
    "broken",
    [{}, {"front": []}, {**PLAN.to_json(), "front": [{}]}, {**PLAN.to_json(), "front": None}],
)
def test_a_plan_that_cannot_be_read(broken: Any) -> None:
    with pytest.raises(ManifestError, match=r"^A plan names its funnels, and what was measured "):
        Plan.from_json(broken)
