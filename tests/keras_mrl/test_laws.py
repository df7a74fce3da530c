"""The laws of `tests/helpers/laws.py`, over every public Keras class and every nested loss."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mrl
from keras_mrl import (
    MatryoshkaClassifier,
    MatryoshkaHead,
    MatryoshkaLoss,
    MatryoshkaMetric,
    TextEncoder,
    Truncate,
)
from keras_mrl.baselines import Slimmable, Switchable
from tests.helpers import embedding_laws as embeddings
from tests.helpers import language_models as language
from tests.helpers import laws
from tests.helpers.laws import Example, NestedLoss, Wrong
from tests.helpers.small_models import (
    DIMS,
    NUM_CLASSES,
    X,
    Y,
    backbone,
    compiled,
    cross_entropy,
    functional,
    run_fresh,
)

# Configurations, arguments and refusals are the same on every backend.
backend = pytest.mark.backend

RANDOM = np.random.default_rng(1)
FEATURES = RANDOM.normal(size=(len(X), 8)).astype("float32")
WIDE = np.concatenate([FEATURES, -FEATURES[:, :4]], axis=1)
LOGITS = RANDOM.normal(size=(len(X), len(DIMS), NUM_CLASSES)).astype("float32")


def with_head(head: MatryoshkaHead) -> keras.Model:
    return compiled(functional(head))


def with_truncate(layer: Truncate) -> keras.Model:
    inputs = keras.Input((5,))
    model = keras.Model(inputs, layer(keras.layers.Dense(8)(inputs)))
    model.compile("sgd", "mse")
    return model


def with_loss(loss: MatryoshkaLoss) -> keras.Model:
    return compiled(functional(), loss=loss)


def with_metric(metric: MatryoshkaMetric) -> keras.Model:
    return compiled(functional(), metrics=[metric])


NUM_CLASSES_SENTENCE = (
    "num_classes must be a positive integer. Received: num_classes=0. "
    "Count the classes of your labels: labels 0..9 make num_classes=10."
)
UNSORTED_SENTENCE = (
    "dims must be strictly increasing positive integers. Received: dims=(16, 8, 8). "
    "Sort them and drop repeats: dims=(8, 16)."
)
TOO_WIDE_SENTENCE = (
    "dims must not exceed the width of the features. "
    "Received: dims=(2, 16) for features of width 8. "
    "Drop the dims above 8, or widen the layer that makes the features."
)

HEADS = (
    Wrong(make=lambda: MatryoshkaHead(0), error=ValueError, sentence=NUM_CLASSES_SENTENCE),
    Wrong(
        make=lambda: MatryoshkaHead(3, dims=(16, 8, 8)),
        error=ValueError,
        sentence=UNSORTED_SENTENCE,
    ),
    Wrong(
        make=lambda: MatryoshkaHead(3, dims=(2, 16))(FEATURES),
        error=ValueError,
        sentence=TOO_WIDE_SENTENCE,
    ),
)
TRUNCATES = (
    Wrong(
        make=lambda: Truncate(0),
        error=ValueError,
        sentence=(
            "dims must be strictly increasing positive integers. Received: dims=(0,). "
            "Give prefix lengths, for example dims=(8, 16, 32)."
        ),
    ),
    Wrong(
        make=lambda: Truncate(9)(FEATURES),
        error=ValueError,
        sentence=(
            "dims must not exceed the width of the features. "
            "Received: dims=(9,) for features of width 8. "
            "Drop the dims above 8, or widen the layer that makes the features."
        ),
    ),
)
LOSSES = (
    Wrong(
        make=lambda: MatryoshkaLoss("sparse_categorical_crossentropy"),
        error=TypeError,
        sentence=(
            "loss must be a Keras loss for one dim. Received: 'sparse_categorical_crossentropy'. "
            "Give an instance, for example "
            "keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
        ),
    ),
    Wrong(
        make=lambda: MatryoshkaLoss(cross_entropy(), weights=(1.0, -1.0)),
        error=ValueError,
        sentence=(
            "weights must be finite, not negative, and not all zero. "
            "Received: weights=(1.0, -1.0). "
            "Give a dim weight 0 to leave it out, a larger one to favour it."
        ),
    ),
)
METRICS = (
    Wrong(
        make=lambda: MatryoshkaMetric("accuracy", DIMS),
        error=TypeError,
        sentence=(
            "metric must be a Keras metric for one dim. Received: 'accuracy'. "
            "Give an instance, for example "
            "keras.metrics.SparseCategoricalAccuracy(name='accuracy')."
        ),
    ),
    Wrong(
        make=lambda: MatryoshkaMetric(keras.metrics.SparseCategoricalAccuracy(), (16, 8, 8)),
        error=ValueError,
        sentence=UNSORTED_SENTENCE,
    ),
)
CLASSIFIERS = (
    Wrong(
        make=lambda: MatryoshkaClassifier("resnet", None),  # type: ignore[arg-type]
        error=TypeError,
        sentence=(
            "MatryoshkaClassifier joins a Keras model and a MatryoshkaHead. "
            "Received: backbone='resnet', head=None. "
            "Write MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes))."
        ),
    ),
)


def head_example(**arguments: Any) -> Example:
    return Example(
        make=lambda: MatryoshkaHead(NUM_CLASSES, **arguments),
        model=with_head,
        x=X,
        y=Y,
        inputs=(FEATURES,),
        wrong=HEADS,
    )


def truncate_example(**arguments: Any) -> Example:
    return Example(
        make=lambda: Truncate(4, **arguments),
        model=with_truncate,
        x=X,
        y=FEATURES[:, :4],
        inputs=(FEATURES,),
        wrong=TRUNCATES,
    )


def loss_example(**arguments: Any) -> Example:
    return Example(
        make=lambda: MatryoshkaLoss(cross_entropy(), **arguments),
        model=with_loss,
        x=X,
        y=Y,
        inputs=(Y, LOGITS),
        wrong=LOSSES,
    )


def metric_example(**arguments: Any) -> Example:
    inner = keras.metrics.SparseCategoricalCrossentropy(name="entropy", from_logits=True)
    return Example(
        make=lambda: MatryoshkaMetric(inner, DIMS, **arguments),
        model=with_metric,
        x=X,
        y=Y,
        inputs=(),
        wrong=METRICS,
    )


def classifier_example(**arguments: Any) -> Example:
    return Example(
        make=lambda: MatryoshkaClassifier(
            backbone(), MatryoshkaHead(NUM_CLASSES, dims=DIMS), **arguments
        ),
        model=compiled,
        x=X,
        y=Y,
        inputs=(X,),
        wrong=CLASSIFIERS,
    )


def text_encoder_example() -> Example:
    def made() -> TextEncoder:
        inputs = keras.Input((5,))
        vectors = keras.layers.Dense(8, activation="tanh")(keras.layers.Reshape((5, 1))(inputs))
        return TextEncoder(keras.Model(inputs, vectors), pooling="first")

    def compiled_on_features(model: TextEncoder) -> keras.Model:
        model.compile("sgd", "mse")
        return model

    return Example(
        make=made,
        model=compiled_on_features,
        x=X,
        y=FEATURES,
        inputs=(X,),
        wrong=(
            Wrong(
                make=lambda: TextEncoder(functional(), pooling="max"),
                error=ValueError,
                sentence=(
                    "pooling must be one of 'mean', 'first', 'last'. Received: pooling='max'. "
                    "A keras_hub.models.TextEmbedder keeps its own pooling: give it as the tower."
                ),
            ),
        ),
    )


def with_half(layer: Slimmable | Switchable) -> keras.Model:
    """The layer at its full width, and at half of it."""
    inputs = keras.Input((5,))
    full = layer(keras.layers.Dense(8)(inputs))
    half = layer(keras.layers.Dense(4)(inputs), share=0.5)
    model = keras.Model(inputs, keras.layers.Concatenate()([full, half]))
    model.compile("sgd", "mse")
    return model


def slimmable_example() -> Example:
    return Example(
        make=lambda: Slimmable(keras.layers.Dense(6, activation="tanh")),
        model=with_half,
        x=X,
        y=WIDE[:, :9],
        inputs=(FEATURES,),
        wrong=(
            Wrong(
                make=lambda: Slimmable(keras.layers.ReLU(name="relu")),
                error=TypeError,
                sentence=(
                    "Slimmable makes a keras.layers.Dense or Conv2D (channels last, no groups) "
                    "narrower. Received: <ReLU name=relu, built=True>. "
                    "Give a layer that has its own weights at every width to Switchable."
                ),
            ),
        ),
    )


def switchable_example() -> Example:
    return Example(
        make=lambda: Switchable(keras.layers.LayerNormalization(), shares=(0.5, 1)),
        model=with_half,
        x=X,
        y=WIDE,
        inputs=(FEATURES,),
        wrong=(
            Wrong(
                make=lambda: Switchable(keras.layers.LayerNormalization(), shares=(1, 0.5)),
                error=ValueError,
                sentence=(
                    "shares must ascend from above 0 to 1. Received: shares=(1.0, 0.5). "
                    "Divide the dims by the widest: (0.25, 0.5, 1.0)."
                ),
            ),
            Wrong(
                make=lambda: Switchable("batch_normalization", shares=(1,)),
                error=TypeError,
                sentence=(
                    "Switchable copies a Keras layer. Received: 'batch_normalization'. "
                    "Give an instance, e.g. keras.layers.BatchNormalization()."
                ),
            ),
        ),
    )


EXAMPLES: dict[str, Example] = {
    "head": head_example(dims=DIMS),
    "head-ladder": head_example(use_bias=False, kernel_regularizer="l2"),
    "head-tied": head_example(dims=(3, 8), tied=True),
    "truncate": truncate_example(),
    "truncate-raw": truncate_example(normalize=False),
    "loss": loss_example(weights=(2.0, 1.0, 0.5)),
    "metric": metric_example(),
    "classifier": classifier_example(name="nested"),
    "text-encoder": text_encoder_example(),
    "slimmable": slimmable_example(),
    "switchable": switchable_example(),
    **embeddings.EXAMPLES,
    **language.EXAMPLES,
}
LAWS_OF_ARGUMENTS: tuple[Callable[[Example], None], ...] = (
    laws.config_is_json_and_round_trips,
    laws.every_argument_is_stored_under_its_name,
    laws.bad_arguments_raise,
)
LAWS_OF_NUMBERS: tuple[Callable[[Example], None], ...] = (
    laws.one_fit_step_moves_every_trainable_weight,
    laws.low_precision_agrees,
)

examples = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)


def test_every_public_keras_class_has_an_example() -> None:
    keras_classes = laws.public_keras_classes(keras_mrl)
    assert len(keras_classes) >= 5
    classes = {c for c in keras_classes if not issubclass(c, keras.callbacks.Callback)}
    assert {type(example.make()) for example in EXAMPLES.values()} == classes


@examples
@pytest.mark.parametrize("law", LAWS_OF_ARGUMENTS, ids=lambda law: law.__name__)
def test_the_arguments_of_every_keras_class(
    law: Callable[[Example], None], example: Example
) -> None:
    law(example)


@backend
@examples
@pytest.mark.parametrize("law", LAWS_OF_NUMBERS, ids=lambda law: law.__name__)
def test_every_keras_class(law: Callable[[Example], None], example: Example) -> None:
    law(example)


@backend
@pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=name)
        for name, example in EXAMPLES.items()
        if name not in ("metric", "perplexity")
    ],
)
def test_symbolic_shape_is_eager_shape(example: Example) -> None:
    laws.symbolic_shape_is_eager_shape(example)


@backend
@examples
def test_save_and_load_keep_outputs(example: Example, tmp_path: Path) -> None:
    laws.save_and_load_keep_outputs(example, tmp_path / "model.keras")


@backend
def test_a_fresh_process_that_only_imports_keras_mrl_loads_every_class(tmp_path: Path) -> None:
    for name, example in EXAMPLES.items():
        model = example.build()
        model.save(tmp_path / f"{name}.keras")
        np.savez(tmp_path / f"{name}.npz", x=example.x, output=laws.as_float(model(example.x)))
    program = """
import json, pathlib, sys
import keras, numpy as np
import keras_mrl
loaded = {}
for path in pathlib.Path(sys.argv[1]).glob("*.keras"):
    model, saved = keras.saving.load_model(path), np.load(path.with_suffix(".npz"))
    received = keras.ops.convert_to_numpy(model(saved["x"]))
    np.testing.assert_allclose(received, saved["output"], rtol=1e-6, atol=1e-6)
    loaded[path.stem] = type(model.loss).__name__
print(json.dumps(loaded))
"""
    loaded = json.loads(run_fresh(program, tmp_path).splitlines()[-1])
    assert loaded.keys() == EXAMPLES.keys()
    assert loaded["loss"] == "MatryoshkaLoss"


ONE_HOT = np.eye(NUM_CLASSES, dtype="float32")[Y]
SOME_IGNORED = np.where(Y == 2, -1, Y)


def nested(inner: keras.losses.Loss, labels: Any) -> NestedLoss:
    def make(weights: Sequence[float] | None) -> MatryoshkaLoss:
        return MatryoshkaLoss(inner, weights)

    return NestedLoss(make=make, inner=inner, labels=labels, logits=LOGITS)


NESTED_LOSSES: dict[str, NestedLoss] = {
    "sparse": nested(cross_entropy(), Y),
    "sparse-column": nested(cross_entropy(), Y[:, None]),
    "sparse-sum": nested(cross_entropy(reduction="sum"), Y),
    "sparse-ignoring": nested(cross_entropy(ignore_class=-1), SOME_IGNORED),
    "one-hot": nested(
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1), ONE_HOT
    ),
    "binary": nested(keras.losses.BinaryCrossentropy(from_logits=True), ONE_HOT),
    "focal": nested(keras.losses.CategoricalFocalCrossentropy(from_logits=True), ONE_HOT),
    "squares": nested(keras.losses.MeanSquaredError(), ONE_HOT),
}
NESTED_LAWS: tuple[Callable[[NestedLoss], None], ...] = (
    laws.weight_zero_is_absence,
    laws.weights_add,
    laws.no_weights_are_ones,
    laws.one_dim_is_the_inner_loss,
    laws.permuting_the_batch_permutes_the_result,
)


def test_every_public_nested_loss_has_an_example() -> None:
    classes = laws.public_keras_classes(keras_mrl)
    losses = {c for c in classes if issubclass(c, keras.losses.Loss)}
    tables: list[Any] = [*NESTED_LOSSES.values(), *embeddings.NESTED_LOSSES.values()]
    assert {type(loss.make(None)) for loss in tables} == losses


@backend
@pytest.mark.parametrize("loss", NESTED_LOSSES.values(), ids=NESTED_LOSSES)
@pytest.mark.parametrize("law", NESTED_LAWS, ids=lambda law: law.__name__)
def test_every_nested_loss(law: Callable[[NestedLoss], None], loss: NestedLoss) -> None:
    law(loss)


@backend
@pytest.mark.parametrize(
    "loss", embeddings.NESTED_LOSSES.values(), ids=list(embeddings.NESTED_LOSSES)
)
@pytest.mark.parametrize("law", embeddings.NESTED_LAWS, ids=lambda law: law.__name__)
def test_every_nested_loss_on_embeddings(
    law: Callable[[laws.NestedEmbeddingLoss], None], loss: laws.NestedEmbeddingLoss
) -> None:
    law(loss)


@backend
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_nothing_is_learnt_beyond_the_widest_dim(tied: bool) -> None:
    head = MatryoshkaHead(NUM_CLASSES, dims=(1, 2, 4), tied=tied)
    laws.nothing_is_learnt_beyond_the_widest_dim(NESTED_LOSSES["sparse"], head)
