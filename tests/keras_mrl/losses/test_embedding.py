import keras
import numpy as np
import pytest

from keras_mrl import (
    ContrastiveLoss,
    MatryoshkaEmbeddingLoss,
    MatryoshkaLoss,
    SupervisedContrastiveLoss,
)
from tests.helpers.laws import exactly
from tests.helpers.loss_reference import gradient_of
from tests.helpers.small_models import as_numpy, cross_entropy

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
DIMS = (1, 4, 7)
WEIGHTS = (2.0, 1.0, 0.5)
STUDENT = RANDOM.normal(size=(5, 9)).astype("float32")
TEACHER = RANDOM.normal(size=(5, 11)).astype("float32")  # of another width, as teachers are


def reference(student: np.ndarray) -> np.ndarray:
    """The squared distance of unit prefixes, coordinate by coordinate, as a float64 loop."""
    losses = np.zeros(len(student))
    for i, (row, target) in enumerate(zip(student, TEACHER.astype("float64"), strict=True)):
        for dim, weight in zip(DIMS, WEIGHTS, strict=True):
            unit = row[:dim] / np.sqrt((row[:dim] ** 2).sum())
            wanted = target[:dim] / np.sqrt((target[:dim] ** 2).sum())
            losses[i] += weight * ((unit - wanted) ** 2).mean()
    return losses


def gradient(loss: keras.losses.Loss, rows: np.ndarray) -> np.ndarray:
    table = keras.layers.Embedding(len(rows), rows.shape[1])
    model = keras.Sequential([keras.Input((), dtype="int32"), table])
    model.compile(keras.optimizers.SGD(1.0), loss)
    model.set_weights([rows])
    model.fit(np.arange(len(rows)), TEACHER, batch_size=len(rows), shuffle=False, verbose=0)
    return rows - model.get_weights()[0]


def distilled(**arguments: object) -> keras.losses.Loss:
    inner = keras.losses.MeanSquaredError(reduction="sum")
    return MatryoshkaEmbeddingLoss(inner, DIMS, WEIGHTS, nested_targets=True, **arguments)  # type: ignore[arg-type]


def test_prefixes_are_cut_then_scaled_as_in_the_loop() -> None:
    rows = as_numpy(distilled().call(TEACHER, keras.ops.convert_to_tensor(STUDENT)))
    np.testing.assert_allclose(rows, reference(STUDENT.astype("float64")), rtol=1e-5)
    expected = gradient_of(lambda values: reference(values).sum(), STUDENT)
    received = gradient(distilled(), STUDENT)
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 0.1
    assert not received[:, 7:].any()


def test_a_prefix_of_zeros_stays_zero_and_has_no_gradient() -> None:
    rows = STUDENT.copy()
    rows[0, :4] = 0
    rows[1] = 0
    received = gradient(distilled(), rows)
    assert np.isfinite(received).all()
    assert not received[1].any()
    assert received[0, :4].any()  # from the widest dim, where the row has a direction
    assert np.abs(received).max() < 100


def test_other_targets_are_taken_as_they_are() -> None:
    loss = MatryoshkaEmbeddingLoss(keras.losses.MeanSquaredError(), dims=(2, 4))
    received = float(loss(np.ones((5, 1)), STUDENT))
    unit = [STUDENT[:, :d] / np.linalg.norm(STUDENT[:, :d], axis=1)[:, None] for d in (2, 4)]
    assert received == pytest.approx(sum(((1 - u) ** 2).mean() for u in unit), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    rows = STUDENT.copy()
    rows[2, 0] = bad
    assert np.isnan(float(distilled()(TEACHER, rows)))


def test_lengths_are_taken_in_float32() -> None:
    low = keras.ops.cast(STUDENT, "bfloat16")
    rounded = as_numpy(keras.ops.cast(low, "float32"))
    assert float(distilled()(TEACHER, low)) == float(distilled()(TEACHER, rounded))


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


@pytest.mark.parametrize(
    "inner",
    [SupervisedContrastiveLoss(DIMS), MatryoshkaEmbeddingLoss(keras.losses.Huber(), DIMS)],
    ids=lambda inner: type(inner).__name__,
)
def test_a_loss_over_heads_refuses_them_by_name(inner: keras.losses.Loss) -> None:
    sentence = (
        f"loss must be a Keras loss for one dim. Received: {type(inner).__name__}. "
        "Give an instance, for example "
        "keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
    )
    with pytest.raises(TypeError, match=exactly(sentence)):
        MatryoshkaLoss(inner)
