from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import average_precision_score, precision_score

from keras_mrl.evaluation import mean_average_precision_at_k, precision_at_k
from tests.helpers.laws import exactly

RANDOM = np.random.default_rng(0)
HITS = RANDOM.random((40, 10)) < RANDOM.random((40, 1))
HITS[0], HITS[1] = True, False


def slow_precision(hits: npt.NDArray[Any]) -> float:
    """The share of the k nearest with the query's label, averaged over queries."""
    total = 0.0
    for row in hits:
        total += sum(1 for hit in row if hit) / len(row)
    return total / len(hits)


def slow_average_precision(hits: npt.NDArray[Any]) -> float:
    """The paper's code: precision@i summed over the hits at rank i, over k (not over the hits)."""
    total = 0.0
    for row in hits:
        found, summed = 0, 0.0
        for rank, hit in enumerate(row, start=1):
            if hit:
                found += 1
                summed += found / rank
        total += summed / len(row)
    return total / len(hits)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_both_equal_their_definition_as_a_slow_loop(k: int) -> None:
    assert precision_at_k(HITS[:, :k]) == pytest.approx(slow_precision(HITS[:, :k]), rel=1e-12)
    expected = slow_average_precision(HITS[:, :k])
    assert mean_average_precision_at_k(HITS[:, :k]) == pytest.approx(expected, rel=1e-12)


def test_precision_is_scikit_learns() -> None:
    everything = np.ones(10)
    expected = np.mean([precision_score(row, everything) for row in HITS])
    assert precision_at_k(HITS) == pytest.approx(expected)


def test_map_is_scikit_learns_average_precision_over_k_and_not_over_the_hits() -> None:
    by_rank = -np.arange(10)
    expected = []
    for row in HITS:
        hits = row.sum()
        expected.append(average_precision_score(row, by_rank) * hits / 10 if hits else 0)
    assert mean_average_precision_at_k(HITS) == pytest.approx(np.mean(expected))
    relevant_only = np.mean([average_precision_score(r, by_rank) for r in HITS if r.any()])
    assert mean_average_precision_at_k(HITS) < relevant_only - 0.05  # the other convention


def test_the_two_differ_by_rank_alone() -> None:
    early, late = np.eye(2, 4, dtype=bool)[:1], np.eye(4, dtype=bool)[3:]
    assert precision_at_k(early) == precision_at_k(late) == 0.25
    assert mean_average_precision_at_k(early) == 0.25
    assert mean_average_precision_at_k(late) == 0.0625


@pytest.mark.parametrize("score", [precision_at_k, mean_average_precision_at_k])
def test_all_hits_are_one_and_none_is_zero(score: Any) -> None:
    assert score(np.ones((3, 10), bool)) == 1
    assert score(np.zeros((3, 10), bool)) == 0
    assert score([[1, 1], [0, 0]]) == 0.5
    assert type(score([[1, 0]])) is float


@pytest.mark.parametrize("score", [precision_at_k, mean_average_precision_at_k])
@pytest.mark.parametrize("shape", [(10,), (0, 10), (3, 0), (2, 3, 4), ()])
def test_what_is_no_table_of_hits_is_refused(score: Any, shape: tuple[int, ...]) -> None:
    sentence = (
        "hits must be booleans (queries, k) with at least one query. "
        f"Received: bool of shape {shape}. "
        "Compare labels: gallery_labels[neighbors.ids] == query_labels[:, None]."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score(np.zeros(shape, bool))


@pytest.mark.parametrize("score", [precision_at_k, mean_average_precision_at_k])
def test_ids_are_not_taken_for_hits(score: Any) -> None:
    sentence = (
        "hits must be booleans (queries, k) with at least one query. "
        "Received: int64 of shape (2, 2). "
        "Compare labels: gallery_labels[neighbors.ids] == query_labels[:, None]."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score([[3, 7], [9, 12]])
