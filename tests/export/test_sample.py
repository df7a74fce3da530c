"""What a sample may be, and that one the model cannot take does the model no harm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mrl import MatryoshkaHead
from keras_mrl_export import export_saved_model
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from tests.helpers.export_models import only_tensorflow

pytestmark = pytest.mark.backend

TEXTS = ["a small cat", "dog"]


def of_images() -> keras.Model:
    """A model that takes images of any size above four pixels."""
    inputs = keras.Input((None, None, 3), name="image")
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 5)(inputs))
    logits = MatryoshkaHead(3, dims=(2, 5))(keras.layers.Dense(5)(pooled))
    return keras.Model(inputs, logits, name="any_size")


class Interrupted(keras.layers.Layer):
    """A layer that meets Ctrl-C, once it is to."""

    meets = False

    def call(self, x: Any) -> Any:
        if self.meets:
            raise KeyboardInterrupt
        return x


def assert_unharmed(model: keras.Model, before: list[Any]) -> None:
    for weight, known in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, known)


def test_rows_the_model_cannot_take_leave_it_as_it_was(tmp_path: Path) -> None:
    model = of_images()
    before = model.get_weights()
    with pytest.raises(ValueError, match="sample must hold") as caught:
        export_saved_model(model, tmp_path, np.ones((2, 3, 3, 3), np.float32))
    text = str(caught.value)
    assert text.startswith(
        "sample must hold rows that the model takes. Received: (2, 3, 3, 3), and "
    )
    assert text.endswith(" Prepare its rows as in training: model(sample) must run.")
    assert "\n" not in text
    assert "\x1b" not in text
    assert_unharmed(model, before)
    assert model.predict(np.ones((2, 8, 8, 3), np.float32), verbose=0).shape == (2, 2, 3)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    inputs, layer = keras.Input((5,)), Interrupted()
    model = keras.Model(inputs, keras.layers.Dense(4)(layer(inputs)))
    before = model.get_weights()
    layer.meets = True
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(model, tmp_path, np.ones((2, 5), np.float32))
    assert_unharmed(model, before)


def test_more_rows_than_a_batch_are_all_compared(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(70, 5)).astype(np.float32)
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(4)(inputs))
    path = export_saved_model(model, tmp_path, rows, signatures=["features"])
    with SavedModelSession(path) as session:
        served = session.run("features", {"inputs": rows})["features"]
    np.testing.assert_allclose(served, model.predict(rows, verbose=0), rtol=1e-4, atol=1e-6)
    assert b'"rows": 70' in (path / "assets.extra/keras_mrl_parity.json").read_bytes()


def test_inputs_of_unequal_length(tmp_path: Path) -> None:
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    model = keras.Model([left, right], keras.layers.Concatenate()([left, right]))
    sample = {"left": np.ones((3, 4), np.float32), "right": np.ones((2, 3), np.float32)}
    with pytest.raises(ValueError, match="sample") as caught:
        export_saved_model(model, tmp_path, sample)
    assert str(caught.value) == (
        "sample must hold as many rows for every input, batch first. "
        "Received: left of shape (3, 4), right of shape (2, 3). Give the same rows of each."
    )


def test_complex_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample") as caught:
        export_saved_model(of_images(), tmp_path, np.ones((2, 8, 8, 3), complex))
    assert str(caught.value) == (
        "sample must hold numbers or strings, in arrays. "
        "Received: a ndarray of complex128. Give a few real rows, for example x[:8]."
    )


def of_texts(shape: tuple[int, ...]) -> keras.Model:
    words = keras.layers.TextVectorization(output_sequence_length=3, vocabulary=["a", "cat", "dog"])
    inputs = keras.Input(shape, dtype="string", name="text")
    vectors = keras.layers.Embedding(6, 4)(words(inputs))
    return keras.Model(inputs, keras.layers.Flatten()(vectors))


SAMPLES: dict[str, Callable[[], Any]] = {
    "a list": lambda: TEXTS,
    "str": lambda: np.array(TEXTS),
    "bytes": lambda: np.array([text.encode() for text in TEXTS]),
    "objects": lambda: np.array(TEXTS, dtype=object),
    "a tensor": lambda: tf.constant(TEXTS),
    "a column in a list": lambda: [[text] for text in TEXTS],
    "a column of str": lambda: np.array(TEXTS)[:, None],
    "a column of objects": lambda: np.array(TEXTS, dtype=object)[:, None],
    "a column in a tensor": lambda: tf.constant(TEXTS)[:, None],
    "by name": lambda: {"text": np.array(TEXTS)},
    "a list by name": lambda: {"text": TEXTS},
}


@only_tensorflow
@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_texts_in_any_form(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    model = of_texts(shape)
    path = export_saved_model(model, tmp_path, SAMPLES[kind](), signatures=["features"])
    manifest = Manifest.from_json((path / MANIFEST_FILE).read_bytes())
    assert manifest.inputs == {"text": {"dtype": "string", "shape": [None, *shape]}}
    column = np.array(TEXTS, dtype=object).reshape(len(TEXTS), *shape)
    with SavedModelSession(path) as session:
        served = session.run("features", {"text": column})["features"]
    np.testing.assert_array_equal(served, model(tf.constant(column)))


@only_tensorflow
def test_a_sequential_model_of_texts_that_declares_no_input(tmp_path: Path) -> None:
    words = keras.layers.TextVectorization(output_sequence_length=3, vocabulary=["a", "cat"])
    model = keras.Sequential([words, keras.layers.Embedding(6, 4), keras.layers.Flatten()])
    path = export_saved_model(model, tmp_path, np.array(TEXTS), signatures=["features"])
    manifest = Manifest.from_json((path / MANIFEST_FILE).read_bytes())
    assert manifest.inputs == {"inputs": {"dtype": "string", "shape": [None]}}


@pytest.mark.parametrize("sample", [["a", 1], [["a"], ["b", "c"]], [b"a", None]])
def test_lists_that_are_not_texts_alone(tmp_path: Path, sample: Any) -> None:
    with pytest.raises(ValueError, match="sample") as caught:
        export_saved_model(of_images(), tmp_path, sample)
    assert str(caught.value) == (
        "sample must hold numbers or strings, in arrays. "
        "Received: a list. Give a few real rows, for example x[:8]."
    )
