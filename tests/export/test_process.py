"""Models with parts of the user's own: what travels to TensorFlow, and what is said of the rest."""

import importlib
import os
import random
import re
import sys
import threading
import types
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaHead
from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.model_file import user_modules, user_objects
from tests.helpers.export_models import only_tensorflow

pytestmark = pytest.mark.backend

BACKEND = keras.backend.backend()
# The functions of the backend itself, which a layer ought not to use.
NATIVE = importlib.import_module({"jax": "jax.numpy"}.get(BACKEND, BACKEND))
LOCK = threading.Lock()
X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)


def model_of(*layers: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((5,), name="x")
    features = inputs
    for layer in layers:
        features = layer(features)
    return keras.Model(inputs, MatryoshkaHead(3, dims=(2, 5))(features))


def refusal(base_path: Path, model: keras.Model) -> str:
    with pytest.raises(ExportError) as caught:
        export_saved_model(model, base_path / "new" / "models", X)
    assert os.listdir(base_path) == []
    return str(caught.value)


class Native(keras.layers.Layer):
    """A layer that calls the backend it was trained on."""

    def call(self, x: Any) -> Any:
        return NATIVE.tanh(x)


def test_a_layer_of_the_backends_own_functions(tmp_path: Path) -> None:
    model = model_of(Native())
    if BACKEND == "tensorflow":
        assert export_saved_model(model, tmp_path, X) == tmp_path / "1"
        return
    text = refusal(tmp_path, model)
    assert text.startswith(
        "The model must load on the TensorFlow backend from its .keras form. Received: TypeError: "
    )
    assert text.endswith(
        "Give layers of your own a get_config() and keras.ops; replace Lambda layers by them."
    )
    assert "tanh" in text


class Moody(keras.layers.Layer):
    """A layer that is another one each time it is traced on TensorFlow."""

    def call(self, x: Any) -> Any:
        return x * (1.0 + (keras.backend.backend() == "tensorflow") * random.random())


def test_a_layer_that_differs_is_not_published(tmp_path: Path) -> None:
    text = refusal(tmp_path, model_of(Moody()))
    assert re.fullmatch(
        r"Every signature must equal the Keras model on the sample\. "
        r"Received: features differs: by \d+\.?\d*(e-\d+)? on rows of magnitude \d\.\d*\. "
        r"Nothing was published\. "
        r"Look for layers that act differently on each backend or at random when training=False\.",
        text,
    )


@only_tensorflow
def test_a_lambda_layer_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path, model_of(keras.layers.Lambda(lambda x: 2 * x)))
    assert text.startswith(
        "The model must load on the TensorFlow backend from its .keras form. Received: ValueError: "
    )
    assert "`Lambda` layer whose `function` is a Python lambda" in text
    assert text.endswith(
        "Give layers of your own a get_config() and keras.ops; replace Lambda layers by them."
    )


class Locked(keras.layers.Layer):
    """A layer whose code holds what does not travel."""

    def call(self, x: Any) -> Any:
        with LOCK:
            return keras.ops.tanh(x)


def test_code_that_does_not_travel(tmp_path: Path) -> None:
    model = model_of(Locked())
    if BACKEND == "tensorflow":
        assert export_saved_model(model, tmp_path, X) == tmp_path / "1"
        return
    assert refusal(tmp_path, model) == (
        "Layers of your own travel to TensorFlow by value, so their code must be picklable. "
        "Received: Locked, refused with TypeError: cannot pickle '_thread.lock' object. "
        "Move what they hold of open files, locks or devices into build() or call()."
    )


class Secretive(keras.layers.Layer):
    """A layer that does not say how to make it again."""

    def __init__(self, held: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held = held

    def call(self, x: Any) -> Any:
        return x


def test_a_layer_that_cannot_be_saved(tmp_path: Path) -> None:
    text = refusal(tmp_path, model_of(Secretive(object())))
    assert text.startswith(
        "A model travels in Keras' own .keras form, so every part of it must be saveable. "
        "Received: NotImplementedError: \nObject Secretive was created by passing\n"
    )
    assert text.endswith("Give layers of your own a get_config(), and activations a name.")


def module(name: str) -> types.ModuleType:
    """A module of the user's with a layer and a function in it."""
    made = types.ModuleType(name)
    exec(
        "import keras\n"
        "def act(x):\n    return 2 * x\n"
        "class Block(keras.layers.Layer):\n    def call(self, x):\n        return x\n"
        "class Punishing(keras.regularizers.L2):\n    pass\n",
        made.__dict__,
    )
    return made


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = module("first"), module("second")
    assert refusal(tmp_path, model_of(first.Block(), second.Block())) == (
        "Keras finds what is yours by its name, so no two may share one. "
        "Received: Block, of first and of second. Rename one, or decorate it with "
        "@keras.saving.register_keras_serializable(package='...')."
    )


class Holder(keras.layers.Layer):
    """A layer that keeps what it uses inside containers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts = {"functions": [NESTED.act], "regularizer": (NESTED.Punishing(),)}

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)

    def call(self, x: Any) -> Any:
        return x


NESTED, MINE = module("nested"), module("mine")


def test_what_is_the_users_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = keras.layers.Dense(5, activation="relu", kernel_regularizer=MINE.Punishing())
    objects = user_objects(model_of(dense, MINE.Block()))
    assert objects == {"Block": MINE.Block, "Punishing": MINE.Punishing}
    objects = user_objects(model_of(Holder(), Holder()))
    assert objects == {"Holder": Holder, "act": NESTED.act, "Punishing": NESTED.Punishing}
    monkeypatch.setitem(sys.modules, "mine", MINE)
    assert user_modules({"act": MINE.act}) == [MINE]


def test_nothing_of_keras_or_of_ours_is_the_users() -> None:
    dense = keras.layers.Dense(5, activation="relu", kernel_regularizer="l2")
    assert user_objects(model_of(dense, keras.layers.BatchNormalization())) == {}
