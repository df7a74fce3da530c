"""What the inputs of a served model are called, and of what type they are."""

import re
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaHead
from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.sample import as_declared, name_inputs
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from tests.helpers.export_models import Arrays, only_tensorflow

pytestmark = pytest.mark.backend

X = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def functional(*names: str | None) -> keras.Model:
    inputs = [keras.Input((5,), name=name) for name in names]
    joined = keras.layers.Add()(inputs) if len(inputs) > 1 else inputs[0]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], keras.layers.Dense(8)(joined))


def sequential(name: str | None) -> keras.Model:
    return keras.Sequential([keras.Input((5,), name=name), keras.layers.Dense(8)])


def called() -> keras.Model:
    """A sequential model that learns the shape of its input from the first rows it sees."""
    model = keras.Sequential([keras.layers.Dense(8), keras.layers.Dense(8)])
    model(X)
    return model


class Subclassed(keras.Model):
    """A model that declares no input."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(8)

    def build(self, input_shape: Any) -> None:
        shape = next(iter(input_shape.values())) if isinstance(input_shape, dict) else input_shape
        self.dense.build(shape)

    def call(self, inputs: Any) -> Any:
        given = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
        return self.dense(sum(given[1:], given[0]))


def test_the_name_of_a_single_input() -> None:
    assert name_inputs(functional("image"), X) == {"": "image"}
    assert name_inputs(functional("image"), {"image": X}) == {"image": "image"}
    assert name_inputs(sequential("image"), X) == {"": "image"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: functional(None),
        lambda: functional("keras_tensor_93"),
        lambda: functional("input_layer_2"),
        lambda: functional("input_1"),
        lambda: sequential(None),
        called,
        Subclassed,
    ],
)
def test_a_single_input_without_a_name_of_its_own(make: Any) -> None:
    model = make()
    assert name_inputs(model, X) == {"": "inputs"}


def test_a_name_that_only_begins_like_one_keras_makes_up_is_kept() -> None:
    for name in ("input_ids", "inputs", "keras_tensor_x", "my_input_1"):
        assert name_inputs(functional(name), X) == {"": name}


def test_several_inputs_keep_their_names() -> None:
    both = {"b": X, "a": X}
    assert name_inputs(functional("a", "b"), both) == {"b": "b", "a": "a"}
    assert name_inputs(Subclassed(), both) == {"b": "b", "a": "a"}


def test_inputs_declared_as_a_dict_go_by_its_keys() -> None:
    inputs = {"left": keras.Input((5,), name="x"), "right": keras.Input((5,), name="y")}
    with pytest.warns(UserWarning, match="all keys in the dict must match the names"):
        model = keras.Model(inputs, keras.layers.Dense(8)(keras.layers.Add()([*inputs.values()])))
    both = {"left": X, "right": X}
    assert name_inputs(model, both) == {"left": "left", "right": "right"}


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sample_is_no_list(kind: type) -> None:
    with pytest.raises(ValueError, match="sample") as caught:
        name_inputs(functional("a", "b"), kind([X, X]))
    assert str(caught.value) == (
        "sample must be one array, or a dict by input name. "
        f"Received: a {kind.__name__}. Write {{name: array}}."
    )


@pytest.mark.parametrize(
    ("names", "sample", "known", "received"),
    [
        (("a", "b"), X, "a, b", "one array"),
        (("a", "b"), {"a": X}, "a, b", "a"),
        (("a", "b"), {"a": X, "c": X}, "a, b", "a, c"),
        (("a",), {"inputs": X}, "a", "inputs"),
        (("a",), {"a": X, "b": X}, "a", "a, b"),
    ],
)
def test_a_sample_of_other_names(
    names: tuple[str, ...], sample: Any, known: str, received: str
) -> None:
    with pytest.raises(ValueError, match="sample") as caught:
        name_inputs(functional(*names), sample)
    assert str(caught.value) == (
        f"sample must hold the inputs of the model: {known}. Received: {received}. "
        "Write {name: array} with those names."
    )


@pytest.mark.parametrize("name", ["pixel-values", "a b", "_hidden", "1st", "größe", "self"])
def test_a_name_tensorflow_would_change_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="served input") as caught:
        name_inputs(Subclassed(), {name: X, "other": X})
    assert str(caught.value) == (
        "A served input's name must be a letter, then letters, digits and underscores, and "
        f"not self. Received: {name!r}. Put an input of another name before the model: "
        "x = keras.Input(..., name='image'); keras.Model(x, model(x))."
    )


def export(model: keras.Model, base_path: Path, sample: Any) -> tuple[Manifest, Any]:
    path = export_saved_model(model, base_path, sample)
    manifest = Manifest.from_json((path / MANIFEST_FILE).read_bytes())
    return manifest, path


def features(path: Path, inputs: Arrays) -> Any:
    with SavedModelSession(path) as session:
        return session.run("features", inputs)["features"]


@only_tensorflow
@pytest.mark.parametrize(
    ("model", "sample"),
    [
        (sequential("image"), X),
        (called(), X),
        (functional("right", "left"), {"left": X, "right": 2 * X}),
        (functional("image"), {"image": X}),
        (Subclassed(), {"a": X, "b": 2 * X}),
        (Subclassed(), X.astype(np.float64)),
    ],
    ids=["sequential", "called", "two", "one by name", "subclassed of two", "float64"],
)
def test_the_inputs_of_the_manifest_are_those_of_the_signatures(
    tmp_path: Path, model: keras.Model, sample: Any
) -> None:
    manifest, path = export(model, tmp_path, sample)
    by_name = sample if isinstance(sample, dict) else {"": sample}
    names = name_inputs(model, sample)
    assert manifest.inputs == {
        name: {"dtype": "float32", "shape": [None, 5]} for name in names.values()
    }
    served = {names[key]: array.astype(np.float32) for key, array in by_name.items()}
    np.testing.assert_allclose(
        features(path, served),
        model.predict(as_declared(model, sample), verbose=0),
        rtol=1e-5,
        atol=1e-6,
    )


@only_tensorflow
def test_a_sequential_model_that_ends_in_a_head(tmp_path: Path) -> None:
    model = sequential("image")
    model.add(MatryoshkaHead(3, dims=(2, 8)))
    manifest, path = export(model, tmp_path, X)
    assert (manifest.kind, list(manifest.inputs)) == ("classifier", ["image"])
    with SavedModelSession(path) as session:
        answer = session.run("head_8", {"features": features(path, {"image": X})})
    expected = model.predict(X, verbose=0)[:, 1]
    np.testing.assert_allclose(answer["logits"], expected, rtol=1e-5, atol=1e-6)


@only_tensorflow
def test_text_is_served_with_its_vocabulary(tmp_path: Path) -> None:
    words = keras.layers.TextVectorization(output_sequence_length=3)
    words.adapt(["a small cat", "a dog"])
    inputs = keras.Input((), dtype="string", name="text")
    vectors = keras.layers.Embedding(words.vocabulary_size(), 4)(words(inputs))
    model = keras.Model(inputs, keras.layers.Flatten()(vectors))
    sample = np.array(["a cat", "", "a dog", "bird"], dtype=object)
    manifest, path = export(model, tmp_path, sample)
    assert manifest.inputs == {"text": {"dtype": "string", "shape": [None]}}
    np.testing.assert_array_equal(
        features(path, {"text": sample}), model.predict(sample, verbose=0)
    )


def refused_operations(model: keras.Model, base_path: Path, sample: Any) -> list[str]:
    with pytest.raises(ExportError) as caught:
        export_saved_model(model, base_path, sample)
    assert list(base_path.iterdir()) == []
    found = re.fullmatch(
        r"A served graph may hold only operations of TensorFlow itself\. "
        r"Received: a model that needs (.*)\. Do this before the model, in the client, or by "
        r"layers of Keras: TextVectorization for a tokenizer of tensorflow-text, keras\.ops for "
        r"tf\.py_function\.",
        str(caught.value),
    )
    assert found
    return found[1].split(", ")


@only_tensorflow
def test_a_tokenizer_that_no_server_has_is_refused(tmp_path: Path) -> None:
    """It runs in this process, where tensorflow-text is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizers = pytest.importorskip("keras_hub").tokenizers
    words = tokenizers.WordPieceTokenizer(
        vocabulary=["[PAD]", "[UNK]", "a", "cat", "##s"], sequence_length=4
    )
    inputs = keras.Input((), dtype="string", name="text")
    vectors = keras.layers.Embedding(5, 4)(words(inputs))
    model = keras.Model(inputs, keras.layers.Flatten()(vectors))
    needed = refused_operations(model, tmp_path, np.array(["a cat", "cats"], dtype=object))
    assert "WordpieceTokenizeWithOffsets" in "".join(needed)


class Python(keras.layers.Layer):
    """A layer that calls Python from the graph."""

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        twice = tf.py_function(lambda array: 2 * array, [x], tf.float32)
        twice.set_shape(x.shape)
        return twice


@only_tensorflow
def test_python_inside_the_graph_is_refused(tmp_path: Path) -> None:
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(8)(Python()(inputs)))
    assert refused_operations(model, tmp_path, X) == ["EagerPyFunc"]


@only_tensorflow
def test_operations_that_keras_uses_beside_the_public_ones_are_taken(tmp_path: Path) -> None:
    class Updated(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return keras.ops.slice_update(x, [0, 0], x[:1, :1] * 2)

    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(8)(Updated()(inputs)))
    path = export_saved_model(model, tmp_path, X, signatures=["features"])
    assert b"XlaDynamicUpdateSlice" in (path / "saved_model.pb").read_bytes()


def test_a_sample_of_another_width_is_refused_and_the_model_lives(tmp_path: Path) -> None:
    inputs = keras.Input((13,), name="wine")
    features = keras.layers.Dense(8)(inputs)
    model = keras.Model(inputs, MatryoshkaHead(3, dims=(4, 8))(features))
    with pytest.raises(ValueError, match="shape of the model's input") as caught:
        export_saved_model(model, tmp_path, np.zeros((2, 12), "float32"))
    assert str(caught.value) == (
        "sample must have the shape of the model's input 'wine': (any, 13), batch first. "
        "Received: (2, 12). Prepare its rows as in training."
    )
    assert model.predict(np.zeros((2, 13), "float32"), verbose=0).shape == (2, 2, 3)
    assert not list(tmp_path.iterdir())
