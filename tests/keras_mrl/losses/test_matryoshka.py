"""Any Keras loss at every dim equals the paper's loop; labels that name no class make it NaN."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    MatryoshkaEmbeddingLoss,
    MatryoshkaHead,
    MatryoshkaLoss,
    MatryoshkaMetric,
    SupervisedContrastiveLoss,
)
from keras_mrl.losses.matryoshka import check_labels
from tests.helpers.laws import exactly
from tests.helpers.reference import error_budget, fold, nested_gradient, nested_loss, tie
from tests.helpers.small_models import (
    NUM_CLASSES,
    X,
    Y,
    as_numpy,
    classifier,
    compiled,
    cross_entropy,
    functional,
)

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
DIMS = (2, 5, 8)
WEIGHTS = (2.0, 1.0, 0.5)
SAMPLE_WEIGHTS = RANDOM.uniform(0.5, 2, size=12).astype("float32")
LOGITS = RANDOM.normal(size=(12, 3, NUM_CLASSES)).astype("float32")


def head_model(tied: bool) -> keras.Model:
    """A linear layer of no bias and width 9 (one more than the widest dim), then the head."""
    inputs = keras.Input((5,))
    features = keras.layers.Dense(9, use_bias=False)(inputs)
    model = keras.Model(inputs, MatryoshkaHead(NUM_CLASSES, dims=DIMS, tied=tied)(features))
    model.compile(keras.optimizers.SGD(1.0), MatryoshkaLoss(cross_entropy(), WEIGHTS))
    model.set_weights([RANDOM.normal(size=w.shape) for w in model.get_weights()])
    return model


def reference_step(
    weights: list[np.ndarray], tied: bool, dtype: str
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The losses, and the weights after one step of gradient descent, by the paper's loop."""
    body, *head = (w.astype(dtype) for w in weights)
    kernels, biases = tie(head[0], head[1], DIMS) if tied else (head[:3], head[3:])
    features = X.astype(dtype) @ body
    losses = nested_loss(features, kernels, biases, Y, WEIGHTS, dtype)
    samples = SAMPLE_WEIGHTS.astype(dtype)
    gradient = nested_gradient(features, kernels, biases, Y, WEIGHTS, samples, dtype)
    folded = [*fold(gradient)] if tied else [*gradient.kernels, *gradient.biases]
    gradients = [X.T.astype(dtype) @ gradient.features, *folded]
    stepped = [w.astype(dtype) - g for w, g in zip(weights, gradients, strict=True)]
    return samples * losses, stepped


@pytest.mark.parametrize("tied", [False, True], ids=["MRL", "MRL-E"])
def test_head_and_loss_equal_the_papers_loop_in_value_and_gradient(tied: bool) -> None:
    model = head_model(tied)
    before = model.get_weights()
    exact, exact_weights = reference_step(before, tied, "float64")
    naive, naive_weights = reference_step(before, tied, "float32")
    assert naive.dtype == np.float32

    rows = MatryoshkaLoss(cross_entropy(reduction=None), WEIGHTS)
    losses = as_numpy(rows(Y, model(X), sample_weight=SAMPLE_WEIGHTS))
    np.testing.assert_allclose(losses, exact, rtol=0, atol=error_budget(exact, naive))

    history = model.fit(X, Y, sample_weight=SAMPLE_WEIGHTS, batch_size=len(X), verbose=0)
    budget = error_budget(exact, naive)
    np.testing.assert_allclose(history.history["loss"][0], exact.mean(), rtol=0, atol=budget)
    for was, received, target, rough in zip(
        before, model.get_weights(), exact_weights, naive_weights, strict=True
    ):
        budget = error_budget(target, rough)
        np.testing.assert_allclose(received, target, rtol=0, atol=budget)
        assert np.abs(target - was).max() > 100 * budget  # the step is what was compared


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
def test_sample_weights_reach_every_dim_as_keras_has_them(reduction: str) -> None:
    inner = cross_entropy(reduction=reduction)
    received = MatryoshkaLoss(inner, WEIGHTS)(Y, LOGITS, sample_weight=SAMPLE_WEIGHTS)
    expected = sum(
        weight * float(inner(Y, LOGITS[:, m], sample_weight=SAMPLE_WEIGHTS))
        for m, weight in enumerate(WEIGHTS)
    )
    np.testing.assert_allclose(float(received), expected, rtol=1e-5)


def test_a_sample_of_weight_zero_is_as_if_absent() -> None:
    loss = MatryoshkaLoss(cross_entropy(reduction="sum"), WEIGHTS)
    samples = np.where(np.arange(12) < 7, 1.0, 0.0)
    received = float(loss(Y, LOGITS, sample_weight=samples))
    np.testing.assert_allclose(received, float(loss(Y[:7], LOGITS[:7])), rtol=1e-5)


def test_padding_is_left_out_of_the_mean_as_keras_does() -> None:
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0], [2, 2, 0, 0]])
    labels = RANDOM.integers(0, NUM_CLASSES, size=(3, 4))
    inputs = keras.Input((4,), dtype="int32")
    embedded = keras.layers.Embedding(5, 8, mask_zero=True)(inputs)
    model = keras.Model(inputs, MatryoshkaHead(NUM_CLASSES, dims=DIMS)(embedded))
    compiled(model, loss=MatryoshkaLoss(cross_entropy(), WEIGHTS))
    logits = as_numpy(model(tokens))
    there = tokens != 0
    expected = float(MatryoshkaLoss(cross_entropy(), WEIGHTS)(labels[there], logits[there]))
    np.testing.assert_allclose(model.evaluate(tokens, labels, verbose=0), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "logits_shape"),
    [
        pytest.param((12,), (12,), id="rows"),
        pytest.param((12, 1), (12,), id="a column"),
        pytest.param((4, 3), (4, 3), id="sequences"),
        pytest.param((12, 1), (12, 1), id="sequences of one step"),
        pytest.param((4, 3, 1), (4, 3), id="sequences of columns"),
    ],
)
def test_one_value_per_label_whatever_the_shape_of_the_labels(
    shape: tuple[int, ...], logits_shape: tuple[int, ...]
) -> None:
    logits = LOGITS.reshape(*logits_shape, 3, NUM_CLASSES)
    labels = Y.reshape(shape)
    inner = cross_entropy(reduction=None)
    expected = as_numpy(inner(labels, logits[..., 1, :]))
    received = as_numpy(MatryoshkaLoss(inner, (0, 1, 0))(labels, logits))
    assert received.shape == expected.shape == logits_shape
    np.testing.assert_allclose(received, expected, rtol=1e-6)


def test_the_loss_is_float32_under_low_precision_logits() -> None:
    low = keras.ops.cast(LOGITS, "bfloat16")
    rounded = as_numpy(keras.ops.cast(low, "float32"))
    loss = MatryoshkaLoss(cross_entropy(reduction=None))
    np.testing.assert_allclose(as_numpy(loss(Y, low)), as_numpy(loss(Y, rounded)), rtol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 2.0, 3.0, 4.0)])
def test_weights_for_another_number_of_dims_are_refused(weights: tuple[float, ...]) -> None:
    sentence = (
        "weights must hold one number per dim. "
        f"Received: {len(weights)} weights {weights} for 3 dims. "
        "Give as many weights as the head has dims, or weights=None for ones."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        MatryoshkaLoss(cross_entropy(), weights)(Y, LOGITS)


def test_training_lowers_the_loss_at_every_dim() -> None:
    model = classifier(optimizer=keras.optimizers.Adam(0.05))
    x = RANDOM.normal(size=(60, 5)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    inner = cross_entropy()

    def by_dim() -> np.ndarray:
        logits = as_numpy(model(x))
        return np.array([float(inner(y, logits[:, m])) for m in range(logits.shape[1])])

    before = by_dim()
    model.fit(x, y, batch_size=60, epochs=20, verbose=0)
    assert (by_dim() < 0.8 * before).all()


def test_logits_without_an_axis_of_dims_are_refused() -> None:
    sentence = (
        "MatryoshkaLoss needs logits of shape (..., num_dims, num_classes). "
        "Received: y_pred of shape (12, 3). "
        "End the model with a MatryoshkaHead, or use the inner loss alone."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        MatryoshkaLoss(cross_entropy())(Y, LOGITS[:, 0])


@pytest.mark.parametrize(
    "inner",
    [
        MatryoshkaLoss(cross_entropy()),
        SupervisedContrastiveLoss(DIMS),
        MatryoshkaEmbeddingLoss(keras.losses.Huber(), DIMS),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_a_nested_loss_in_a_nested_loss_is_refused_by_name(inner: keras.losses.Loss) -> None:
    sentence = (
        f"loss must be a Keras loss for one dim. Received: {type(inner).__name__}. "
        "Give an instance, for example "
        "keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
    )
    with pytest.raises(TypeError, match=exactly(sentence)):
        MatryoshkaLoss(inner)


def with_labels(*wrong: float, dtype: str = "int64") -> np.ndarray:
    labels = Y.astype(dtype)
    labels[: len(wrong)] = wrong
    return labels


def sentence(shown: str, rows: int, remedy: str) -> str:
    return (
        "Integer labels must lie in 0..2, one for each of the head's 3 classes. "
        f"Received: labels {shown} in {rows} of 12 rows. {remedy}"
    )


WIDEN = "Number the classes from 0, or make the head with num_classes={}."
RENUMBER = "Number the classes from 0."
WRONG = [
    pytest.param(with_labels(3, 3), sentence("3", 2, WIDEN.format(4)), id="counted from one"),
    pytest.param(with_labels(-1), sentence("-1", 1, RENUMBER), id="negative"),
    pytest.param(with_labels(-1, 9), sentence("-1, 9", 2, WIDEN.format(10)), id="both ends"),
    pytest.param(
        with_labels(9, 8, 7, 6, 5, 4, 3),
        sentence("3, 4, 5, 6, 7, ...", 7, WIDEN.format(10)),
        id="many",
    ),
    pytest.param(with_labels(3)[:, None], sentence("3", 1, WIDEN.format(4)), id="a column"),
    pytest.param(
        with_labels(255, dtype="uint8"), sentence("255", 1, WIDEN.format(256)), id="uint8"
    ),
    pytest.param(
        with_labels(np.nan, dtype="float32"), sentence("nan", 1, RENUMBER), id="not a number"
    ),
]


@pytest.mark.parametrize(("labels", "text"), WRONG)
def test_fit_refuses_arrays_of_labels_that_name_no_class(labels: np.ndarray, text: str) -> None:
    model = classifier()
    before = model.get_weights()
    with pytest.raises(ValueError, match=exactly(text)):
        model.fit(X, labels, verbose=0)
    with pytest.raises(ValueError, match=exactly(text)):
        model.fit(X, Y, validation_data=(X, labels), verbose=0)
    with pytest.raises(ValueError, match=exactly(text)):
        model.evaluate(X, labels, verbose=0)
    np.testing.assert_equal(model.get_weights(), before)  # refused before anything was trained


def test_a_label_tensor_of_the_backend_is_looked_at_too() -> None:
    labels = keras.ops.convert_to_tensor(with_labels(3))
    with pytest.raises(ValueError, match=exactly(sentence("3", 1, WIDEN.format(4)))):
        classifier().fit(X, labels, verbose=0)


def test_labels_beside_the_ignored_one_are_still_looked_at() -> None:
    model = classifier(loss=MatryoshkaLoss(cross_entropy(ignore_class=255)))
    with pytest.raises(ValueError, match=exactly(sentence("5", 1, WIDEN.format(6)))):
        model.fit(X, with_labels(255, 5), verbose=0)


class Batches(keras.utils.PyDataset):
    def __init__(self, labels: np.ndarray) -> None:
        super().__init__()
        self.labels = labels

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        del index
        return X, self.labels


def outcome(train: Callable[[], Any]) -> str:
    """What training comes to: the loss, or the words of the backend's own error."""
    try:
        return str(float(train().history["loss"][0]))
    except Exception as error:  # TensorFlow and torch have each their own
        return str(error)


@pytest.mark.parametrize("label", [3, -1])
def test_a_dataset_with_a_label_that_names_no_class_does_not_train_silently(label: int) -> None:
    dataset = Batches(with_labels(label))
    loud = re.compile(rf"nan\Z|.*(Target|a label value of) {label} ", re.DOTALL)
    assert loud.match(outcome(lambda: classifier().fit(dataset, verbose=0)))
    assert loud.match(outcome(lambda: compiled(functional()).fit(dataset, verbose=0)))


def test_a_dataset_with_good_labels_trains() -> None:
    history = classifier().fit(Batches(Y), validation_data=Batches(Y), verbose=0).history
    assert np.isfinite([float(history[name][0]) for name in ("loss", "val_loss")]).all()


class Lenient(keras.losses.SparseCategoricalCrossentropy):
    """As on an accelerator: a label that names no class is no error."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        inside = keras.ops.clip(keras.ops.where(y_true == y_true, y_true, 0), 0, NUM_CLASSES - 1)
        return super().call(inside, y_pred)


@pytest.mark.parametrize("label", [3, -1, np.nan])
@pytest.mark.parametrize("column", [False, True])
def test_only_the_rows_whose_label_names_no_class_are_nan(label: float, column: bool) -> None:
    labels = with_labels(label, dtype="float32")
    loss = MatryoshkaLoss(Lenient(from_logits=True, reduction=None))
    rows = as_numpy(loss(labels[:, None] if column else labels, LOGITS))
    assert np.isnan(rows).tolist() == [True] + [False] * 11
    expected = as_numpy(loss(Y, LOGITS))
    np.testing.assert_allclose(rows[1:], expected[1:], rtol=1e-6)


@pytest.mark.parametrize("ignored", [-1, 1, 255])
def test_ignored_labels_are_left_out_of_the_mean(ignored: int) -> None:
    labels = with_labels(ignored, ignored, ignored, ignored)
    counted = labels != ignored
    loss = MatryoshkaLoss(cross_entropy(ignore_class=ignored), weights=(2, 1, 0.5))
    expected = float(loss(labels[counted], LOGITS[counted]))
    np.testing.assert_allclose(float(loss(labels, LOGITS)), expected, rtol=1e-5)


def test_fit_takes_ignored_labels_and_charges_the_others() -> None:
    labels = with_labels(-1, -1, -1)
    counted = labels != -1
    model = classifier(loss=MatryoshkaLoss(cross_entropy(ignore_class=-1)))
    logits = as_numpy(model(X))
    received = model.fit(X, labels, batch_size=12, verbose=0).history["loss"][0]
    expected = float(MatryoshkaLoss(cross_entropy())(labels[counted], logits[counted]))
    np.testing.assert_allclose(received, expected, rtol=1e-5)


def test_labels_of_no_sparse_loss_are_nobodys_business() -> None:
    soft = np.eye(NUM_CLASSES, dtype="float32")[Y] * 5 - 1  # outside 0..2, and fine
    inner = keras.losses.CategoricalCrossentropy(from_logits=True)
    model = classifier(loss=MatryoshkaLoss(inner))
    logits = as_numpy(model(X))
    received = model.fit(X, soft, validation_data=(X, soft), batch_size=12, verbose=0).history
    expected = sum(float(inner(soft, logits[:, m])) for m in range(3))
    np.testing.assert_allclose(received["loss"][0], expected, rtol=1e-5)


def test_a_plain_loss_is_left_to_keras() -> None:
    head = MatryoshkaHead(NUM_CLASSES, dims=(2, 4, 8))
    model = compiled(functional(head), loss=keras.losses.MeanSquaredError())
    assert np.isfinite(float(model.fit(X, LOGITS, verbose=0).history["loss"][0]))
    nested = classifier(loss="mse")
    assert np.isfinite(float(nested.fit(X, LOGITS[:, 0] * 10, verbose=0).history["loss"][0]))


@pytest.mark.parametrize(
    "inner",
    [keras.losses.BinaryCrossentropy(from_logits=True), keras.losses.MeanSquaredError()],
    ids=lambda loss: type(loss).__name__,
)
def test_every_output_has_a_label_of_its_own(inner: Any) -> None:
    """Keras would broadcast one label to all outputs of a row, or of a batch of as many rows."""
    loss, outputs = MatryoshkaLoss(inner), np.ones((3, 2, 3), "float32")
    for labels in (np.ones(3), np.ones((3, 1)), np.ones((3, 2))):
        text = (
            rf"\A{type(inner).__name__} compares every output with a label of its own. Received: "
            rf"labels of shape {re.escape(str(labels.shape))} for 3 outputs a row. Give labels "
            r"\(rows, 3\), or a head with as many outputs as labels.\Z"
        )
        with pytest.raises(ValueError, match=text):
            loss(labels, outputs)
        with pytest.raises(ValueError, match=text):
            check_labels(loss, labels, (None, 2, 3))
    flat, column = (
        float(loss(labels, outputs[..., :1])) for labels in (np.ones(3), np.ones((3, 1)))
    )
    assert flat == column


@pytest.mark.backend
def test_a_weight_of_a_row_is_one_of_all_its_positions() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(2, 6, 3, 5)), random.integers(0, 5, size=(2, 6))
    by_row = np.array([0.5, 2.0])
    inner = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    received = []
    for weights in (by_row, np.repeat(by_row[:, None], 6, axis=1)):
        metric = MatryoshkaMetric(accuracy, dims=(2, 4, 8))
        metric.update_state(labels, logits, sample_weight=weights)
        loss = MatryoshkaLoss(inner)(labels, logits, sample_weight=weights)
        received.append([float(loss), *map(float, metric.result().values())])
    np.testing.assert_allclose(received[0], received[1], rtol=1e-6)
