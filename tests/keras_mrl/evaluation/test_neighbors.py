"""Exact search: what is nearest, and which of rows as near."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl.evaluation import neighbors as neighbors_module
from keras_mrl.evaluation.neighbors import count_blocks, nearest_hits, nearest_ids
from tests.helpers.laws import exactly

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rows", [10, 11, 700, 5000])
def test_nearest_rows_do_not_depend_on_the_blocks(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery, queries = RNG.normal(size=(rows, 12)), RNG.normal(size=(33, 12))
    whole = nearest_ids(gallery, queries, 8, 10)
    unit = gallery[:, :8] / np.linalg.norm(gallery[:, :8], axis=1, keepdims=True)
    np.testing.assert_array_equal(whole, np.argsort(-(queries[:, :8] @ unit.T), axis=1)[:, :10])
    monkeypatch.setattr(neighbors_module, "_ROWS", 7)
    monkeypatch.setattr(neighbors_module, "_QUERIES", 5)
    np.testing.assert_array_equal(nearest_ids(gallery, queries, 8, 10), whole)


def ranked(gallery: npt.NDArray[Any], queries: npt.NDArray[Any], dim: int, k: int) -> Any:
    """By a score per row that does not depend on where it stands, then by position."""
    cut = gallery[:, :dim].astype(np.float64)
    scores = (queries[:, None, :dim] * cut).sum(axis=-1) / np.linalg.norm(cut, axis=1)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def apart(rows: int, width: int, dim: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows at angles so different that no rounding takes one for another, and 300 queries."""
    axis = RNG.normal(size=dim)
    axis /= np.linalg.norm(axis)
    side = RNG.normal(size=(rows, dim))
    side -= (side @ axis)[:, None] * axis
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    angles = RNG.permutation(np.linspace(0.3, 1.4, rows))[:, None]
    cut = RNG.uniform(1, 3, (rows, 1)) * (np.cos(angles) * axis + np.sin(angles) * side)
    rest = RNG.normal(size=(rows, width - dim))
    queries = np.zeros((300, width))
    queries[:, :dim] = axis + 1e-4 * RNG.normal(size=(300, dim))
    return np.concatenate([cut, rest], axis=1).astype(np.float32), queries


@pytest.mark.parametrize("rows", [7, 23, 61, 300, 9000])
@pytest.mark.parametrize("block", [5, 8192])
def test_of_equal_rows_the_earlier_is_nearer(
    rows: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix product gives equal rows values that differ in the last bit."""
    monkeypatch.setattr(neighbors_module, "_ROWS", block)
    gallery = np.tile(RNG.normal(size=(1, 129)), (rows, 1))
    queries = RNG.normal(size=(20, 129))
    for part in (queries, *queries[:, None], queries[:3]):
        assert nearest_ids(gallery, part, 129, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * len(part)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize(("width", "dim"), [(64, 64), (64, 5), (200, 129)])
def test_copies_come_in_the_order_they_stand_in(
    k: int, width: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors_module, "_ROWS", 61)
    rows, queries = apart(50, width, dim)
    twice = np.concatenate([rows, rows])
    mixed = rows[RNG.integers(0, 50, 400)]
    for gallery in (twice, mixed):
        np.testing.assert_array_equal(
            nearest_ids(gallery, queries, dim, k), ranked(gallery, queries, dim, k)
        )


def test_a_row_is_its_own_copy_up_to_the_dim_alone() -> None:
    gallery = np.array([[3, 4, 0], [3, 4, 9], [-0.0, 1, 0], [0.0, 1, 5]], np.float32)
    queries = np.array([[3, 4, 9], [0, 1, 5]], np.float32)
    assert nearest_ids(gallery, queries, 2, 2).tolist() == [[0, 1], [2, 3]]
    assert nearest_ids(gallery, queries, 3, 1).tolist() == [[1], [3]]


@pytest.mark.parametrize("block", [7, 8192])
def test_of_equal_scores_the_earlier_is_nearer(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different rows with exact products; copies of some stand between them."""
    monkeypatch.setattr(neighbors_module, "_ROWS", block)
    rows = np.array([[1, y, z] for y in (4, -4) for z in range(-40, 40)], np.float32)
    gallery = np.concatenate([rows, rows[::3], rows])
    queries = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0]], np.float32)
    lengths = np.linalg.norm(gallery, axis=1)
    scores = queries @ gallery.T / lengths
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :30]
    np.testing.assert_array_equal(nearest_ids(gallery, queries, 3, 30), expected)


@pytest.mark.parametrize("copies", [1, 3])
def test_progress_is_told_of_every_block(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors_module, "_ROWS", 8)
    gallery, told = np.tile(RNG.normal(size=(11, 4)), (copies, 1)), []
    nearest_ids(gallery, gallery, 4, 5, lambda: told.append(1))
    assert len(told) == count_blocks(len(gallery)) == (2, 0, 5)[copies - 1]


def test_k_is_an_integer_of_any_library() -> None:
    gallery = RNG.normal(size=(30, 4))
    found = nearest_ids(gallery, gallery, 4, np.int64(5))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, nearest_ids(gallery, gallery, 4, 5))


def test_labels_of_two_kinds_are_refused() -> None:
    rows, names = np.eye(3), np.array(["a", "b", "c"])
    sentence = (
        "Labels of queries and gallery must be of one kind. "
        "Received: strings for the queries, numbers for the gallery. "
        "Name the classes alike on both sides, best by integers."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        nearest_hits(rows, [0, 1, 2], rows, names, 3, 1)
    assert nearest_hits(rows, names, rows, names.astype(object), 3, 1).all()
