"""How cosines agree with grades, beside SciPy."""

from typing import Any

import keras
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from keras_mrl import ContrastiveLoss, MatryoshkaEncoder, split
from keras_mrl.evaluation import evaluate_retrieval, evaluate_similarity, score_similarity
from tests.helpers.laws import exactly
from tests.helpers.nested_models import two_heads

RNG = np.random.default_rng(0)
DIMS = (1, 4, 16)
FIRST = RNG.normal(size=(9000, 16)).astype(np.float32)  # two blocks of pairs
GRADES = RNG.integers(0, 6, 9000)
SECOND = (FIRST + (6 - GRADES[:, None]) * RNG.normal(size=FIRST.shape)).astype(np.float32)
SECOND[::50] = FIRST[::50]  # cosines of 1, all of one rank


def test_both_correlations_are_scipys() -> None:
    quality = score_similarity(FIRST, SECOND, GRADES, DIMS)
    for dim in DIMS:
        one, other = (side[:, :dim].astype(np.float64) for side in (FIRST, SECOND))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosines = ((one * other).sum(axis=1) / lengths).astype(np.float32)
        expected = {
            "spearman": spearmanr(cosines, GRADES).statistic,
            "pearson": pearsonr(cosines.astype(np.float64), GRADES).statistic,
        }
        assert quality[dim] == pytest.approx(expected, abs=1e-7)
    assert quality[16]["spearman"] > quality[1]["spearman"] > 0.1


def test_equal_pairs_share_a_rank_whatever_their_length() -> None:
    """In float64 the cosines of equal rows differ from 1, and from each other, in the last bit."""
    rows = RNG.normal(size=(500, 16))
    grades = np.arange(500) % 2
    both = np.where(grades[:, None] == 1, rows, -rows)
    assert score_similarity(rows, both, grades, (16,))[16]["spearman"] == pytest.approx(1)


def test_a_dim_that_is_the_same_everywhere_orders_nothing() -> None:
    first, second = FIRST.copy(), SECOND.copy()
    first[:, 0] = second[:, 0] = 1
    assert score_similarity(first, second, GRADES, (1, 4))[1] == {"spearman": 0, "pearson": 0}


@pytest.mark.backend
def test_the_second_side_goes_through_the_other_tower() -> None:
    left = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    right = keras.Sequential([keras.Input((15,)), keras.layers.Dense(8)])
    second, grades = SECOND[:200, 1:], GRADES[:200, None]
    encoder = MatryoshkaEncoder(left, right)
    encoder.compile("sgd", ContrastiveLoss(dims=(4, 8)))
    quality = evaluate_similarity(encoder, FIRST[:200], second, grades, verbose=0)
    sides = left.predict(FIRST[:200], verbose=0), right.predict(second, verbose=0)
    for dim, measures in score_similarity(*sides, GRADES[:200], (4, 8)).items():
        assert quality[dim] == pytest.approx(measures)


TRUTH = "grades must be finite numbers, one per pair, at least two of them different. Received: "
STS = "Give for example those of STS, from 0 to 5."
WRONG: dict[str, tuple[Any, Any, str]] = {
    "too few grades": (
        SECOND[:5],
        [0, 1],
        f"{TRUTH}an array of shape (2,) with 2 different values for 5 pairs. {STS}",
    ),
    "one grade": (
        SECOND[:5],
        [3] * 5,
        f"{TRUTH}an array of shape (5,) with 1 different values for 5 pairs. {STS}",
    ),
    "no number": (
        SECOND[:5],
        [1, 2, 3, 4, np.nan],
        f"{TRUTH}an array of shape (5,) with 5 different values for 5 pairs. {STS}",
    ),
    "sides of two lengths": (
        SECOND[:6],
        [1, 2, 3, 4, 5],
        "Both sides of the pairs must have as many rows. Received: 5 and 6. "
        "Row i of one is paired with row i of the other.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_pairs_that_do_not_fit_are_refused(case: str) -> None:
    second, grades, sentence = WRONG[case]
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    with pytest.raises(ValueError, match=exactly(sentence)):
        evaluate_similarity(model, FIRST[:5], second, grades, (4, 8), verbose=0)
    if len(second) == 5:
        with pytest.raises(ValueError, match=exactly(sentence)):
            score_similarity(FIRST[:5], second, grades, DIMS)


def test_sides_of_two_widths_are_refused() -> None:
    sentence = (
        "Both sides of the pairs must be of one shape. Received: (9000, 16) and (9000, 4). "
        "Row i of one is paired with row i of the other: embed both with models of one width."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_similarity(FIRST, SECOND[:, :4], GRADES, (1, 4))


def test_one_of_several_outputs_is_judged() -> None:
    model = two_heads()
    features, _ = split(model, "odd")
    first, second = RNG.normal(size=(2, 30, 5)).astype(np.float32)
    grades, qrels = np.arange(30), {row: {row} for row in range(30)}
    judged = evaluate_similarity(model, first, second, grades, output="odd", verbose=0)
    assert judged == evaluate_similarity(features, first, second, grades, (2, 4, 8), verbose=0)
    found = evaluate_retrieval(model, first, second, qrels, output="odd", verbose=0)
    assert found == evaluate_retrieval(features, first, second, qrels, dims=(2, 4, 8), verbose=0)
    assert judged.output == found.output == "odd"
    with pytest.raises(ValueError, match=r"Give for example output='digit'\."):
        evaluate_similarity(model, first, second, grades, verbose=0)
