"""Metrics at every dim are Keras's own of that dim; perplexity counts tokens, not rows."""

from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaHead, MatryoshkaLoss, MatryoshkaMetric, Perplexity
from tests.helpers.laws import compiled_without_cpp, exactly
from tests.helpers.nested_models import two_heads
from tests.helpers.small_models import (
    DIMS,
    NUM_CLASSES,
    X,
    Y,
    accuracy,
    as_numpy,
    classifier,
    compiled,
    cross_entropy,
    functional,
)

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(12, 3, NUM_CLASSES)).astype("float32")
RIGHT = LOGITS.argmax(-1) == Y[:, None]
SAMPLE_WEIGHTS = RANDOM.uniform(0.5, 2, size=12).astype("float32")


def result(metric: MatryoshkaMetric) -> dict[str, float]:
    return {name: float(value) for name, value in metric.result().items()}


def test_fit_logs_one_entry_per_dim() -> None:
    model = classifier(metrics=[accuracy()])
    history = model.fit(X, Y, validation_data=(X, Y), verbose=0).history
    names = {"accuracy_2", "accuracy_4", "accuracy_8"}
    assert history.keys() == {"loss", "val_loss", *names, *(f"val_{name}" for name in names)}
    scores = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert scores.keys() == {"loss", *names}
    right = as_numpy(model(X)).argmax(-1) == Y[:, None]
    for m, dim in enumerate(DIMS):
        assert scores[f"accuracy_{dim}"] == pytest.approx(right[:, m].mean())
        assert history[f"val_accuracy_{dim}"][0] == pytest.approx(right[:, m].mean())


def test_every_dim_is_scored_over_all_batches() -> None:
    metric = accuracy()
    for start in (0, 5):
        rows = slice(start, start + 5 if start == 0 else 12)
        metric.update_state(Y[rows], keras.ops.convert_to_tensor(LOGITS[rows]))
    expected = {f"accuracy_{dim}": RIGHT[:, m].mean() for m, dim in enumerate(DIMS)}
    assert len(set(expected.values())) > 1
    assert result(metric) == pytest.approx(expected)


def test_sample_weights_weigh_every_dim() -> None:
    metric = accuracy()
    metric.update_state(Y, keras.ops.convert_to_tensor(LOGITS), sample_weight=SAMPLE_WEIGHTS)
    expected = np.average(RIGHT, axis=0, weights=SAMPLE_WEIGHTS)
    assert [*result(metric).values()] == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_weighted_metric_in_fit_gets_the_sample_weights() -> None:
    model = compiled(functional(), weighted_metrics=[accuracy()])
    scores = model.evaluate(X, Y, sample_weight=SAMPLE_WEIGHTS, verbose=0, return_dict=True)
    right = as_numpy(model(X)).argmax(-1) == Y[:, None]
    expected = np.average(right, axis=0, weights=SAMPLE_WEIGHTS)
    for m, dim in enumerate(DIMS):
        assert scores[f"accuracy_{dim}"] == pytest.approx(expected[m], rel=1e-5)


def test_padding_is_not_scored_as_keras_does() -> None:
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0], [2, 2, 0, 0]])
    inputs = keras.Input((4,), dtype="int32")
    embedded = keras.layers.Embedding(5, 8, mask_zero=True)(inputs)
    model = keras.Model(inputs, MatryoshkaHead(NUM_CLASSES, dims=DIMS)(embedded))
    compiled(model, metrics=[accuracy()])
    best = as_numpy(model(tokens)).argmax(-1)
    labels = best[:, :, 1]  # right at the middle dim
    labels = np.where(tokens != 0, labels, (labels + 1) % NUM_CLASSES)  # and wrong on padding
    scores = model.evaluate(tokens, labels, verbose=0, return_dict=True)
    there = tokens != 0
    for m, dim in enumerate(DIMS):
        right = (best[:, :, m] == labels)[there].mean()
        assert scores[f"accuracy_{dim}"] == pytest.approx(right)
    assert scores["accuracy_4"] == 1


def test_every_epoch_begins_anew() -> None:
    model = compiled(functional(), optimizer=keras.optimizers.SGD(1.0), metrics=[accuracy()])
    start = model.get_weights()
    first = model.fit(X, Y, batch_size=12, verbose=0).history["accuracy_8"]
    second = model.evaluate(X, Y, verbose=0, return_dict=True)["accuracy_8"]
    model.set_weights(start)
    both = model.fit(X, Y, batch_size=12, epochs=2, verbose=0).history["accuracy_8"]
    assert first[0] != pytest.approx(second)  # else nothing was tested
    assert both == pytest.approx([first[0], second])


def test_reset_state_forgets() -> None:
    metric = accuracy()
    metric.update_state(Y, keras.ops.convert_to_tensor(LOGITS))
    assert any(result(metric).values())
    metric.reset_state()
    assert not any(result(metric).values())


def test_the_given_metric_is_left_alone_and_may_serve_twice() -> None:
    top_two = keras.metrics.SparseTopKCategoricalAccuracy(k=2, name="top")
    two, three = MatryoshkaMetric(top_two, (4, 8)), MatryoshkaMetric(top_two, DIMS)
    three.update_state(Y, keras.ops.convert_to_tensor(LOGITS))
    assert float(top_two.result()) == 0
    assert not any(result(two).values())
    order = np.argsort(-LOGITS, axis=-1)[..., :2]
    top = (order == Y[:, None, None]).any(-1).mean(0)
    assert result(three) == pytest.approx(dict(zip(("top_2", "top_4", "top_8"), top, strict=True)))


def test_the_stem_of_the_names_can_be_given() -> None:
    metric = MatryoshkaMetric(keras.metrics.SparseCategoricalAccuracy(), (2, 8), name="right")
    assert metric.result().keys() == {"right_2", "right_8"}


def test_a_metric_of_logits_beside_labels_works_at_every_dim() -> None:
    entropy = keras.metrics.SparseCategoricalCrossentropy(name="entropy", from_logits=True)
    metric = MatryoshkaMetric(entropy, DIMS)
    metric.update_state(Y, keras.ops.convert_to_tensor(LOGITS))
    inner = cross_entropy()
    expected = [float(inner(Y, LOGITS[:, m])) for m in range(3)]
    assert [*result(metric).values()] == pytest.approx(expected, rel=1e-5)
    total = float(MatryoshkaLoss(inner)(Y, LOGITS))
    assert sum(result(metric).values()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 2, 3), (12, 4, 3), (12, 3)])
def test_logits_of_another_number_of_dims_are_refused(shape: tuple[int, ...]) -> None:
    sentence = (
        "MatryoshkaMetric needs logits of shape (..., num_dims, num_classes) with one entry per "
        f"dim. Received: y_pred of shape {shape} for dims=(2, 4, 8). "
        "Give the metric the dims of the head."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        accuracy().update_state(Y, keras.ops.zeros(shape))


def test_a_metric_that_needs_logits_is_not_updated_without() -> None:
    metric = MatryoshkaMetric(keras.metrics.MeanSquaredError(), DIMS)
    sentence = (
        "update_rows takes metrics that a loss and a rank decide. "
        "Received: MeanSquaredError. Use update_state, with logits."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        metric.update_rows(np.zeros((12, 3)), np.zeros((12, 3)), Y)


@pytest.mark.parametrize("metric", ["accuracy", keras.metrics.Mean, accuracy()])
def test_what_is_no_metric_of_one_dim_is_refused(metric: Any) -> None:
    sentence = (
        f"metric must be a Keras metric for one dim. Received: {metric!r}. "
        "Give an instance, for example keras.metrics.SparseCategoricalAccuracy(name='accuracy')."
    )
    with pytest.raises(TypeError, match=exactly(sentence)):
        MatryoshkaMetric(metric, DIMS)


TOKEN_LOGITS = RANDOM.normal(size=(4, 5, 7)).astype("float32")
TOKEN_LABELS = RANDOM.integers(0, 7, size=(4, 5))
TOKEN_WEIGHTS = RANDOM.uniform(0.5, 2, size=(4, 5)).astype("float32")


def perplexity(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """In float64."""
    scores = logits.astype("float64")
    log = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    of_label = np.take_along_axis(log, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return float(np.exp(-(of_label * weights).sum() / weights.sum()))


def test_perplexity_is_the_exponential_of_the_mean_over_all_batches() -> None:
    metric = Perplexity()
    for rows in (slice(0, 1), slice(1, 4)):
        metric.update_state(TOKEN_LABELS[rows], TOKEN_LOGITS[rows])
    expected = perplexity(TOKEN_LOGITS, TOKEN_LABELS, np.ones(TOKEN_LABELS.shape))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)
    metric.reset_state()
    metric.update_state(TOKEN_LABELS[:1], TOKEN_LOGITS[:1])
    assert float(metric.result()) == pytest.approx(
        perplexity(TOKEN_LOGITS[:1], TOKEN_LABELS[:1], np.ones((1, 5))), rel=1e-5
    )


def test_ignored_tokens_do_not_count_whatever_their_logits() -> None:
    ignored = TOKEN_LABELS.copy()
    ignored[0, 1:] = ignored[2, 3] = -1
    broken = TOKEN_LOGITS.copy()
    broken[0, 1:] = np.nan
    metric = Perplexity(ignore_class=-1)
    metric.update_state(ignored, broken)
    expected = perplexity(TOKEN_LOGITS, ignored, (ignored >= 0).astype("float64"))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 5)], ids=["rows", "tokens"])
def test_sample_weights_weigh_tokens(shape: tuple[int, ...]) -> None:
    weights = TOKEN_WEIGHTS[:, 0] if shape == (4,) else TOKEN_WEIGHTS
    metric = Perplexity()
    metric.update_state(TOKEN_LABELS, TOKEN_LOGITS, sample_weight=weights)
    spread = np.broadcast_to(weights.reshape(*shape, *(1,) * (2 - len(shape))), (4, 5))
    assert float(metric.result()) == pytest.approx(
        perplexity(TOKEN_LOGITS, TOKEN_LABELS, spread), rel=1e-5
    )


def test_tokens_may_come_as_a_column() -> None:
    metric = Perplexity()
    metric.update_state(TOKEN_LABELS[:, :1], TOKEN_LOGITS[:, 0])
    expected = perplexity(TOKEN_LOGITS[:, 0], TOKEN_LABELS[:, 0], np.ones(4))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


def test_masked_positions_do_not_count_in_perplexity_at_any_dim() -> None:
    """Keras masks the sum that an Embedding with mask_zero begins."""
    tokens = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])
    labels = np.array([[2, 3, 1, 6, 6], [5, 1, 6, 6, 6]])
    inputs = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(7, 8, mask_zero=True)(inputs)

    model = keras.Model(inputs, MatryoshkaHead(7, DIMS)(embedded))
    logits = keras.ops.convert_to_numpy(model(tokens))
    metric = MatryoshkaMetric(Perplexity(), DIMS)
    metric.update_state(labels, model(tokens))
    for index, dim in enumerate(DIMS):
        expected = perplexity(logits[:, :, index], labels, (tokens > 0).astype("float64"))
        received = float(metric.result()[f"perplexity_{dim}"])
        assert received == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits_are_summed_in_float32() -> None:
    metric = Perplexity()
    low = keras.ops.cast(TOKEN_LOGITS, "bfloat16")
    metric.update_state(TOKEN_LABELS, low)
    exact = np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(low, "float32")))
    expected = perplexity(exact, TOKEN_LABELS, np.ones(TOKEN_LABELS.shape))
    assert float(metric.result()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("is_dense", [False, True], ids=["sparse", "dense"])
def test_logits_that_are_nan_are_never_right(is_dense: bool) -> None:
    kinds: Any = (
        (keras.metrics.CategoricalAccuracy, keras.metrics.TopKCategoricalAccuracy)
        if is_dense
        else (
            keras.metrics.SparseCategoricalAccuracy,
            keras.metrics.SparseTopKCategoricalAccuracy,
        )
    )
    broken = LOGITS.copy()
    broken[:, 1] = np.nan
    labels = np.eye(NUM_CLASSES, dtype="float32")[Y] if is_dense else Y
    for metric in (kinds[0](name="right"), kinds[1](k=1, name="right")):
        nested = MatryoshkaMetric(metric, DIMS)
        nested.update_state(labels, broken)
        expected = {"right_2": RIGHT[:, 0].mean(), "right_4": 0, "right_8": RIGHT[:, 2].mean()}
        assert result(nested) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler has several of its own
@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_log_has_the_names_that_keras_gives(jit_compile: bool) -> None:
    """Of a metric of several outputs, and of one name in metrics and in weighted_metrics."""
    model = two_heads()
    loss = MatryoshkaLoss(cross_entropy())
    model.compile(
        "sgd",
        {"digit": loss, "odd": loss},
        metrics={"digit": [accuracy()], "odd": [accuracy()]},
        weighted_metrics={"digit": [accuracy()]},
        jit_compile=jit_compile,
    )
    y = {"digit": Y, "odd": np.arange(12) % 2}
    weights = {"digit": np.arange(12) % 2, "odd": np.ones(12)}
    with compiled_without_cpp():
        log = model.evaluate(X, y, sample_weight=weights, verbose=0, return_dict=True)
    stems = ("digit_accuracy", "digit_weighted_accuracy", "odd_accuracy")
    assert {name for name in log if "accuracy" in name} == {
        f"{stem}_{dim}" for stem in stems for dim in DIMS
    }
    logits = {name: as_numpy(tensor) for name, tensor in model(X).items()}
    for index, dim in enumerate(DIMS):
        hits = {name: logits[name][:, index].argmax(-1) == y[name] for name in y}
        expected = (hits["digit"].mean(), hits["digit"][1::2].mean(), hits["odd"].mean())
        for stem, value in zip(stems, expected, strict=True):
            assert log[f"{stem}_{dim}"] == pytest.approx(value), stem
    assert list(accuracy().result()) == ["accuracy_2", "accuracy_4", "accuracy_8"]


class Rounded(MatryoshkaMetric):
    """A metric of a user's."""

    def result(self) -> dict[str, Any]:
        values = super().result()
        return {name: keras.ops.round(value) for name, value in values.items()}


def test_the_log_has_those_names_of_a_subclass_too() -> None:
    model, loss = two_heads(), MatryoshkaLoss(cross_entropy())
    metrics = {name: [Rounded(accuracy().metric, DIMS)] for name in ("digit", "odd")}
    model.compile("sgd", {"digit": loss, "odd": loss}, metrics=metrics)
    log = model.evaluate(X, {"digit": Y, "odd": np.arange(12) % 2}, verbose=0, return_dict=True)
    assert {name for name in log if "accuracy" in name} == {
        f"{stem}_accuracy_{dim}" for stem in ("digit", "odd") for dim in DIMS
    }
