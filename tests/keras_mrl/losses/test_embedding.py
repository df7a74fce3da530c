"""The losses on embeddings equal float64 loops, in value and gradient."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    ContrastiveLoss,
    MatryoshkaEmbeddingLoss,
    MatryoshkaLoss,
    SupervisedContrastiveLoss,
)
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
from tests.helpers.loss_reference import contrastive, distilled, supervised
from tests.helpers.small_models import cross_entropy

pytestmark = pytest.mark.backend

WEIGHTS = (2.0, 1.0, 0.5)
TEMPERATURE = 0.3
TEACHER = (
    np.random.default_rng(1).normal(size=(7, 11)).astype("float32")
)  # of another width, as teachers are
MSE = keras.losses.MeanSquaredError


@pytest.mark.parametrize(
    ("sides", "symmetric", "chunk_size"),
    [
        (2, False, None),
        (3, True, None),
        (2, True, 1),
        (3, False, 7),
        (3, True, 4),
    ],
)
def test_pairs_equal_the_loop_in_value_and_gradient(
    sides: int, symmetric: bool, chunk_size: int | None
) -> None:
    loss = ContrastiveLoss(
        DIMS, WEIGHTS, temperature=TEMPERATURE, symmetric=symmetric, chunk_size=chunk_size
    )
    equals_the_loop(
        loss,
        None,
        embeddings(7, sides),
        lambda rows: contrastive(rows, DIMS, WEIGHTS, TEMPERATURE, symmetric),
    )


@pytest.mark.parametrize(("chunk_size", "views"), [(None, (2,)), (3, ()), (50, (2,))])
def test_labels_equal_the_loop_in_value_and_gradient(
    chunk_size: int | None, views: tuple[int, ...]
) -> None:
    labels = np.array([5, 2, 5, 5, 2, 9, 0])  # two rows are alone in their class
    loss = SupervisedContrastiveLoss(DIMS, WEIGHTS, temperature=TEMPERATURE, chunk_size=chunk_size)
    losses = equals_the_loop(
        loss,
        labels,
        embeddings(7, *views),
        lambda rows: supervised(rows, labels, DIMS, WEIGHTS, TEMPERATURE),
    )
    assert views or not losses[[5, 6]].any()


def test_a_teachers_prefixes_are_cut_then_scaled_as_in_the_loop() -> None:
    loss = MatryoshkaEmbeddingLoss(MSE(), DIMS, WEIGHTS, nested_targets=True)
    equals_the_loop(
        loss, TEACHER, embeddings(7), lambda rows: distilled(rows, TEACHER, DIMS, WEIGHTS)
    )


def test_other_targets_are_taken_as_they_are() -> None:
    loss = MatryoshkaEmbeddingLoss(MSE(), dims=(2, 4))
    rows = embeddings(5)
    unit = [rows[:, :d] / np.linalg.norm(rows[:, :d], axis=1)[:, None] for d in (2, 4)]
    expected = sum(((1 - u) ** 2).mean() for u in unit)
    assert of(loss, np.ones((5, 1), "float32"), rows) == pytest.approx(expected, rel=1e-5)


def batch(rows: int, *sides: int) -> tuple[Any, Any]:
    return np.arange(rows) // 2, embeddings(rows, *sides)


LOSSES: dict[str, Callable[..., keras.losses.Loss]] = {
    "pairs": lambda **arguments: ContrastiveLoss(DIMS, symmetric=True, **arguments),
    "labels": lambda **arguments: SupervisedContrastiveLoss(DIMS, **arguments),
}
each_loss = pytest.mark.parametrize("name", LOSSES)
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 2])


@pytest.mark.parametrize(
    ("name", "chunk_size"), [("pairs", None), ("pairs", 3), ("labels", 2), ("teacher", None)]
)
def test_a_prefix_of_zeros_has_neither_similarity_nor_gradient(
    name: str, chunk_size: int | None
) -> None:
    if name == "teacher":
        loss = MatryoshkaEmbeddingLoss(MSE(), DIMS, nested_targets=True)
        labels, rows = TEACHER[:4], embeddings(4, 1)[:, 0]
        rows[0, :4] = rows[1] = 0
        _, gradient = rows_and_gradient(loss, labels, rows)
    else:
        labels, rows = batch(4, 2)
        rows[0, 0, :4] = rows[1] = 0
        _, gradient = rows_and_gradient(LOSSES[name](chunk_size=chunk_size), labels, rows)
        gradient = gradient[:, 0]
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()
    assert gradient[0, :4].any()  # from the widest dim, where the row has a direction
    assert np.abs(gradient).max() < 100


@CHUNKS
@each_loss
def test_what_is_not_finite_is_not_hidden(name: str, chunk_size: int | None) -> None:
    labels, rows = batch(4, 2)
    loss = LOSSES[name](chunk_size=chunk_size)
    both = np.stack([rows, rows])
    both[:, 2, 0, 3] = np.nan, np.inf

    def losses(bad_rows: Any) -> Any:
        return keras.ops.stack([loss(labels, bad_rows[0]), loss(labels, bad_rows[1])])

    assert np.isnan(value(losses, both)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden_from_a_teacher(bad: float) -> None:
    rows = embeddings(7)
    rows[2, 0] = bad
    loss = MatryoshkaEmbeddingLoss(MSE(), DIMS, nested_targets=True)
    assert np.isnan(of(loss, TEACHER, rows))


@each_loss
def test_a_chunk_larger_than_the_batch_is_the_batch(name: str) -> None:
    labels, rows = batch(4, 2)
    received = of(LOSSES[name](chunk_size=2**40), labels, rows)  # more than any memory holds
    np.testing.assert_allclose(received, of(LOSSES[name](), labels, rows), rtol=1e-5)


def test_one_pair_has_no_negatives_and_so_no_loss() -> None:
    loss = ContrastiveLoss(DIMS, symmetric=True, chunk_size=2)
    losses, gradient = rows_and_gradient(loss, *batch(1, 2))
    assert losses == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_one_row_has_no_neighbour_and_so_no_loss() -> None:
    loss = SupervisedContrastiveLoss(DIMS, temperature=0.01, chunk_size=2)
    losses, gradient = rows_and_gradient(loss, np.zeros(1), embeddings(1))
    assert losses == 0
    np.testing.assert_array_equal(gradient, 0)


@CHUNKS
def test_one_class_of_equal_rows_is_the_log_of_the_others(chunk_size: int | None) -> None:
    loss = SupervisedContrastiveLoss(DIMS, chunk_size=chunk_size)
    received = of(loss, np.full(6, 3), np.ones((6, WIDTH), "float32"))
    assert received == pytest.approx(3 * np.log(5), rel=1e-5)


@CHUNKS
def test_hits_say_whose_nearest_candidate_is_their_own(chunk_size: int | None) -> None:
    anchors = np.array([[1, 0, 0], [0, 1, 0], [0.2, 1, 9]], "float32")
    positives = np.array([[1, 0, 0], [0, 2, 0], [1, 0, 9]], "float32")
    hard = np.array([[0, 0, 1], [0, 0, 1], [0, 0.5, 9]], "float32")
    loss = ContrastiveLoss((2, 3), chunk_size=chunk_size)
    labelled = SupervisedContrastiveLoss((2, 3), chunk_size=chunk_size)
    labels = np.array([0, 1, 2, 0, 1, 2])

    def hits(first: Any, second: Any, third: Any) -> Any:
        pairs = keras.ops.stack([first, second], axis=1)
        triplets = keras.ops.stack([first, second, third], axis=1)
        rows = keras.ops.concatenate([first, second])
        return (
            loss.measure(None, pairs)[1],
            loss.measure(None, triplets)[1],
            labelled.measure(labels, rows)[1],
        )

    of_pairs, of_triplets, of_labels = value(hits, anchors, positives, hard)
    np.testing.assert_array_equal(of_pairs, [[1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(of_triplets, [[1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(of_labels, [[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


def test_embeddings_that_are_all_alike_are_no_hits() -> None:
    loss = ContrastiveLoss((2,))
    alike = np.ones((5, 2, 2), "float32")
    assert value(lambda rows: loss.measure(None, rows)[1], alike).sum() == 1


@pytest.mark.parametrize("name", ["pairs", "teacher"])
def test_low_precision_embeddings_are_compared_in_float32(name: str) -> None:
    loss, labels, rows = ContrastiveLoss(DIMS), None, embeddings(6, 2)
    if name == "teacher":
        loss = MatryoshkaEmbeddingLoss(MSE(), DIMS, nested_targets=True)
        labels, rows = TEACHER, embeddings(7)

    def both(precise: Any) -> Any:
        low = keras.ops.cast(precise, "bfloat16")
        return loss(labels, low), loss(labels, keras.ops.cast(low, "float32"))

    of_low, of_rounded = value(both, rows)
    assert of_low == of_rounded


def test_sample_weights_weigh_anchors() -> None:
    labels, rows = batch(4, 2)
    weights = np.array([1.0, 0.0, 2.0, 0.5], "float32")
    by_row = of(ContrastiveLoss(DIMS, reduction=None), labels, rows)
    received = of(ContrastiveLoss(DIMS), labels, rows, sample_weight=weights)
    assert received == pytest.approx((by_row * weights).mean(), rel=1e-5)


PAIRS = (
    "ContrastiveLoss needs embeddings of pairs (batch, 2, width), or of more sides with "
    "hard negatives. Received: y_pred of shape {}. "
    "Train a MatryoshkaEncoder, or stack the two embeddings: ops.stack([a, b], axis=1)."
)
ROWS_AND_LABELS = (
    "SupervisedContrastiveLoss needs one integer label per row, and embeddings of "
    "shape (batch, width) or (batch, views, width). "
    "Received: y_true of shape {} and y_pred of shape {}. Of one-hot labels take the argmax."
)
EMPTY = (
    "{} needs at least one row. Received: embeddings of shape (0, 2, 10). Leave empty batches out."
)


@pytest.mark.parametrize(
    ("loss", "labels", "rows", "sentence"),
    [
        *(
            (ContrastiveLoss(DIMS), (4,), shape, PAIRS.format(shape))
            for shape in ((4, 10), (4, 1, 10), (4, 2, 2, 10))
        ),
        *(
            (SupervisedContrastiveLoss(DIMS), labels, rows, ROWS_AND_LABELS.format(labels, rows))
            for labels, rows in (((4, 3), (4, 10)), ((4,), (4, 2, 2, 10)))
        ),
        *(
            (make(chunk_size=chunk_size), (0,), (0, 2, 10), EMPTY.format(type(make()).__name__))
            for make in LOSSES.values()
            for chunk_size in (None, 2)
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    loss: keras.losses.Loss, labels: tuple[int, ...], rows: tuple[int, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=exactly(sentence)):
        loss(np.zeros(labels), np.zeros(rows))


@pytest.mark.parametrize(
    "inner",
    [
        cross_entropy(),
        keras.losses.CategoricalCrossentropy(),
        ContrastiveLoss(DIMS),
        MatryoshkaLoss(cross_entropy()),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_losses_on_logits_and_nested_ones_are_refused_by_name(inner: keras.losses.Loss) -> None:
    sentence = (
        f"loss must be a Keras loss on embeddings of one width. Received: {type(inner).__name__}. "
        "Give an instance, for example keras.losses.CosineSimilarity(); logits of classes need a "
        "MatryoshkaHead and MatryoshkaLoss."
    )
    with pytest.raises(TypeError, match=exactly(sentence)):
        MatryoshkaEmbeddingLoss(inner, DIMS)
