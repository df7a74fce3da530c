"""A model's file: in what precision it computes, and which classes and functions are the user's."""

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.model_file import (
    in_float32,
    load,
    save,
    user_modules,
    user_objects,
    with_scopes,
)
from keras_mrl_serving._session import SavedModelSession
from tests.helpers.export_models import outputs
from tests.helpers.laws import exactly
from tests.helpers.small_models import X as ROWS
from tests.helpers.small_models import as_numpy, classifier

X = np.random.default_rng(0).normal(size=(6, 5, 5, 2)).astype(np.float32)
HALVES = ("mixed_bfloat16", "mixed_float16", "bfloat16", "float16")


class Holder(layers.Layer):
    """A layer that makes another one without naming a precision."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(8)

    def build(self, input_shape: Any) -> None:
        self.dense.build(input_shape)

    def call(self, x: Any) -> Any:
        return self.dense(x)


class Third(layers.Layer):
    """A layer that casts a value in its constructor."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.third = ops.cast(1 / 3, self.compute_dtype)

    def call(self, x: Any) -> Any:
        return x * ops.cast(self.third, x.dtype)


def model_of(*middle: layers.Layer) -> keras.Model:
    inputs = keras.Input(X.shape[1:], name="x")
    features: Any = inputs
    for layer in middle:
        features = layer(features)
    features = layers.Dense(8)(layers.Flatten()(features))
    return keras.Model(inputs, features)


def parts() -> list[layers.Layer]:
    means = layers.Normalization(mean=[1 / 3, 2 / 3], variance=[1 / 7, 3])
    return [means, layers.Conv2D(4, 3), layers.GroupNormalization(2), Third(), Holder()]


@pytest.fixture(autouse=True)
def policy() -> Iterator[None]:
    """The global policy is put back."""
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.backend
@pytest.mark.parametrize("trained_in", HALVES)
@pytest.mark.parametrize("exported_in", ["as it was trained", "float32"])
def test_every_part_computes_in_float32(trained_in: str, exported_in: str) -> None:
    keras.config.set_dtype_policy(trained_in)
    trained = model_of(*parts())
    now = "float32" if exported_in == "float32" else trained_in
    keras.config.set_dtype_policy(now)
    copy = in_float32(trained)
    assert keras.config.dtype_policy().name == now
    assert trained.layers[-1].compute_dtype != "float32"
    assert {weight.dtype for weight in copy.weights} == {"float32"}
    keras.config.set_dtype_policy("float32")
    plain = model_of(*parts())
    plain.set_weights(copy.get_weights())
    np.testing.assert_allclose(outputs(copy, X), outputs(plain, X), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Layer InputLayer")  # of Keras: nothing to quantize
@pytest.mark.parametrize("trained_in", ["float32", "mixed_bfloat16", "bfloat16"])
def test_a_head_of_integers_is_served_in_float32(trained_in: str, tmp_path: Path) -> None:
    keras.config.set_dtype_policy(trained_in)
    model = classifier(keras.Sequential([keras.Input((5,), name="x"), layers.Dense(8)]))
    model.quantize("int8")
    keras.config.set_dtype_policy("float32")
    version = export_saved_model(model, tmp_path, ROWS[:8], signatures=["features", "head"])
    kernel, bias = (as_numpy(ops.cast(own, "float32")) for own in model.head.weights_at(2))
    with SavedModelSession(version) as session:
        features = session.run("features", {"x": ROWS})["features"]
        logits = session.run("head_2", {"features": features[:, :2]})["logits"]
    share = 1e-5 if trained_in == "float32" else 2**-7  # of scales in half precision
    np.testing.assert_allclose(logits, features[:, :2] @ kernel + bias, rtol=share, atol=share)


def test_a_model_in_float32_is_not_copied() -> None:
    model = model_of(Holder())
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert in_float32(model) is model


def test_loading_takes_no_precision_of_the_caller_and_leaves_it(tmp_path: Path) -> None:
    save(model_of(Holder()), tmp_path / "model.keras")
    keras.config.set_dtype_policy("mixed_float16")
    loaded = load(tmp_path / "model.keras", {"Holder": Holder})
    assert {layer.compute_dtype for layer in loaded._flatten_layers()} == {"float32"}
    assert keras.config.dtype_policy().name == "mixed_float16"


# Classes and functions of the user


def model_with(*middle: layers.Layer) -> keras.Model:
    inputs = keras.Input((5,))
    features: Any = inputs
    for layer in middle:
        features = layer(features)
    return keras.Model(inputs, features)


class Secretive(layers.Layer):
    """A layer that does not say how to make it again."""

    def __init__(self, part: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.part = part

    def call(self, x: Any) -> Any:
        return x


def test_a_layer_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        save(model_with(Secretive(object())), tmp_path / "model.keras")
    text = str(caught.value)
    assert text.startswith(
        "A model travels in Keras' own .keras form, so every part of it must be saveable. "
        "Received: NotImplementedError: \nObject Secretive was created by passing\n"
    )
    assert text.endswith("Give layers of your own a get_config(), and activations a name.")


def test_a_lambda_layer_does_not_load(tmp_path: Path) -> None:
    save(model_with(layers.Lambda(lambda x: 2 * x)), tmp_path / "model.keras")
    with pytest.raises(ExportError) as caught:
        load(tmp_path / "model.keras", {})
    text = str(caught.value)
    assert text.startswith(
        "The model must load on the TensorFlow backend from its .keras form. Received: ValueError: "
    )
    assert "`Lambda` layer whose `function` is a Python lambda" in text
    assert text.endswith(
        "Give layers of your own a get_config() and keras.ops; replace Lambda layers by them."
    )


def module(name: str) -> types.ModuleType:
    """A module of the user's with a layer, a function and a regularizer in it."""
    made = types.ModuleType(name)
    exec(
        "import keras\n"
        "def act(x):\n    return 2 * x\n"
        "class Block(keras.layers.Layer):\n    def call(self, x):\n        return x\n"
        "class Punishing(keras.regularizers.L2):\n    pass\n",
        made.__dict__,
    )
    return made


def test_two_classes_of_one_name_are_refused() -> None:
    first, second = module("first"), module("second")
    with pytest.raises(ExportError) as caught:
        user_objects(model_with(first.Block(), second.Block()))
    assert str(caught.value) == (
        "Keras finds what is yours by its name, so no two may share one. "
        "Received: Block, of first and of second. Rename one, or decorate it with "
        "@keras.saving.register_keras_serializable(package='...')."
    )


class Containers(layers.Layer):
    """A layer that keeps what it uses inside containers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = {"functions": [NESTED.act], "regularizer": (NESTED.Punishing(),)}

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)

    def call(self, x: Any) -> Any:
        return x


NESTED, MINE = module("nested"), module("mine")


def test_the_users_parts_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = layers.Dense(5, activation="relu", kernel_regularizer=MINE.Punishing())
    objects = user_objects(model_with(dense, MINE.Block()))
    assert objects == {"Block": MINE.Block, "Punishing": MINE.Punishing}
    objects = user_objects(model_with(Containers(), Containers()))
    assert objects == {"Containers": Containers, "act": NESTED.act, "Punishing": NESTED.Punishing}
    monkeypatch.setitem(sys.modules, "mine", MINE)
    assert user_modules({"act": MINE.act}) == [MINE]


def test_no_part_of_keras_or_of_ours_is_the_users() -> None:
    dense = layers.Dense(5, activation="relu", kernel_regularizer="l2")
    assert user_objects(model_with(dense, layers.BatchNormalization())) == {}


NAMES = ["my layer", "größe", "_x", "a:b", "{}%s", "é\n", "x" * 300, "layer_0", "plain"]


def test_layers_of_any_name_become_scopes_of_tensorflow() -> None:
    inputs = keras.Input((5,), name="x")
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(4, name="my layer")], name="in ner")
    features: Any = inner(inputs)
    for name in NAMES:
        features = layers.Dense(4, name=name)(features)
    model = keras.Model(inputs, features, name="my model")
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = outputs(model, x)
    renamed = with_scopes(model, {})
    names = [layer.name for layer in renamed._flatten_layers()]
    assert names.count("plain") == 1
    assert [name for name in names if not re.fullmatch(r"[A-Za-z0-9.][\w.>-]*", name, re.A)] == []
    paths = [weight.path for weight in renamed.weights]
    assert [path for path in paths if not re.fullmatch(r"[A-Za-z0-9.][\w.>/-]*", path, re.A)] == []
    np.testing.assert_array_equal(outputs(renamed, x), expected)
    assert with_scopes(renamed, {}) is renamed


class Stubborn(layers.Layer):
    """A layer that gives itself a name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "name": "my layer"})

    def call(self, x: Any) -> Any:
        return 2 * x


def test_a_layer_that_keeps_a_name_of_no_scope_is_named() -> None:
    text = (
        "TensorFlow makes scopes of the names of layers: ASCII letters, digits, '_', '.', '-'. "
        "Received: 'my layer', given by layers of your own to themselves. "
        "Take the name from their argument: super().__init__(name=name)."
    )
    with pytest.raises(ExportError, match=exactly(text)):
        with_scopes(model_of(Stubborn()), {"Stubborn": Stubborn})
