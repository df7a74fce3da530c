"""Any Keras model as backbone."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    MatryoshkaClassifier,
    MatryoshkaHead,
    MatryoshkaLoss,
    split,
)
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
