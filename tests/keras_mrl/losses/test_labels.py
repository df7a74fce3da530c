import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaHead, MatryoshkaLoss
from tests.helpers.laws import exactly
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

LOGITS = np.random.default_rng(0).normal(size=(12, 3, NUM_CLASSES)).astype("float32")


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
    with pytest.raises(ValueError, match=exactly(text)):
        model.fit(X, labels, verbose=0)
    with pytest.raises(ValueError, match=exactly(text)):
        model.fit(X, Y, validation_data=(X, labels), verbose=0)
    assert not model.built  # refused before anything was made or trained


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
    kept = labels != ignored
    loss = MatryoshkaLoss(cross_entropy(ignore_class=ignored), weights=(2, 1, 0.5))
    expected = float(loss(labels[kept], LOGITS[kept]))
    np.testing.assert_allclose(float(loss(labels, LOGITS)), expected, rtol=1e-5)


def test_fit_takes_ignored_labels_and_charges_the_others() -> None:
    labels = with_labels(-1, -1, -1)
    kept = labels != -1
    model = classifier(loss=MatryoshkaLoss(cross_entropy(ignore_class=-1)))
    logits = as_numpy(model(X))
    received = model.fit(X, labels, batch_size=12, verbose=0).history["loss"][0]
    expected = float(MatryoshkaLoss(cross_entropy())(labels[kept], logits[kept]))
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
    assert np.isfinite(float(nested.fit(X, LOGITS * 10, verbose=0).history["loss"][0]))
