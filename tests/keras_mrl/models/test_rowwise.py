"""`fit` without logits: the same numbers, and no batch of logits."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_mrl import (
    MatryoshkaClassifier,
    MatryoshkaHead,
    MatryoshkaLoss,
    MatryoshkaMetric,
    Perplexity,
    first_boosted,
)
from keras_mrl.losses import crossentropy
from keras_mrl.models.rowwise import rowwise_step
from tests.helpers.datasets import dataset
from tests.helpers.laws import exactly
from tests.helpers.small_models import (
    as_numpy,
    backbone,
)

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
ROWS, BATCH_ROWS, CLASSES, LENGTH = 33, 20, 7, 5  # batches of 20 and 13, in chunks of 8 or fewer
STEP_DIMS = (2, 5, 8)
STEP_X = RANDOM.normal(size=(ROWS, 5)).astype("float32")
STEP_Y = RANDOM.integers(0, CLASSES, ROWS)
TOKENS = RANDOM.integers(1, CLASSES, (ROWS, LENGTH))
TOKENS[:, 3:] = np.where(RANDOM.random((ROWS, 2)) < 0.5, 0, TOKENS[:, 3:])
NEXT = np.where(TOKENS == 0, -1, (TOKENS + 1) % CLASSES)
SPARSE = keras.losses.SparseCategoricalCrossentropy
DENSE = keras.losses.CategoricalCrossentropy


class WithLogits(MatryoshkaClassifier):
    """One that looks at logits, so that they must be there."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        assert y_pred.shape[-2:] == (len(STEP_DIMS), CLASSES)
        return super().compute_metrics(x, y, y_pred, sample_weight)


def masking() -> keras.Model:
    embedding = keras.layers.Embedding(CLASSES, 4, mask_zero=True)
    return keras.Sequential([keras.Input((LENGTH,)), embedding, keras.layers.Dense(8)])


def nested(metric: keras.metrics.Metric) -> MatryoshkaMetric:
    return MatryoshkaMetric(metric, STEP_DIMS)


def total_of_logits(y_true: Any, y_pred: Any) -> Any:
    del y_true
    return ops.sum(y_pred)


CASES: dict[str, dict[str, Any]] = {
    "labels": {
        "loss": MatryoshkaLoss(SPARSE(from_logits=True), weights=first_boosted),
        "metrics": [nested(keras.metrics.SparseCategoricalAccuracy(name="accuracy"))],
        "class_weight": {label: 0.5 + label for label in range(CLASSES)},
    },
    "weighted, tied": {
        "tied": True,
        "loss": MatryoshkaLoss(SPARSE(from_logits=True, reduction="mean_with_sample_weight")),
        "weighted_metrics": [
            nested(keras.metrics.SparseTopKCategoricalAccuracy(k=3, name="top")),
            nested(keras.metrics.SparseCategoricalCrossentropy(name="ce", from_logits=True)),
        ],
        "sample_weight": RANDOM.random(ROWS),
    },
    "shares": {
        "y": RANDOM.dirichlet(np.ones(CLASSES), ROWS).astype("float32"),
        "loss": MatryoshkaLoss(DENSE(from_logits=True, label_smoothing=0.1, reduction="sum")),
        "metrics": [nested(keras.metrics.CategoricalAccuracy(name="accuracy"))],
        "use_bias": False,
        "validated": False,
    },
    "masked tokens": {
        "backbone": masking,
        "x": TOKENS,
        "y": NEXT,
        "tied": True,
        "loss": MatryoshkaLoss(SPARSE(from_logits=True, ignore_class=-1)),
        "metrics": [nested(Perplexity(ignore_class=-1))],
        "sample_weight": RANDOM.random((ROWS, LENGTH)),
    },
    "ignored labels": {
        "y": np.where(STEP_Y < 3, -1, STEP_Y),
        "loss": MatryoshkaLoss(SPARSE(from_logits=True, ignore_class=-1)),
        "metrics": [nested(keras.metrics.SparseCategoricalAccuracy(name="accuracy"))],
        "run_eagerly": keras.backend.backend() != "jax",  # which compiles it all the same
    },
    "some dims": {
        "validated": False,
        "loss": MatryoshkaLoss(SPARSE(from_logits=True), dims_per_step=2),
        "kernel_regularizer": "l2",
    },
}


def again(metric: MatryoshkaMetric) -> MatryoshkaMetric:
    """A metric like it, with a state of its own."""
    return MatryoshkaMetric.from_config(metric.get_config())


HEAD = ("tied", "use_bias", "kernel_regularizer")


def trained(kind: Any, settings: dict[str, Any]) -> tuple[keras.Model, dict[str, list[float]]]:
    keras.utils.set_random_seed(0)
    case: dict[str, Any] = {"backbone": backbone, "x": STEP_X, "y": STEP_Y, **settings}
    head = {name: case[name] for name in HEAD if name in case}
    metrics: dict[str, Any] = {
        n: [again(m) for m in case.get(n, [])] for n in ("metrics", "weighted_metrics")
    }
    fitted = {name: case[name] for name in ("sample_weight", "class_weight") if name in case}
    model = kind(case["backbone"](), MatryoshkaHead(CLASSES, STEP_DIMS, **head))
    eagerly = case.get("run_eagerly", False)
    model.compile(keras.optimizers.SGD(0.1), case["loss"], run_eagerly=eagerly, **metrics)
    history = model.fit(
        case["x"],
        case["y"],
        batch_size=BATCH_ROWS,
        epochs=2,
        validation_data=(case["x"], case["y"]) if case.get("validated", True) else None,
        verbose=0,
        shuffle=False,
        **fitted,
    )
    return model, history.history


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fit_without_logits_is_one_with_them(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossentropy, "CHUNK_LOGITS", 1)  # the fewest rows a chunk may have: 8
    model, history = trained(MatryoshkaClassifier, case)
    plain, expected = trained(WithLogits, case)
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-4, err_msg=name)
    for own, right in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(own, right, rtol=0, atol=1e-5)


def test_masked_tokens_count_nothing_in_a_weighted_metric() -> None:
    # Not compared with Keras's own: it forgets the mask on JAX, and scales weights twice on torch.
    model = MatryoshkaClassifier(masking(), MatryoshkaHead(CLASSES, STEP_DIMS))
    right = nested(keras.metrics.SparseCategoricalAccuracy(name="right"))
    loss = MatryoshkaLoss(SPARSE(from_logits=True, ignore_class=-1))
    model.compile("sgd", loss, weighted_metrics=[right])
    weights = RANDOM.random(TOKENS.shape)
    log = model.evaluate(
        TOKENS, NEXT, sample_weight=weights, batch_size=8, verbose=0, return_dict=True
    )
    best = model.predict(TOKENS, verbose=0).argmax(axis=-1)
    weights = weights * (TOKENS != 0)
    for index, dim in enumerate(STEP_DIMS):
        expected = ((best[:, :, index] == NEXT) * weights).sum() / weights.sum()
        assert log[f"right_{dim}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "compiled_with",
    [
        {"loss": MatryoshkaLoss(keras.losses.CategoricalHinge())},
        {"loss": MatryoshkaLoss(SPARSE(from_logits=True, reduction="none"))},
        {"loss": MatryoshkaLoss(SPARSE(from_logits=True)), "loss_weights": [1.0]},
        {"loss": MatryoshkaLoss(SPARSE(from_logits=True)), "metrics": [total_of_logits]},
        {
            "loss": MatryoshkaLoss(DENSE(from_logits=True, label_smoothing=0.1)),
            "metrics": [nested(keras.metrics.CategoricalCrossentropy(from_logits=True))],
        },
    ],
    ids=["hinge", "unreduced", "loss weights", "metric of logits", "smoothed"],
)
def test_what_needs_logits_has_them(compiled_with: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"metrics": None, "loss_weights": None, **compiled_with}
    assert rowwise_step(weighted_metrics=None, **arguments) is None
    plain = MatryoshkaLoss(SPARSE(from_logits=True))
    assert rowwise_step(plain, None, None, None) is not None
    model = MatryoshkaClassifier(backbone(), MatryoshkaHead(CLASSES, STEP_DIMS))
    model.compile("sgd", plain)
    assert tuple(model(STEP_X[:2], training=True).shape) == (2, len(STEP_DIMS), CLASSES)


BATCH, MANY, WIDTH = 64, 1031, 16  # 1031 is prime: no other tensor has this many columns


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_never_holds_the_logits_of_its_batch(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossentropy, "CHUNK_LOGITS", 8 * MANY)
    model = MatryoshkaClassifier(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(WIDTH)]),
        MatryoshkaHead(MANY, (4, 8, WIDTH), tied),
    )
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    model.compile(
        "sgd",
        MatryoshkaLoss(SPARSE(from_logits=True)),
        weighted_metrics=[MatryoshkaMetric(accuracy, (4, 8, WIDTH))],
    )
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH, 4)).astype("float32")
    y, weights = random.integers(0, MANY, BATCH), random.random(BATCH)
    model.fit(x, y, sample_weight=weights, batch_size=BATCH, verbose=0)
    held = [size for size in tensor_sizes(model, (x, y, weights)) if size % MANY == 0]
    assert held  # chunks and kernels were seen
    assert max(held) < BATCH * MANY


def tensor_sizes(model: keras.Model, batch: Any) -> Iterator[int]:
    """Numbers of elements of every tensor that one training step makes."""
    match keras.backend.backend():
        case "jax":
            import jax

            arrays = tuple(jax.numpy.asarray(part) for part in batch)
            kinds = ("trainable", "non_trainable", "optimizer", "metrics")
            state = model._get_jax_state(**{f"{kind}_variables": True for kind in kinds})
            yield from _of_jaxpr(jax.make_jaxpr(model.train_step)(state, arrays).jaxpr)
        case "tensorflow":
            import tensorflow as tf

            step = tf.function(model.train_step, autograph=False)
            specs = tuple(tf.TensorSpec(part.shape, part.dtype) for part in batch)
            graph = step.get_concrete_function(specs).graph.as_graph_def(add_shapes=True)
            nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
            for node in nodes:
                for shape in node.attr["_output_shapes"].list.shape:
                    yield int(np.prod([max(1, axis.size) for axis in shape.dim]))
        case _:
            from torch.utils._python_dispatch import TorchDispatchMode

            sizes: list[int] = []

            class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
                def __torch_dispatch__(
                    self, func: Any, types: Any, args: Any = (), kwargs: Any = None
                ) -> Any:
                    del types
                    done = func(*args, **(kwargs or {}))
                    sizes.extend(t.numel() for t in keras.tree.flatten(done) if hasattr(t, "numel"))
                    return done

            watch: Any = Watch
            with watch():
                model.train_step(tuple(ops.convert_to_tensor(part) for part in batch))
            yield from sizes


def _of_jaxpr(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        yield from (
            int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape")
        )
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "jaxpr"):
                    yield from _of_jaxpr(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from _of_jaxpr(inner)


@pytest.mark.parametrize(
    ("classes", "dims", "labels"),
    [(1, (5,), np.zeros(6, int)), (3, (3, 5), np.full(6, 2))],
    ids=["one class, one dim", "labels of one class"],
)
def test_degenerate_data_trains(classes: int, dims: tuple[int, ...], labels: Any) -> None:
    body = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5)])  # no power of two
    model = MatryoshkaClassifier(body, MatryoshkaHead(classes, dims))
    accuracy = MatryoshkaMetric(keras.metrics.SparseCategoricalAccuracy(name="accuracy"), dims)
    loss = MatryoshkaLoss(SPARSE(from_logits=True))
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=[accuracy])
    history = model.fit(STEP_X[:6], labels, epochs=20, verbose=0).history
    assert history["loss"][-1] < 0.1
    assert history[f"accuracy_{dims[-1]}"][-1] == 1
    assert np.isfinite(np.concatenate([w.ravel() for w in model.get_weights()])).all()


def test_features_that_are_not_finite_make_the_loss_nan() -> None:
    model = MatryoshkaClassifier(backbone(), MatryoshkaHead(CLASSES, STEP_DIMS))
    accuracy = nested(keras.metrics.SparseCategoricalAccuracy(name="accuracy"))
    model.compile("sgd", MatryoshkaLoss(SPARSE(from_logits=True)), metrics=[accuracy])
    for value in (np.nan, np.inf):
        log = model.evaluate(np.full_like(STEP_X, value), STEP_Y, verbose=0, return_dict=True)
        assert np.isnan(log["loss"])
        assert log["accuracy_2"] < 0.5


def test_layers_that_add_losses_of_any_shape_count_as_in_keras() -> None:
    class Adds(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(0.01 * ops.square(x))
            return x

    body = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8), Adds()])
    model = MatryoshkaClassifier(body, MatryoshkaHead(CLASSES, STEP_DIMS))
    model.compile("sgd", MatryoshkaLoss(SPARSE(from_logits=True)))
    loss = model.evaluate(STEP_X, STEP_Y, batch_size=ROWS, verbose=0)
    made = as_numpy(body.layers[0](STEP_X))
    expected = 0.01 * np.square(made).sum()
    assert expected > 0.1
    plain = MatryoshkaLoss(SPARSE(from_logits=True))(STEP_Y, model.predict(STEP_X, verbose=0))
    assert loss == pytest.approx(float(plain) + expected, rel=1e-4)


class Scaled(MatryoshkaHead):
    """Another head: it reads other features with the same kernels."""

    def call(self, features: Any, training: bool | None = None) -> Any:
        return super().call(2.0 * features, training=training)


def test_a_head_of_another_kind_is_asked_for_its_logits() -> None:
    model = MatryoshkaClassifier(backbone(), Scaled(CLASSES, STEP_DIMS))
    loss = MatryoshkaLoss(SPARSE(from_logits=True))
    model.compile("sgd", loss)
    expected = float(loss(STEP_Y, model.predict(STEP_X, verbose=0)))
    assert model.evaluate(STEP_X, STEP_Y, verbose=0) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("compiled_with", "labels", "sentence"),
    [
        (
            {"metrics": [MatryoshkaMetric(keras.metrics.CategoricalAccuracy("a"), (2, 4, 8))]},
            STEP_Y,
            "A MatryoshkaMetric must name the dims of the head. "
            "Received: 'a' with dims=(2, 4, 8) for a head of (2, 5, 8). "
            "Leave dims out in a MatryoshkaClassifier.",
        ),
        (
            {"loss": MatryoshkaLoss(DENSE(from_logits=True))},
            STEP_Y,
            "CategoricalCrossentropy takes a share of every class per row. "
            "Received: labels of shape (33,) for 7 classes. "
            "Use SparseCategoricalCrossentropy for integer labels.",
        ),
        (
            {},
            np.eye(CLASSES)[STEP_Y],
            "SparseCategoricalCrossentropy takes one integer per row. "
            "Received: labels of shape (33, 7) for 7 classes. "
            "Use CategoricalCrossentropy for one-hot labels, or take their argmax.",
        ),
    ],
    ids=["other dims", "integers", "one-hot"],
)
def test_what_does_not_fit_the_head_is_refused(
    compiled_with: dict[str, Any], labels: Any, sentence: str
) -> None:
    loss = compiled_with.get("loss", MatryoshkaLoss(SPARSE(from_logits=True)))
    step = rowwise_step(loss, compiled_with.get("metrics"), None, None)
    assert step is not None
    head = MatryoshkaHead(CLASSES, STEP_DIMS)
    head.build((None, 8))
    features = ops.ones((ROWS, 8))
    with pytest.raises(ValueError, match=exactly(sentence)):
        step.compute_loss(head, features, labels, None, None, training=False)


@pytest.mark.parametrize("form", ["arrays", "PyDataset"])
@pytest.mark.parametrize("kind", [MatryoshkaClassifier, WithLogits])
def test_a_step_of_a_sequence_has_one_label(kind: Any, form: str) -> None:
    model = kind(masking(), MatryoshkaHead(CLASSES, STEP_DIMS))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x, y = TOKENS, np.maximum(NEXT, 0)[:, :-1]
    received = r"Received: labels of shape \((33|None), 4\) for sequences of 5 steps\. "
    with pytest.raises(ValueError, match=rf"have one label per step\. {received}Cut or pad"):
        model.fit(*((x, y) if form == "arrays" else (dataset(form, x, y, size=ROWS),)), verbose=0)
