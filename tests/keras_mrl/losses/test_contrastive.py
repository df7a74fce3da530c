from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl.losses import ContrastiveLoss, SupervisedContrastiveLoss
from tests.helpers.laws import exactly
from tests.helpers.loss_reference import contrastive, gradient_of, supervised
from tests.helpers.small_models import as_numpy

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
DIMS = (1, 4, 9)  # one of length one, a width that is no power of two; one coordinate is in none
WIDTH = 10
WEIGHTS = (2.0, 1.0, 0.5)
TEMPERATURE = 0.3


def embeddings(*shape: int) -> Any:
    rows = RANDOM.normal(size=(*shape, WIDTH)).astype("float32")
    rows[..., 0] += np.sign(rows[..., 0])  # the prefix of length one is not divided by next to none
    return rows


def gradient(loss: keras.losses.Loss, labels: Any, rows: Any) -> Any:
    """What one compiled `fit` step of gradient descent subtracts from the embeddings."""
    numbers = np.arange(rows.size // WIDTH, dtype="int32").reshape(rows.shape[:-1])
    table = keras.layers.Embedding(numbers.size, WIDTH)
    model = keras.Sequential([keras.Input(numbers.shape[1:], dtype="int32"), table])
    model.compile(keras.optimizers.SGD(1.0), loss)
    model.set_weights([rows.reshape(-1, WIDTH)])
    model.fit(numbers, labels, batch_size=len(rows), shuffle=False, verbose=0)
    return (rows.reshape(-1, WIDTH) - model.get_weights()[0]).reshape(rows.shape)


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
    rows = embeddings(7, sides)
    loss = ContrastiveLoss(
        DIMS,
        WEIGHTS,
        temperature=TEMPERATURE,
        symmetric=symmetric,
        chunk_size=chunk_size,
        reduction="sum",
    )

    def reference(values: Any) -> Any:
        return contrastive(values, DIMS, WEIGHTS, TEMPERATURE, symmetric)

    received = as_numpy(loss.call(None, keras.ops.convert_to_tensor(rows)))
    np.testing.assert_allclose(received, reference(rows), rtol=1e-5)
    expected = gradient_of(lambda values: reference(values).sum(), rows)
    steps = gradient(loss, np.zeros(7), rows)
    np.testing.assert_allclose(steps, expected, rtol=0, atol=2e-5)
    assert np.abs(expected[..., :9]).max() > 0.1
    assert not steps[..., 9].any()


@pytest.mark.parametrize(("chunk_size", "views"), [(None, (2,)), (3, ()), (50, (2,))])
def test_labels_equal_the_loop_in_value_and_gradient(
    chunk_size: int | None, views: tuple[int, ...]
) -> None:
    labels = np.array([5, 2, 5, 5, 2, 9, 0])  # two rows are alone in their class
    rows = embeddings(7, *views)
    loss = SupervisedContrastiveLoss(
        DIMS, WEIGHTS, temperature=TEMPERATURE, chunk_size=chunk_size, reduction="sum"
    )

    def reference(values: Any) -> Any:
        return supervised(values, labels, DIMS, WEIGHTS, TEMPERATURE)

    received = as_numpy(loss.call(labels, keras.ops.convert_to_tensor(rows)))
    np.testing.assert_allclose(received, reference(rows), rtol=1e-5, atol=1e-6)
    assert views or not received[[5, 6]].any()
    expected = gradient_of(lambda values: reference(values).sum(), rows)
    np.testing.assert_allclose(gradient(loss, labels, rows), expected, rtol=0, atol=2e-5)
    assert np.abs(expected).max() > 0.1


CHUNKS = pytest.mark.parametrize("chunk_size", [None, 2])
LOSSES: dict[str, Callable[..., Any]] = {
    "pairs": lambda **given: ContrastiveLoss(DIMS, symmetric=True, **given),
    "labels": lambda **given: SupervisedContrastiveLoss(DIMS, **given),
}
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)


def batch(rows: int) -> tuple[Any, Any]:
    return np.arange(rows) // 2, embeddings(rows, 2)


@pytest.mark.parametrize(("name", "chunk_size"), [("pairs", None), ("pairs", 3), ("labels", 2)])
def test_a_prefix_of_zeros_has_neither_similarity_nor_gradient(
    name: str, chunk_size: int | None
) -> None:
    labels, rows = batch(4)
    rows[0, 0, :4] = 0
    rows[1] = 0
    loss = LOSSES[name](chunk_size=chunk_size)
    received = gradient(loss, labels, rows)
    assert np.isfinite(received).all()
    assert not received[1].any()
    assert received[0, 0, :4].any()  # from the widest dim, where the row has a direction
    assert np.abs(received).max() < 100


@each_loss
@pytest.mark.parametrize(("bad", "chunk_size"), [(np.nan, 2), (np.inf, 2), (np.inf, None)])
def test_what_is_not_finite_is_not_hidden(make: Any, bad: float, chunk_size: int | None) -> None:
    labels, rows = batch(4)
    rows[2, 0, 3] = bad
    assert np.isnan(as_numpy(make(chunk_size=chunk_size)(labels, rows)))


@each_loss
def test_a_chunk_larger_than_the_batch_is_the_batch(make: Any) -> None:
    labels, rows = batch(4)
    received = as_numpy(make(chunk_size=2**40)(labels, rows))  # more than any memory holds
    np.testing.assert_allclose(received, as_numpy(make()(labels, rows)), rtol=1e-5)


@CHUNKS
@each_loss
def test_an_empty_batch_is_refused(make: Any, chunk_size: int | None) -> None:
    labels, rows = batch(0)
    loss = make(chunk_size=chunk_size)
    sentence = (
        f"{type(loss).__name__} needs at least one row. "
        "Received: embeddings of shape (0, 2, 10). Leave empty batches out."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        loss(labels, rows)


def test_one_pair_has_no_negatives_and_so_no_loss() -> None:
    loss = ContrastiveLoss(DIMS, symmetric=True, chunk_size=2)
    labels, rows = batch(1)
    assert float(loss(labels, rows)) == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(gradient(loss, labels, rows), 0, atol=1e-5)


def test_one_row_has_no_neighbour_and_so_no_loss() -> None:
    loss = SupervisedContrastiveLoss(DIMS, temperature=0.01, chunk_size=2)
    rows = embeddings(1)
    assert float(loss(np.zeros(1), rows)) == 0
    np.testing.assert_array_equal(gradient(loss, np.zeros(1), rows), 0)


@CHUNKS
def test_one_class_of_equal_rows_is_the_log_of_the_others(chunk_size: int | None) -> None:
    loss = SupervisedContrastiveLoss(DIMS, chunk_size=chunk_size)
    received = float(loss(np.full(6, 3), np.ones((6, WIDTH), "float32")))
    assert received == pytest.approx(3 * np.log(5), rel=1e-5)


@CHUNKS
def test_hits_say_whose_nearest_candidate_is_their_own(chunk_size: int | None) -> None:
    anchors = np.array([[1, 0, 0], [0, 1, 0], [0.2, 1, 9]], "float32")
    positives = np.array([[1, 0, 0], [0, 2, 0], [1, 0, 9]], "float32")
    hard = np.array([[0, 0, 1], [0, 0, 1], [0, 0.5, 9]], "float32")
    loss = ContrastiveLoss((2, 3), chunk_size=chunk_size)
    pairs = keras.ops.stack([anchors, positives], axis=1)
    np.testing.assert_array_equal(as_numpy(loss.measure(None, pairs)[1]), [[1, 1, 0], [1, 1, 1]])
    triplets = keras.ops.stack([anchors, positives, hard], axis=1)
    hits = as_numpy(loss.measure(None, triplets)[1])
    np.testing.assert_array_equal(hits, [[1, 1, 0], [1, 1, 0]])

    labelled = SupervisedContrastiveLoss((2, 3), chunk_size=chunk_size)
    rows = np.concatenate([anchors, positives])
    hits = as_numpy(labelled.measure(np.array([0, 1, 2, 0, 1, 2]), rows)[1])
    np.testing.assert_array_equal(hits, [[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


def test_embeddings_that_are_all_alike_are_no_hits() -> None:
    hits = as_numpy(ContrastiveLoss((2,)).measure(None, keras.ops.ones((5, 2, 2)))[1])
    assert hits.sum() == 1


def test_low_precision_embeddings_are_compared_in_float32() -> None:
    _, rows = batch(6)
    low = keras.ops.cast(rows, "bfloat16")
    loss = ContrastiveLoss(DIMS)
    received = as_numpy(loss(np.zeros(6), low))
    expected = as_numpy(loss(np.zeros(6), as_numpy(keras.ops.cast(low, "float32"))))
    np.testing.assert_array_equal(received, expected)


def test_sample_weights_weigh_anchors() -> None:
    labels, rows = batch(4)
    weights = np.array([1.0, 0.0, 2.0, 0.5])
    by_row = as_numpy(ContrastiveLoss(DIMS, reduction=None)(labels, rows))
    received = float(ContrastiveLoss(DIMS)(labels, rows, sample_weight=weights))
    assert received == pytest.approx((by_row * weights).mean(), rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 10), (4, 1, 10), (4, 4, 10), (4, 2, 2, 10)])
def test_what_are_neither_pairs_nor_triplets_is_refused(shape: tuple[int, ...]) -> None:
    sentence = (
        "ContrastiveLoss needs embeddings of pairs (batch, 2, width) or of triplets "
        f"(batch, 3, width). Received: y_pred of shape {shape}. "
        "Train a MatryoshkaEncoder, or stack the two embeddings: ops.stack([a, b], axis=1)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        ContrastiveLoss(DIMS)(np.zeros(4), np.zeros(shape))


@pytest.mark.parametrize(("labels", "rows"), [((4, 3), (4, 10)), ((4,), (4, 2, 2, 10))])
def test_labels_and_embeddings_of_other_shapes_are_refused(
    labels: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    sentence = (
        "SupervisedContrastiveLoss needs one integer label per row, and embeddings of "
        "shape (batch, width) or (batch, views, width). "
        f"Received: y_true of shape {labels} and y_pred of shape {rows}. "
        "Of one-hot labels take the argmax."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        SupervisedContrastiveLoss(DIMS)(np.zeros(labels), np.zeros(rows))
