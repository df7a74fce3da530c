"""The measures beside loops that say what they mean."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.index.plan import (
    average_precision_by_label,
    precision_by_label,
    recall_against,
)
from tests.helpers.galleries import Array


@st.composite
def answers(draw: st.DrawFn) -> tuple[Array, Array, Array, Array]:
    """Rows found, the true ones, labels of the gallery and of the queries."""
    rows, queries = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    k = draw(st.integers(1, rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found, truth = (np.array([rng.permutation(rows)[:k] for _ in range(queries)]) for _ in "ft")
    return found, truth, rng.integers(0, 3, rows), rng.integers(0, 3, queries)


@given(answers())
def test_recall_is_the_share_of_the_true_neighbours_found(answer: tuple[Array, ...]) -> None:
    found, truth, _, _ = answer
    expected = [len(set(f) & set(t)) / len(t) for f, t in zip(found, truth, strict=True)]
    measured = recall_against(truth)(found)
    assert measured.dtype == np.float64
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)
    assert (recall_against(truth)(truth[:, ::-1]) == 1).all()


@given(answers())
def test_precision_is_the_share_of_neighbours_with_the_label(answer: tuple[Array, ...]) -> None:
    found, _, have, want = answer
    expected = [np.mean([have[r] == w for r in f]) for f, w in zip(found, want, strict=True)]
    measured = precision_by_label(have.tolist(), want.tolist())(found)
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)


@given(answers())
def test_average_precision_is_the_precision_at_every_hit_over_k(answer: tuple[Array, ...]) -> None:
    found, _, have, want = answer
    expected = []
    for row, wanted in zip(found, want, strict=True):
        hits, total = 0, 0.0
        for rank, neighbour in enumerate(row, start=1):
            if have[neighbour] == wanted:
                hits += 1
                total += hits / rank
        expected.append(total / len(row))
    measured = average_precision_by_label(have, want)(found)
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)


def test_labels_may_be_names() -> None:
    names = ["lynx", "ibex", "lynx"]
    found = np.array([[0, 1, 2]])
    assert precision_by_label(names, ["lynx"])(found).tolist() == [2 / 3]
    assert average_precision_by_label(names, ["lynx"])(found).tolist() == [(1 + 2 / 3) / 3]
