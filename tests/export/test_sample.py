"""A sample is read as the model's inputs are declared, and harms no model that cannot take it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl.baselines import slimmable
from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.sample import outputs_of, read_sample
from keras_mrl_serving._session import SavedModelSession
from tests.helpers.export_models import Arrays, X, dense, of_one_class, outputs, read_manifest

TEXTS = ["a small cat", "dog"]


def functional(*names: str | None) -> keras.Model:
    inputs = [keras.Input((5,), name=name) for name in names]
    joined = keras.layers.Add()(inputs) if len(inputs) > 1 else inputs[0]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], keras.layers.Dense(8)(joined))


def sequential(name: str | None) -> keras.Model:
    return keras.Sequential([keras.Input((5,), name=name), keras.layers.Dense(8)])


def called() -> keras.Model:
    """A sequential model that took the shape of its input from its first rows."""
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
        tensors = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
        return self.dense(sum(tensors[1:], tensors[0]))


def names(model: keras.Model, sample: Any) -> dict[str, str]:
    return read_sample(model, sample, None).names


def refusal(model: keras.Model, sample: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        read_sample(model, sample, None)
    return str(caught.value)


def test_the_name_of_a_single_input() -> None:
    assert names(functional("image"), X) == {"": "image"}
    assert names(functional("image"), {"image": X}) == {"image": "image"}
    assert names(sequential("image"), X) == {"": "image"}


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
    assert names(model, X) == {"": "inputs"}


def test_a_name_that_only_begins_like_one_of_keras_is_kept() -> None:
    for name in ("input_ids", "inputs", "keras_tensor_x", "my_input_1"):
        assert names(functional(name), X) == {"": name}


def test_several_inputs_keep_their_names() -> None:
    both = {"b": X, "a": X}
    assert names(functional("a", "b"), both) == {"b": "b", "a": "a"}
    assert names(Subclassed(), both) == {"b": "b", "a": "a"}


def test_inputs_declared_as_a_dict_go_by_its_keys() -> None:
    inputs = {"left": keras.Input((5,), name="x"), "right": keras.Input((5,), name="y")}
    with pytest.warns(UserWarning, match="all keys in the dict must match the names"):
        model = keras.Model(inputs, keras.layers.Dense(8)(keras.layers.Add()([*inputs.values()])))
    both = {"left": X, "right": X}
    assert names(model, both) == {"left": "left", "right": "right"}


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_sample_is_no_list(kind: type) -> None:
    assert refusal(functional("a", "b"), kind([X, X])) == (
        "sample must be one array, or a dict by input name. "
        f"Received: a {kind.__name__}. Write {{name: array}}."
    )


@pytest.mark.parametrize(
    ("declared", "sample", "expected", "received"),
    [
        (("a", "b"), X, "a, b", "one array"),
        (("a", "b"), {"a": X}, "a, b", "a"),
        (("a", "b"), {"a": X, "c": X}, "a, b", "a, c"),
        (("a",), {"inputs": X}, "a", "inputs"),
        (("a",), {"a": X, "b": X}, "a", "a, b"),
    ],
)
def test_a_sample_of_other_names(
    declared: tuple[str, ...], sample: Any, expected: str, received: str
) -> None:
    assert refusal(functional(*declared), sample) == (
        f"sample must hold the inputs of the model: {expected}. Received: {received}. "
        "Write {name: array} with those names."
    )


@pytest.mark.parametrize("name", ["pixel-values", "a b", "_hidden", "1st", "größe", "self"])
def test_a_name_tensorflow_would_change_is_refused(name: str) -> None:
    assert refusal(Subclassed(), {name: X, "other": X}) == (
        "A served input's name must be a letter, then letters, digits and underscores, and "
        f"not self. Received: {name!r}. Put an input of another name before the model: "
        "x = keras.Input(..., name='image'); keras.Model(x, model(x))."
    )


MODELS: dict[str, tuple[Callable[[], keras.Model], Any]] = {
    "sequential": (lambda: sequential("image"), X),
    "called": (called, X),
    "two": (lambda: functional("right", "left"), {"left": X, "right": 2 * X}),
    "one by name": (lambda: functional("image"), {"image": X}),
    "subclassed of two": (Subclassed, {"a": X, "b": 2 * X}),
    "float64": (Subclassed, X.astype(np.float64)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_inputs_of_the_manifest_are_those_of_the_signatures(tmp_path: Path, kind: str) -> None:
    make, sample = MODELS[kind]
    model = make()
    read = read_sample(model, sample, None)
    expected = outputs(model, read.rows)
    path = export_saved_model(model, tmp_path, sample, signatures=["features"])
    assert read_manifest(path).inputs == {
        name: {"dtype": "float32", "shape": [None, 5]} for name in read.names.values()
    }
    served = {name: array.astype(np.float32) for name, array in read.served.items()}
    np.testing.assert_allclose(features(path, served), expected, rtol=1e-5, atol=1e-6)


def features(path: Path, inputs: Arrays) -> Any:
    with SavedModelSession(path) as session:
        return session.run("features", inputs)["features"]


# What a sample may be


NUMBERS = "sample must hold numbers or strings, in arrays. "
FEW_ROWS = "Give a few real rows, for example x[:8]."


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (
            X[:0],
            f"sample must hold at least one row, batch first. Received: sample of shape (0, 5). "
            f"{FEW_ROWS}",
        ),
        (
            np.float32(1),
            f"sample must hold at least one row, batch first. Received: sample of shape (). "
            f"{FEW_ROWS}",
        ),
        ((row for row in X), f"{NUMBERS}Received: a generator. {FEW_ROWS}"),
        ({"x": [object()]}, f"{NUMBERS}Received: x: a list. {FEW_ROWS}"),
        (None, f"{NUMBERS}Received: a NoneType. {FEW_ROWS}"),
        (np.ones((2, 5), complex), f"{NUMBERS}Received: a ndarray of complex128. {FEW_ROWS}"),
        (["a", 1], f"{NUMBERS}Received: a list. {FEW_ROWS}"),
        ([["a"], ["b", "c"]], f"{NUMBERS}Received: a list. {FEW_ROWS}"),
        ([b"a", None], f"{NUMBERS}Received: a list. {FEW_ROWS}"),
        (
            X[:2, :4],
            "sample must have the shape of the model's input 'x': (any, 5), batch first. "
            "Received: (2, 4). Prepare its rows as in training.",
        ),
    ],
    # The sentence alone: the text of a generator differs from process to process.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_samples_that_do_not_fit(sample: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample") as caught:
        export_saved_model(dense(), tmp_path / "m", sample)
    assert str(caught.value) == text
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_unequal_length() -> None:
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    model = keras.Model([left, right], keras.layers.Concatenate()([left, right]))
    sample = {"left": np.ones((3, 4), np.float32), "right": np.ones((2, 3), np.float32)}
    assert refusal(model, sample) == (
        "sample must hold as many rows for every input, batch first. "
        "Received: left of shape (3, 4), right of shape (2, 3). Give the same rows of each."
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


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_texts_in_any_form(shape: tuple[int, ...], kind: str) -> None:
    read = read_sample(of_texts(shape), SAMPLES[kind](), None)
    texts = [text if isinstance(text, bytes) else text.encode() for text in read.rows.flat]
    assert texts == [text.encode() for text in TEXTS]
    assert read.rows.shape == (len(TEXTS), *shape)
    assert read.served == {"text": read.rows}


@pytest.mark.parametrize("shape", [(), (1,)])
def test_texts_are_served(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = of_texts(shape)
    path = export_saved_model(model, tmp_path, TEXTS, signatures=["features"])
    assert read_manifest(path).inputs == {"text": {"dtype": "string", "shape": [None, *shape]}}
    column = np.array([*TEXTS, "", "bird"], dtype=object).reshape(4, *shape)
    served = features(path, {"text": column})
    np.testing.assert_array_equal(served, model(tf.constant(column)))


def test_a_trained_model_inside_a_model_of_texts_is_served(tmp_path: Path) -> None:
    words = keras.layers.TextVectorization(output_sequence_length=3, vocabulary=["a", "cat", "dog"])
    tokens = keras.Input((3,), dtype="int64")
    pooled = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(6, 4)(tokens))
    model = MatryoshkaClassifier(keras.Model(tokens, pooled), MatryoshkaHead(2, dims=(2, 4)))
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(words(TEXTS), np.array([0, 1]), verbose=0)
    text = keras.Input((), dtype="string", name="text")
    whole = keras.Model(text, model(keras.Model(text, words(text))(text)), name="of_texts")
    path = export_saved_model(whole, tmp_path, TEXTS)
    assert read_manifest(path).kind == "classifier"
    logits = np.asarray(whole(tf.constant(TEXTS)))[:, 0]
    texts = {"text": np.array(TEXTS, object)}
    read = {"features": features(path, texts)[:, :2]}
    with SavedModelSession(path) as session:
        answer, served = session.run("head_2", read), session.run("classify_2", texts)
    np.testing.assert_allclose(answer["logits"], logits, rtol=1e-5)
    np.testing.assert_array_equal(served["class_ids"][:, 0], logits.argmax(1))


def test_a_sequential_model_of_texts_that_declares_no_input(tmp_path: Path) -> None:
    words = keras.layers.TextVectorization(output_sequence_length=3, vocabulary=["a", "cat"])
    model = keras.Sequential([words, keras.layers.Embedding(6, 4), keras.layers.Flatten()])
    path = export_saved_model(model, tmp_path, np.array(TEXTS), signatures=["features"])
    assert read_manifest(path).inputs == {"inputs": {"dtype": "string", "shape": [None]}}


# What the trained model gives for the sample, on each backend


def of_images() -> keras.Model:
    """A model that takes images of any size above four pixels."""
    inputs = keras.Input((None, None, 3), name="image")
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 5)(inputs))
    logits = MatryoshkaHead(3, dims=(2, 5))(keras.layers.Dense(5)(pooled))
    return of_one_class(keras.Model(inputs, logits, name="any_size"))


class Interrupted(keras.layers.Layer):
    """A layer that meets Ctrl-C, once it is to."""

    meets = False

    def call(self, x: Any) -> Any:
        if self.meets:
            raise KeyboardInterrupt
        return x


def assert_unharmed(model: keras.Model, before: list[Any]) -> None:
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


@pytest.mark.backend
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


@pytest.mark.backend
def test_an_interrupt_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    inputs, layer = keras.Input((5,)), Interrupted()
    model = keras.Model(inputs, keras.layers.Dense(4)(layer(inputs)))
    before = model.get_weights()
    layer.meets = True
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(model, tmp_path, np.ones((2, 5), np.float32))
    assert_unharmed(model, before)


@pytest.mark.backend
def test_more_rows_than_a_batch_are_all_answered() -> None:
    rows = np.random.default_rng(0).normal(size=(70, 5)).astype(np.float32)
    model = dense()
    np.testing.assert_allclose(outputs_of(model, rows), outputs(model, rows), rtol=1e-5, atol=1e-6)


def test_features_must_be_vectors(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5, 2)), keras.layers.Dense(4)])
    with pytest.raises(ValueError, match="features") as caught:
        export_saved_model(model, tmp_path / "m", np.zeros((2, 5, 2), np.float32))
    assert str(caught.value) == (
        "A model is exported with features of shape (batch, width). "
        "Received: features of shape (2, 5, 4). End it in a pooling layer; of a slimmable net "
        "export the features of one dim: "
        "keras.Model(model.input, model.get_layer('features_8').output)."
    )


def test_the_line_about_a_slimmable_net_works(tmp_path: Path) -> None:
    model = slimmable(sequential("x"), num_classes=3, dims=(4, 8))
    with pytest.raises(ValueError, match=r"Received: features of shape \(\d+, 2, 3\)") as caught:
        export_saved_model(model, tmp_path / "m", X)
    line = str(caught.value).rpartition(": ")[2].removesuffix(".")
    features = eval(line, {"keras": keras, "model": model})
    assert read_manifest(export_saved_model(features, tmp_path / "m", X)).kind == "encoder"


@pytest.mark.parametrize("gather", [list, lambda outputs: dict(zip("ab", outputs, strict=True))])
def test_a_model_of_two_outputs(gather: Callable[[Any], Any]) -> None:
    inputs = keras.Input((5,))
    model = keras.Model(
        inputs, gather([keras.layers.Dense(4, name=name)(inputs) for name in "ab"]), name="forked"
    )
    with pytest.raises(ValueError, match="outputs") as caught:
        outputs_of(model, X)
    assert str(caught.value) == (
        "A model is exported with one output. Received: 2 outputs from 'forked'. "
        "Name the one that is served: output=..., its key or the name of its last layer."
    )


@pytest.mark.backend
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_training_spoilt(value: float) -> None:
    model = dense()
    for weight in model.weights:
        weight.assign(np.full(weight.shape, value))
    with pytest.raises(ExportError) as caught:
        outputs_of(model, X)
    assert str(caught.value) == (
        "A model must give finite values to be exported. "
        "Received: NaN or infinity from 'small' on the sample. "
        "Train it to a finite loss, and look for bad rows in the sample."
    )


def test_a_head_that_training_spoilt(tmp_path: Path) -> None:
    model = MatryoshkaClassifier(dense(width=20), MatryoshkaHead(3, dims=(2, 20)), name="spoilt")
    model(X)
    model.head.weights[0].assign(np.full((2, 3), np.nan))
    with pytest.raises(ExportError, match="NaN or infinity from 'spoilt' on the sample"):
        export_saved_model(model, tmp_path / "m", X, activation="softmax")
    assert list(tmp_path.iterdir()) == []


def test_a_masked_sample_is_refused() -> None:
    text = (
        "sample must hold a value at every place. Received: image: a masked array. "
        "Fill what is masked, e.g. with .filled(0)."
    )
    assert refusal(functional("image"), {"image": np.ma.masked_array(X, X > 0)}) == text


def test_rows_of_one_number_are_told_their_axis() -> None:
    inputs = keras.Input((1,), name="age")
    model = keras.Model(inputs, keras.layers.Dense(8)(inputs))
    text = (
        "sample must have the shape of the model's input 'age': (any, 1), batch first. "
        "Received: (4,). Give every row its last axis, of one number: x[:, None]."
    )
    assert refusal(model, np.ones(4)) == text
