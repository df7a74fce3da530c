"""Any Keras model as backbone; and `fit` without logits: the same numbers, no batch of logits."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
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
    split,
)
from keras_mrl.losses import crossentropy
from keras_mrl.models.classifier import rowwise_step
from tests.helpers.laws import exactly, policy
from tests.helpers.small_models import (
    DIMS,
    NUM_CLASSES,
    X,
    Y,
    accuracy,
    as_numpy,
    backbone,
    classifier,
    compiled,
    cross_entropy,
    run_fresh,
)

pytestmark = pytest.mark.backend

PAIR = {"left": X, "right": 2 * X}


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.features = keras.layers.Dense(8)

    def call(self, inputs: Any) -> Any:
        return self.features(inputs)


@keras.saving.register_keras_serializable(package="tests")
class SubclassedPair(Subclassed):
    def call(self, inputs: Any) -> Any:
        return self.features(inputs["left"] - inputs["right"])


def functional_body() -> keras.Model:
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(8, activation="tanh")(inputs)
    return keras.Model(inputs, keras.layers.Add()([hidden, keras.layers.Dense(8)(inputs)]))


def pair_body() -> keras.Model:
    inputs = {name: keras.Input((5,), name=name) for name in PAIR}
    joined = keras.layers.Concatenate()([*inputs.values()])
    return keras.Model(inputs, keras.layers.Dense(8)(joined))


BODIES: dict[str, tuple[Callable[[], keras.layers.Layer], Any]] = {
    "sequential": (backbone, X),
    "sequential without an input": (lambda: keras.Sequential([keras.layers.Dense(8)]), X),
    "functional": (functional_body, X),
    "functional of a dict": (pair_body, PAIR),
    "subclassed": (Subclassed, X),
    "subclassed of a dict": (SubclassedPair, PAIR),
    "a layer": (lambda: keras.layers.Dense(8), X),
}


@pytest.mark.parametrize(("body", "x"), BODIES.values(), ids=BODIES)
def test_any_keras_model_trains_saves_and_is_cut(
    body: Callable[[], keras.layers.Layer], x: Any, tmp_path: Path
) -> None:
    model = classifier(body(), metrics=[accuracy()])
    model.fit(x, Y, verbose=0)
    logits = model.predict(x, verbose=0)
    assert logits.shape == (12, 3, NUM_CLASSES)
    for m, dim in enumerate(DIMS):
        np.testing.assert_allclose(as_numpy(model.at(dim)(x)), logits[:, m], rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(as_numpy(loaded(x)), logits, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(as_numpy(loaded.at(4)(x)), logits[:, 1], rtol=1e-5, atol=1e-6)


def test_a_loaded_model_goes_on_training_where_it_stopped(tmp_path: Path) -> None:
    model = classifier(optimizer=keras.optimizers.Adam(0.01), metrics=[accuracy()])
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.fit(X, Y, epochs=2, shuffle=False, verbose=0).history
    received = loaded.fit(X, Y, epochs=2, shuffle=False, verbose=0).history
    assert received.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(received[name], values, rtol=1e-5, err_msg=name)
    assert isinstance(loaded.loss, MatryoshkaLoss)


def test_sequences_of_features_are_classified_step_by_step() -> None:
    body = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(9, 8)])
    model = classifier(body)
    tokens = np.arange(8).reshape(2, 4)
    assert model.predict(tokens, verbose=0).shape == (2, 4, 3, NUM_CLASSES)
    model.fit(tokens, tokens % NUM_CLASSES, verbose=0)
    logits = model.predict(tokens, verbose=0)
    cut = model.at(4).predict(tokens, verbose=0)
    np.testing.assert_allclose(cut, logits[:, :, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [(None, MatryoshkaHead(3)), (backbone(), None)])
def test_what_is_no_model_and_head_is_refused(parts: Any) -> None:
    body, head = parts
    sentence = (
        "MatryoshkaClassifier joins a Keras model and a MatryoshkaHead. "
        f"Received: backbone={body!r}, head={head!r}. "
        "Write MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes))."
    )
    with pytest.raises(TypeError, match=exactly(sentence)):
        MatryoshkaClassifier(body, head)


def of_outputs(*widths: int) -> keras.Model:
    inputs = keras.Input((5,))
    outputs = [keras.layers.Dense(width)(inputs) for width in widths]
    return keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0])


@pytest.mark.parametrize(
    ("body", "x", "sentence"),
    [
        (
            keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(8, 1)]),
            np.ones((2, 4, 4, 1), "float32"),
            "A backbone must end in features (batch, width), or (batch, time, width) for "
            "sequences. Received: a backbone whose output is (None, 4, 4, 8). Add a pooling layer: "
            "MatryoshkaClassifier(backbone, head, pooling=keras.layers.GlobalAveragePooling2D()).",
        ),
        (
            of_outputs(4, 8),
            X,
            "A backbone must give one tensor of features. "
            "Received: a backbone whose outputs are [(None, 4), (None, 8)]. "
            "Make a model of the one to use, keras.Model(backbone.input, backbone.output[0]), "
            "or give pooling=, a layer that makes features of them.",
        ),
        (
            of_outputs(6),
            X,
            "dims must not exceed the width of the features. "
            "Received: dims=(2, 4, 8) for features of width 6. "
            "Drop the dims above 6, or widen the layer that makes the features.",
        ),
    ],
    ids=["feature map", "several outputs", "narrow"],
)
def test_a_backbone_that_makes_no_features_is_refused(
    body: keras.Model, x: Any, sentence: str
) -> None:
    with pytest.raises(ValueError, match=exactly(sentence)):
        classifier(body)(x)


def frozen_sentences(train: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        train()
    return [str(w.message) for w in record if "Matryoshka" in str(w.message)]


def test_a_frozen_backbone_is_warned_of_once_and_on_fit_alone(tmp_path: Path) -> None:
    body = backbone()
    body.trainable = False
    model = classifier(body)
    path = tmp_path / "model.keras"

    def look() -> None:
        model.predict(X, verbose=0)
        model.evaluate(X, Y, verbose=0)
        model.save(path)
        keras.saving.load_model(path)(X)

    def train() -> None:
        model.fit(X, Y, batch_size=4, epochs=2, verbose=0)
        model.fit(X, Y, batch_size=4, verbose=0)

    assert frozen_sentences(look) == []
    assert frozen_sentences(train) == [
        "A Matryoshka head needs features that can learn to nest. "
        "Received: features none of whose weights can be trained; a new head on a frozen backbone "
        "gives about 5% at 8 dims (the paper's own finding). "
        "Unfreeze the last blocks of the backbone, or put a trainable layer before the head, "
        "e.g. keras.layers.Dense(width)."
    ]


def test_a_trainable_layer_after_a_frozen_one_is_enough() -> None:
    frozen = keras.layers.Dense(8, trainable=False)
    body = keras.Sequential([keras.Input((5,)), frozen, keras.layers.Dense(8)])
    model = classifier(body)
    assert frozen_sentences(lambda: model.fit(X, Y, verbose=0)) == []


def test_training_and_inference_reach_the_backbone() -> None:
    body = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8), keras.layers.Dropout(0.5)])
    model = classifier(body)
    quiet, loud = as_numpy(model(X)), as_numpy(model(X, training=True))
    np.testing.assert_array_equal(quiet, as_numpy(model(X, training=False)))
    assert not np.allclose(quiet, loud)


def test_the_mask_of_a_sequence_reaches_the_loss() -> None:
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0]])
    labels = np.array([[0, 1, 2, 1], [1, 2, 2, 2]])
    inputs = keras.Input((4,), dtype="int32")
    model = classifier(keras.Model(inputs, keras.layers.Embedding(5, 8, mask_zero=True)(inputs)))
    there = tokens != 0
    expected = MatryoshkaLoss(cross_entropy())(labels[there], as_numpy(model(tokens))[there])
    received = model.evaluate(tokens, labels, verbose=0)
    np.testing.assert_allclose(received, float(expected), rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_low_precision_model_is_cut_in_its_own_precision(tied: bool) -> None:
    with policy("mixed_bfloat16"):
        head = MatryoshkaHead(NUM_CLASSES, dims=DIMS, tied=tied)
        model = compiled(MatryoshkaClassifier(backbone(), head))
    logits = as_numpy(keras.ops.cast(model(X), "float32"))
    for m, dim in enumerate(DIMS):
        plain = model.at(dim)  # cut under the default policy
        assert keras.backend.standardize_dtype(plain(X).dtype) == "bfloat16"
        received = as_numpy(keras.ops.cast(plain(X), "float32"))
        np.testing.assert_allclose(received, logits[:, m], rtol=2**-6, atol=2**-6)


def test_a_cut_model_loads_where_there_is_no_keras_mrl(tmp_path: Path) -> None:
    for name, (body, x) in BODIES.items():
        if name.startswith("subclassed"):
            continue  # a class of the user's own must be importable there, as ever
        model = classifier(body())
        logits = as_numpy(model(x))
        folder = tmp_path / name
        folder.mkdir()
        model.save(folder / "whole.keras")
        model.at(4).save(folder / "cut.keras")
        named = x if isinstance(x, dict) else {"x": x}
        np.savez(folder / "x.npz", **named)
        np.save(folder / "logits.npy", logits[:, 1])
    program = """
import pathlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0].startswith("keras_mrl"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocker())
import keras, numpy as np

for folder in pathlib.Path(sys.argv[1]).iterdir():
    inputs = dict(np.load(folder / "x.npz"))
    cut = keras.saving.load_model(folder / "cut.keras")
    logits = keras.ops.convert_to_numpy(cut(inputs.get("x", inputs)))
    np.testing.assert_allclose(logits, np.load(folder / "logits.npy"), rtol=1e-5, atol=1e-6)
    try:
        keras.saving.load_model(folder / "whole.keras")
    except TypeError:
        print(folder.name)
assert not any(name.startswith("keras_mrl") for name in sys.modules)
"""
    printed = run_fresh(program, tmp_path).splitlines()
    expected = sorted(name for name in BODIES if not name.startswith("subclassed"))
    assert sorted(printed) == expected


def test_fit_needs_a_loss() -> None:
    text = (
        "MatryoshkaClassifier trains on the loss that it is compiled with. "
        "Received: loss=None. Compile with loss='sparse_categorical_crossentropy'."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        classifier(loss=None).fit(X, Y, verbose=0)


def test_all_that_a_users_model_does_before_its_head_makes_the_features() -> None:
    class Rectified(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = keras.layers.Dense(8)
            self.head = MatryoshkaHead(3, dims=(4, 8))

        def call(self, x: Any) -> Any:
            return self.head(keras.ops.relu(self.backbone(x)))

    model = Rectified()
    model(X)
    body, head = split(model)
    assert head is model.head
    assert as_numpy(body(X)).min() == 0
    np.testing.assert_allclose(as_numpy(head(body(X))), as_numpy(model(X)), rtol=1e-5, atol=1e-6)


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
