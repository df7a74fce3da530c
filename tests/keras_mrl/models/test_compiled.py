"""A loss and metrics of Keras, and their names, are counted at every dim of a classifier."""

from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    MatryoshkaClassifier,
    MatryoshkaHead,
    MatryoshkaLoss,
    MatryoshkaMetric,
    Perplexity,
)
from tests.helpers.laws import exactly
from tests.helpers.small_models import DIMS, NUM_CLASSES, X, Y, backbone, classifier

pytestmark = pytest.mark.backend

SPARSE = keras.losses.SparseCategoricalCrossentropy
DENSE = keras.losses.CategoricalCrossentropy
ONE_HOT = np.eye(NUM_CLASSES, dtype="float32")[Y]
MANY = (X[:, :NUM_CLASSES] > 0).astype("float32")

# A plain loss, the same loss written out, and its labels.
LOSSES: dict[str, tuple[Any, keras.losses.Loss, Any]] = {
    "name": ("sparse_categorical_crossentropy", SPARSE(from_logits=True), Y),
    "name of a class": ("CategoricalCrossentropy", DENSE(from_logits=True), ONE_HOT),
    "function": (keras.losses.categorical_crossentropy, DENSE(from_logits=True), ONE_HOT),
    "class": (SPARSE, SPARSE(from_logits=True), Y),
    "instance": (DENSE(True, 0.1), DENSE(True, 0.1), ONE_HOT),
    "alias": ("bce", keras.losses.BinaryCrossentropy(from_logits=True), MANY),
    "without logits": ("mse", keras.losses.MeanSquaredError(), MANY),
}


def measured(labels: Any, loss: Any, metrics: Any) -> dict[str, float]:
    keras.utils.set_random_seed(0)
    model = classifier(loss=loss, metrics=metrics)
    log: dict[str, float] = model.evaluate(X, labels, verbose=0, return_dict=True)
    return log


@pytest.mark.parametrize(("plain", "written", "labels"), LOSSES.values(), ids=LOSSES)
def test_a_plain_loss_is_counted_at_every_dim(
    plain: Any, written: keras.losses.Loss, labels: Any
) -> None:
    expected = measured(labels, MatryoshkaLoss(written), None)
    assert measured(labels, plain, None) == pytest.approx(expected, rel=1e-5)


METRICS: dict[str, tuple[Any, Any, keras.metrics.Metric, Any]] = {
    "integer labels": (
        "sparse_categorical_crossentropy",
        "accuracy",
        keras.metrics.SparseCategoricalAccuracy("accuracy"),
        Y,
    ),
    "one-hot labels": (
        "categorical_crossentropy",
        "acc",
        keras.metrics.CategoricalAccuracy("acc"),
        ONE_HOT,
    ),
    "several labels": (
        "binary_crossentropy",
        "accuracy",
        keras.metrics.BinaryAccuracy("accuracy", threshold=0.0),
        MANY,
    ),
    "a name, on logits": (
        "categorical_crossentropy",
        "categorical_crossentropy",
        keras.metrics.CategoricalCrossentropy("categorical_crossentropy", from_logits=True),
        ONE_HOT,
    ),
    "an instance": (
        "sparse_categorical_crossentropy",
        keras.metrics.SparseTopKCategoricalAccuracy(k=2, name="top2"),
        keras.metrics.SparseTopKCategoricalAccuracy(k=2, name="top2"),
        Y,
    ),
    "one of ours": ("sparse_categorical_crossentropy", Perplexity(), Perplexity(), Y),
    "nested, without dims": (
        "sparse_categorical_crossentropy",
        MatryoshkaMetric(keras.metrics.SparseCategoricalAccuracy("own")),
        keras.metrics.SparseCategoricalAccuracy("own"),
        Y,
    ),
}


@pytest.mark.parametrize(("loss", "plain", "written", "labels"), METRICS.values(), ids=METRICS)
def test_a_plain_metric_is_counted_at_every_dim(
    loss: str, plain: Any, written: keras.metrics.Metric, labels: Any
) -> None:
    expected = measured(labels, loss, [MatryoshkaMetric(written, DIMS)])
    assert {f"{written.name}_{dim}" for dim in DIMS} <= set(expected)
    assert measured(labels, loss, [plain]) == pytest.approx(expected, rel=1e-5)


def test_dims_that_the_width_decides_need_not_be_written() -> None:
    wide = MatryoshkaClassifier(keras.Sequential([keras.layers.Dense(16)]), MatryoshkaHead(3))
    wide.compile("adam", "sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
    stop = keras.callbacks.EarlyStopping("accuracy_8")
    log = wide.fit(X, Y, verbose=0, callbacks=[stop]).history
    assert set(log) == {"loss", "accuracy_8", "accuracy_16"}
    assert stop.mode == "max"


def test_a_model_of_plain_parts_needs_no_logits_of_a_batch_and_loads_compiled(
    tmp_path: Any,
) -> None:
    model = classifier(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    assert model._rowwise is not None
    log = model.evaluate(X, Y, verbose=0, return_dict=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(X, Y, verbose=0, return_dict=True) == pytest.approx(log, rel=1e-5)


def test_functions_of_the_users_own_read_the_logits_of_all_dims() -> None:
    def spread(y_true: Any, y_pred: Any) -> Any:
        del y_true
        assert tuple(y_pred.shape[1:]) == (len(DIMS), NUM_CLASSES)
        return keras.ops.mean(keras.ops.square(y_pred), axis=(1, 2))

    log = measured(Y, spread, [spread])
    assert log["spread"] == pytest.approx(log["loss"], rel=1e-5)


PROBABILITIES = (
    "MatryoshkaClassifier gives the logits of every dim, and no probabilities. Received: {}"
    "SparseCategoricalCrossentropy with from_logits=False. Write from_logits=True, "
    "or the name alone: loss='sparse_categorical_crossentropy'."
)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"loss": SPARSE()}, PROBABILITIES.format("")),
        (
            {"loss": MatryoshkaLoss(SPARSE())},
            PROBABILITIES.format("MatryoshkaLoss around "),
        ),
        (
            {"loss": "crossentropy"},
            "The name of a loss must say which labels it takes. Received: loss='crossentropy'. "
            "Write 'sparse_categorical_crossentropy' for integer labels, "
            "'categorical_crossentropy' for one-hot rows.",
        ),
        (
            {"loss": "mse", "metrics": ["accuracy"]},
            "An accuracy compares classes, and the loss says in which form labels give them. "
            "Received: metrics='accuracy' with loss=MeanSquaredError. "
            "Give the metric itself: keras.metrics.SparseCategoricalAccuracy(name='accuracy').",
        ),
        (
            {"loss": "bce", "metrics": [keras.metrics.BinaryCrossentropy()]},
            "Metrics of a MatryoshkaClassifier read logits, and no probabilities. "
            "Received: BinaryCrossentropy with from_logits=False. "
            "Give keras.metrics.BinaryCrossentropy from_logits=True, or write its name alone.",
        ),
    ],
)
def test_what_cannot_be_counted_on_logits_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=exactly(text)):
        classifier(backbone(), **arguments)


def test_metrics_of_probabilities_read_those_of_several_classes() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype("float32")
    y = (x[:, :3] > 0).astype("float32")
    backbone = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(3, dims=(2, 8)))
    plain = [
        keras.metrics.BinaryAccuracy(name="half"),
        keras.metrics.BinaryAccuracy(name="zero", threshold=0.0),
        keras.metrics.Precision(name="precision"),
        keras.metrics.F1Score(average="macro", threshold=0.5, name="f1"),
        keras.metrics.AUC(name="auc"),
        keras.metrics.AUC(name="auc_of_logits", from_logits=True),
    ]
    model.compile("sgd", "binary_crossentropy", metrics=["accuracy", *plain])
    log = model.evaluate(x, y, return_dict=True, verbose=0)
    logits = np.asarray(model.predict(x, verbose=0))
    for column, dim in enumerate((2, 8)):
        right = ((logits[:, column] > 0) == (y > 0)).mean()
        for name in ("accuracy", "half", "zero"):
            assert log[f"{name}_{dim}"] == pytest.approx(right, abs=1e-6)
        for name, of_probabilities in (("precision", plain[2]), ("f1", plain[3])):
            of_probabilities.reset_state()
            of_probabilities.update_state(y, 1 / (1 + np.exp(-logits[:, column])))
            assert log[f"{name}_{dim}"] == pytest.approx(float(of_probabilities.result()), abs=1e-5)
        assert log[f"auc_{dim}"] == pytest.approx(log[f"auc_of_logits_{dim}"], abs=1e-6)


def test_metrics_of_probabilities_read_those_of_one_class_a_row() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)).astype("float32"), np.eye(3, dtype="float32")[np.arange(40) % 3]
    backbone = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    head = MatryoshkaHead(3, dims=(2, 8), bias_initializer=keras.initializers.Constant(5.0))
    model = MatryoshkaClassifier(backbone, head)
    plain = [keras.metrics.Precision(name="precision"), keras.metrics.Recall(name="recall")]
    model.compile("sgd", "categorical_crossentropy", metrics=plain)
    log = model.evaluate(x, y, return_dict=True, verbose=0)
    logits = np.asarray(model.predict(x, verbose=0), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for column, dim in enumerate((2, 8)):
        chosen = shares[:, column] > 0.5
        hits = (chosen & (y > 0)).sum()
        assert 0 < chosen.sum() < (logits[:, column] > 0.5).sum()
        assert log[f"precision_{dim}"] == pytest.approx(hits / chosen.sum())
        assert log[f"recall_{dim}"] == pytest.approx(hits / 40)
