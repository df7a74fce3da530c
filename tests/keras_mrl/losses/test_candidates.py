"""What is known of the candidates of a batch: accidental hits, repeats, sampling probabilities."""

from typing import Any

import numpy as np
import pytest

from keras_mrl import ContrastiveLoss
from tests.helpers.differentiate import value
from tests.helpers.embedding_rows import (
    DIMS,
    WIDTH,
    embeddings,
    equals_the_loop,
    of,
    rows_and_gradient,
)
from tests.helpers.laws import exactly
from tests.helpers.loss_reference import contrastive

pytestmark = pytest.mark.backend

WEIGHTS = (2.0, 1.0, 0.5)
TEMPERATURE = 0.3
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 2])
IDS = np.array([[7, 3], [4, 4], [7, 9], [0, 7], [4, 8], [7, 6], [1, 2**31 - 1]])
CHANCES = np.array([[0.5, 2], [1, 1], [0.5, 0.25], [3, 0.5], [1, 0.1], [0.5, 1e-7], [1, 2]])


@pytest.mark.parametrize(
    ("ids", "chances", "sides", "symmetric", "chunk_size"),
    [
        (IDS, None, 2, True, None),
        (IDS, None, 3, True, 3),
        (None, CHANCES, 2, True, 3),
        (None, CHANCES, 3, False, None),
        (IDS, CHANCES, 3, True, None),
        (IDS, CHANCES, 2, False, 3),
    ],
)
def test_known_candidates_equal_the_loop_in_value_and_gradient(
    ids: Any, chances: Any, sides: int, symmetric: bool, chunk_size: int | None
) -> None:
    loss = ContrastiveLoss(
        DIMS, WEIGHTS, temperature=TEMPERATURE, symmetric=symmetric, chunk_size=chunk_size
    )
    ids, chances = (None if known is None else known[:, : sides - 1] for known in (ids, chances))
    known = {"candidate_ids": ids, "candidate_sampling_probability": chances}
    equals_the_loop(
        loss,
        {name: values for name, values in known.items() if values is not None},
        embeddings(7, sides),
        lambda rows: contrastive(rows, DIMS, WEIGHTS, TEMPERATURE, symmetric, ids, chances),
    )


@pytest.mark.parametrize(
    ("sides", "chunk_size", "symmetric"), [(2, None, True), (4, None, False), (4, 5, True)]
)
def test_pairs_that_stand_twice_have_the_loss_of_the_batch_in_which_they_stand_once(
    sides: int, chunk_size: int | None, symmetric: bool
) -> None:
    loss = ContrastiveLoss(
        DIMS, temperature=TEMPERATURE, symmetric=symmetric, chunk_size=chunk_size
    )
    once, ids = embeddings(5, sides), np.arange(5 * (sides - 1)).reshape(5, -1)
    places = np.array([0, 1, 2, 3, 4, 0, 0, 3, 1])  # one pair stands three times, two stand twice
    losses, gradient = rows_and_gradient(loss, None, once)

    def rows(embeddings: Any, all_ids: Any) -> Any:
        return loss.call(all_ids, embeddings), loss.call(None, embeddings)

    received, without_ids = value(rows, once[places], ids[places])
    np.testing.assert_allclose(received, losses[places], rtol=1e-5, atol=2e-5)
    assert (without_ids > received + 0.1).all()

    all_twice = np.concatenate([np.arange(5)] * 2)
    _, spread = rows_and_gradient(loss, ids[all_twice], once[all_twice])
    np.testing.assert_allclose(spread[:5] + spread[5:], 2 * gradient, rtol=1e-4, atol=1e-4)


@CHUNKS
def test_a_batch_of_one_candidate_has_no_negatives_and_so_no_loss(chunk_size: int | None) -> None:
    loss = ContrastiveLoss(DIMS, symmetric=True, chunk_size=chunk_size)
    alike = np.ones((2, 2, WIDTH), "float32")
    assert of(loss, None, alike) == pytest.approx(3 * np.log(2), rel=1e-5)
    assert of(loss, np.array([8, 8]), alike) == pytest.approx(0, abs=1e-5)


@CHUNKS
def test_another_copy_of_the_positive_is_no_miss_and_frequencies_decide_no_hit(
    chunk_size: int | None,
) -> None:
    anchors = np.array([[1, 0], [0, 1], [1, 0.1]], "float32")
    positives = np.array([[1, 0.2], [0.1, 1], [1, 0.1]], "float32")
    pairs = np.stack([anchors, positives], axis=1)
    loss = ContrastiveLoss((2,), chunk_size=chunk_size)

    def hits(rows: Any, ids: Any, chances: Any) -> Any:
        known = {"candidate_ids": ids, "candidate_sampling_probability": chances}
        return loss.measure(None, rows)[1], loss.measure(ids, rows)[1], loss.measure(known, rows)[1]

    ids, chances = np.array([5, 6, 5]), np.array([1e9, 1.0, 1e9])
    without, with_ids, with_chances = value(hits, pairs, ids, chances)
    np.testing.assert_array_equal(without, [[0, 1, 1]])
    np.testing.assert_array_equal(with_ids, [[1, 1, 1]])
    np.testing.assert_array_equal(with_chances, [[1, 1, 1]])


@CHUNKS
def test_negatives_of_unknown_ids_are_like_no_other_candidate(chunk_size: int | None) -> None:
    loss, rows = ContrastiveLoss(DIMS, symmetric=True, chunk_size=chunk_size), embeddings(7, 3)
    positives = IDS[:, 0]
    others = np.stack([positives, np.arange(-7, 0)], axis=1)
    received = of(loss, positives, rows)
    np.testing.assert_allclose(received, of(loss, others, rows), rtol=1e-6)
    np.testing.assert_allclose(received, of(loss, positives[:, None], rows), rtol=1e-6)


def test_large_ids_stay_apart() -> None:
    loss, rows = ContrastiveLoss(DIMS), embeddings(2, 2)
    rows[:, 1] = -rows[:, 0]  # a negative is nearer than what is right
    ids = np.array([2**24, 2**24 + 1])  # alike in float32
    apart = of(loss, None, rows)
    np.testing.assert_allclose(of(loss, ids, rows), apart, rtol=1e-6)
    assert of(loss, np.array([7, 7]), rows) < apart / 2  # alike, they are no negatives


def test_a_chance_of_zero_is_seen() -> None:
    chances = np.array([1.0, 0.0, 1.0])
    loss = ContrastiveLoss(DIMS)
    assert not np.isfinite(of(loss, {"candidate_sampling_probability": chances}, embeddings(3, 2)))


IDS_SENTENCE = (
    "candidate_ids must be integers, one per positive (batch,) or one per positive and negative "
    "(batch, 2). Received: {} of shape {} for embeddings of shape (4, 3, 10). "
    "Number the candidates: names, ids = numpy.unique(names, return_inverse=True); where "
    "no positive stands twice, numpy.arange(len(anchors))."
)
CHANCES_SENTENCE = (
    "candidate_sampling_probability must be one positive number per positive and negative, "
    "(batch, 2). Received: float32 of shape {} for embeddings of shape (4, 3, 10). "
    "Give the share of each candidate among those that are drawn, or its count."
)
KEYS_SENTENCE = (
    "What is known of candidates is a dict of candidate_ids and candidate_sampling_probability, "
    "or one of them. Received: candidate_ids, ids. Rename or leave out what differs."
)


@pytest.mark.parametrize(
    ("known", "sentence"),
    [
        (np.zeros(4, "float32"), IDS_SENTENCE.format("float32", (4,))),
        *(
            (np.zeros(shape, "int32"), IDS_SENTENCE.format("int32", shape))
            for shape in ((3,), (4, 3), (4, 2, 1), ())
        ),
        *(
            (
                {"candidate_sampling_probability": np.ones(shape, "float32")},
                CHANCES_SENTENCE.format(shape),
            )
            for shape in ((4,), (4, 1), (3, 2), (4, 1, 2))
        ),
        ({"candidate_ids": np.arange(4), "ids": np.arange(4)}, KEYS_SENTENCE),
    ],
)
def test_what_is_no_candidate_is_refused(known: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=exactly(sentence)):
        ContrastiveLoss(DIMS)(known, np.zeros((4, 3, 10), "float32"))
