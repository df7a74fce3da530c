"""The loss and the metrics of exits: those of Keras, added up, and no gradient into the teacher."""

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, Perplexity
from tests.helpers.laws import exactly
from tests.helpers.small_models import DIMS, NUM_CLASSES, X, Y, as_numpy, cross_entropy

pytestmark = pytest.mark.backend

EAGERLY = keras.backend.backend() != "jax"  # which compiles one by one what it runs one by one
SHARES = np.random.default_rng(1).dirichlet(np.ones(NUM_CLASSES), 12).astype("float32")
WEIGHTS = np.linspace(0.0, 2.0, 12).astype("float32")


class FromLogits(keras.losses.SparseCategoricalCrossentropy):
    """No class of Keras's own, so that the step needs logits."""


def mean_logit(y_true: Any, y_pred: Any) -> Any:
    """A metric of one's own, so that the step needs logits."""
    del y_true
    return ops.mean(y_pred)


def classifier(tied: bool = False, **arguments: Any) -> Any:
    """With weights that are the same in every call; one SGD step per `fit`."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,), name="x")
    hidden = keras.layers.Dense(6, activation="tanh", name="first_out")(inputs)
    features = keras.layers.Dense(8, name="features")(hidden)
    head = MatryoshkaHead(NUM_CLASSES, dims=DIMS, tied=tied)
    front = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)], name="front")
    model = MatryoshkaClassifier(keras.Model(inputs, features), head, exits=[front, "first_out"])
    defaults = {"optimizer": keras.optimizers.SGD(0.1), "loss": "sparse_categorical_crossentropy"}
    model.compile(**(defaults | {"run_eagerly": EAGERLY} | arguments))
    return model


def by_hand(
    model: Any, y: Any, weights: Any, distillation: float, c: Any = (1, 1, 1), smoothing: float = 0
) -> float:
    """The sum over exits and dims in float64: the mean over rows of loss and divergence."""
    logits = {n: as_numpy(own).astype("float64") for n, own in model.all_exits()(X).items()}
    shares = np.eye(NUM_CLASSES)[y] if np.ndim(y) == 1 else y
    shares = shares * (1 - smoothing) + smoothing / NUM_CLASSES

    def log_softmax(array: Any) -> Any:
        return array - np.log(np.exp(array).sum(-1, keepdims=True))

    taught = log_softmax(logits["last"][:, -1])
    total = 0.0
    for name, own in logits.items():
        for m in range(len(DIMS)):
            log_share = log_softmax(own[:, m])
            rows = -(shares * log_share).sum(-1)
            if name != "last":
                rows = rows + distillation * (np.exp(taught) * (taught - log_share)).sum(-1)
            total += (2 if name == "last" else 1) * c[m] * (weights * rows).mean()
    return float(total)


LOSSES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "integers": ({}, Y, {}),
    "integers, from logits": ({"loss": FromLogits(from_logits=True)}, Y, {}),
    "shares": ({"loss": "categorical_crossentropy"}, SHARES, {}),
    "smoothed, from logits": (
        {
            "loss": keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3),
            "metrics": [mean_logit],
        },
        SHARES,
        {"smoothing": 0.3},
    ),
    "weights of dims": ({"loss": MatryoshkaLoss(cross_entropy(), (3, 0, 1))}, Y, {"c": (3, 0, 1)}),
    "weights of dims, from logits": (
        {"loss": MatryoshkaLoss(FromLogits(from_logits=True), (3, 0, 1))},
        Y,
        {"c": (3, 0, 1)},
    ),
    "half the distillation": ({"distillation": 0.5}, Y, {"distillation": 0.5}),
    "none": ({"distillation": 0}, Y, {"distillation": 0.0}),
    "none, from logits": (
        {"distillation": 0, "loss": FromLogits(from_logits=True)},
        Y,
        {"distillation": 0.0},
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("arguments", "y", "hand"), LOSSES.values(), ids=LOSSES)
def test_the_loss_is_the_sum_over_exits_and_dims(
    tied: bool, arguments: dict[str, Any], y: Any, hand: dict[str, Any]
) -> None:
    model = classifier(tied, **arguments)
    expected = by_hand(model, y, WEIGHTS, **({"distillation": 1.0} | hand))
    received = model.evaluate(X, y, sample_weight=WEIGHTS, batch_size=12, verbose=0)
    assert np.ravel(received)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distillation", [0.0, 1.0])
def test_a_step_is_the_same_with_logits_and_without(distillation: float) -> None:
    steps = []
    for loss in (cross_entropy(), FromLogits(from_logits=True)):
        model = classifier(loss=loss, distillation=distillation)
        model.fit(X, Y, sample_weight=WEIGHTS, batch_size=12, verbose=0)
        steps.append([as_numpy(weight) for weight in model.weights])
    for own, right in zip(*steps, strict=True):
        np.testing.assert_allclose(own, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy(), FromLogits(from_logits=True)])
def test_the_teacher_is_not_pulled_towards_its_pupils(loss: keras.losses.Loss) -> None:
    model = classifier(loss=loss, pairs=[("front", 2)])
    before = {weight.path: as_numpy(weight) for weight in model.trainable_weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of variables without a gradient, as they should be
        model.fit(X, Y, verbose=0)
    moved = {w.path for w in model.trainable_weights if (before[w.path] != as_numpy(w)).any()}
    own = (*model.exit_layers[0].weights, *model.exit_heads["front"].weights)
    assert moved
    assert moved <= {weight.path for weight in own}


@pytest.mark.parametrize("loss", [cross_entropy(), FromLogits(from_logits=True)])
def test_pairs_count_as_often_as_they_stand(loss: keras.losses.Loss) -> None:
    model = classifier(loss=loss, distillation=0, pairs=[("front", 2), ("last", 8), ("last", 8)])
    logits = model.all_exits()(X)
    rows = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    expected = rows(Y, logits["front"][:, 0]) + 2 * rows(Y, logits["last"][:, 2])
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(float(as_numpy(expected)), rel=1e-5)


def test_no_batch_of_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier(metrics=["accuracy"], run_eagerly=False)
    model.fit(X, Y, verbose=0)  # before the first step Keras calls the model

    def no_logits(*_: Any, **__: Any) -> None:
        raise AssertionError("a head made logits")

    monkeypatch.setattr(MatryoshkaHead, "call", no_logits)
    model.fit(X, Y, verbose=0)
    model.evaluate(X, Y, verbose=0)


def metrics() -> list[Any]:
    return ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2"), Perplexity()]


@pytest.mark.parametrize("loss", [cross_entropy(), FromLogits(from_logits=True)])
def test_metrics_of_an_exit_are_those_of_the_model_cut_there(loss: keras.losses.Loss) -> None:
    model = classifier(loss=loss, weighted_metrics=metrics())
    log = model.evaluate(X, Y, sample_weight=WEIGHTS, verbose=0, return_dict=True)
    for name, short in (("front", "front_"), ("first_out", "first_out_"), ("last", "")):
        for dim in DIMS:
            plain = model.at(dim, exit=name)
            plain.compile(loss=cross_entropy(), weighted_metrics=metrics(), run_eagerly=EAGERLY)
            own = plain.evaluate(X, Y, sample_weight=WEIGHTS, verbose=0, return_dict=True)
            for metric in ("accuracy", "top2", "perplexity"):
                value = log[f"{metric}_{short}{dim}"]
                assert value == pytest.approx(own[metric], rel=1e-5), (name, dim, metric)


def test_metrics_with_and_without_weights_have_entries_of_their_own() -> None:
    model = classifier(metrics=["accuracy"], weighted_metrics=["accuracy"])
    log = model.evaluate(X, Y, sample_weight=WEIGHTS, verbose=0, return_dict=True)
    for name in ("front_8", "first_out_2", "4"):
        assert {f"accuracy_{name}", f"weighted_accuracy_{name}"} <= set(log)
    right = as_numpy(model.all_exits()(X)["front"])[:, 2].argmax(-1) == Y
    assert log["accuracy_front_8"] == pytest.approx(right.mean())
    assert log["weighted_accuracy_front_8"] == pytest.approx(np.average(right, weights=WEIGHTS))


def test_labels_that_do_not_exclude_each_other() -> None:
    labels = np.eye(NUM_CLASSES, dtype="float32")[Y] + np.eye(NUM_CLASSES, dtype="float32")[0]
    labels = np.minimum(labels, 1)
    model = classifier(loss="binary_crossentropy", metrics=["accuracy"])
    logits = {name: as_numpy(own) for name, own in model.all_exits()(X).items()}

    def entropy(share: Any, scores: Any) -> Any:
        return -(share * np.log(1 / (1 + np.exp(-scores)))) - (1 - share) * np.log(
            1 / (1 + np.exp(scores))
        )

    taught = 1 / (1 + np.exp(-logits["last"][:, -1]))
    expected = 0.0
    for name, own in logits.items():
        for m in range(len(DIMS)):
            expected += (1 + (name == "last")) * entropy(labels, own[:, m]).mean()
            if name != "last":
                divergence = entropy(taught, own[:, m]) - entropy(taught, logits["last"][:, -1])
                expected += divergence.mean()
    log = model.evaluate(X, labels, verbose=0, return_dict=True)
    assert log["loss"] == pytest.approx(expected, rel=1e-4)
    for name in ("front", "first_out"):
        is_right = (logits[name][:, -1] > 0) == labels
        assert log[f"accuracy_{name}_8"] == pytest.approx(is_right.mean())


def test_a_loss_without_classes_is_not_distilled() -> None:
    numbers = np.linspace(-1, 1, 36).reshape(12, 3).astype("float32")
    model = classifier(loss="mse")
    logits = {name: as_numpy(own) for name, own in model.all_exits()(X).items()}
    expected = sum(
        (1 + (name == "last")) * ((own - numbers[:, None]) ** 2).mean(axis=(0, 2)).sum()
        for name, own in logits.items()
    )
    assert model.evaluate(X, numbers, verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [cross_entropy(), FromLogits(from_logits=True)])
def test_dims_of_a_step_are_drawn_for_exits_too(loss: keras.losses.Loss) -> None:
    model = classifier(loss=MatryoshkaLoss(loss, dims_per_step=2), metrics=["accuracy"])
    log = model.fit(X, Y, epochs=3, verbose=0).history
    assert np.isfinite(log["loss"]).all()


def test_a_loaded_model_goes_on_training_where_it_stopped(tmp_path: Path) -> None:
    model = classifier(
        optimizer=keras.optimizers.Adam(0.01),
        metrics=["accuracy"],
        distillation=0.5,
        pairs=[("front", 2), ("first_out", 4), ("last", 8)],
    )
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.fit(X, Y, shuffle=False, epochs=2, verbose=0).history
    received = loaded.fit(X, Y, shuffle=False, epochs=2, verbose=0).history
    assert received.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(received[name], values, rtol=1e-5, err_msg=name)


def test_callbacks_watch_an_exit() -> None:
    model = classifier(metrics=["accuracy"])
    stop = keras.callbacks.EarlyStopping("val_accuracy_first_out_8", patience=1)
    model.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[stop], verbose=0)
    assert stop.mode == "max"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an exit that is not there": (
        {"pairs": [("second_out", 2)]},
        "pairs must be exits and dims of the model, at least one pair. Received: "
        "pairs=[('second_out', 2)] for exits=('front', 'first_out', 'last') and dims=(2, 4, 8). "
        "Write for example pairs=[('front', 2), ('last', 8)].",
    ),
    "no pair": (
        {"pairs": []},
        "pairs must be exits and dims of the model, at least one pair. Received: pairs=[] for "
        "exits=('front', 'first_out', 'last') and dims=(2, 4, 8). Write for example "
        "pairs=[('front', 2), ('last', 8)].",
    ),
    "a negative weight": (
        {"distillation": -1},
        "distillation must be a number of at least 0. Received: distillation=-1. Give for example "
        "1.0, or 0 for none.",
    ),
    "nothing to learn from": (
        {"distillation": 1.0, "loss": "mse"},
        "Exits learn from the probabilities that the last exit gives to classes. Received: "
        "distillation=1.0 with MeanSquaredError, which has none. Leave distillation out.",
    ),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_of_compile_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=exactly(sentence)):
        classifier(**arguments)


def test_arguments_for_exits_are_refused_without_any() -> None:
    body = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    model = MatryoshkaClassifier(body, MatryoshkaHead(3, dims=DIMS), name="plain")
    sentence = (
        "distillation is for a model with exits. Received: 'plain', which has none. Leave it out, "
        "or write MatryoshkaClassifier(..., exits=('conv4_block6_out',))."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        model.compile("sgd", "sparse_categorical_crossentropy", distillation=1.0)
