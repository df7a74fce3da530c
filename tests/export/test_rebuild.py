"""Models with parts of the user's own, and the process that rebuilds them on TensorFlow."""

import importlib
import os
import random
import re
import subprocess
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaHead
from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.user_objects import user_modules, user_objects
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from tests.export.models import only_tensorflow

pytestmark = pytest.mark.backend

BACKEND = keras.backend.backend()
# The functions of the backend itself, which a layer ought not to use.
NATIVE = importlib.import_module({"jax": "jax.numpy"}.get(BACKEND, BACKEND))
LOCK = threading.Lock()
X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)

PARTS = """
import keras
from keras import ops

STRENGTH = 1.5

def wobble(x):
    return STRENGTH * ops.sin(x)

class Halves(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return ops.full(shape, 0.5, dtype)

class Scaled(keras.layers.Layer):
    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, input_shape):
        self.scale = self.add_weight(shape=input_shape[-1:], initializer=Halves())

    def call(self, x):
        return self.factor * self.scale * x

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}
"""
IMPORTS = """
import os, sys
import keras
import numpy as np
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss
from keras_mrl_export import export_saved_model
print("tensorflow" in sys.modules)
"""
BODY = """
print("training")
with open(os.environ["RAN"], "a") as file:
    file.write("once\\n")
x = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
backbone = keras.Sequential([
    keras.Input((5,), name="x"),
    keras.layers.Dense(8, activation=wobble, kernel_initializer=Halves()),
    Scaled(3.0),
])
model = MatryoshkaClassifier(backbone, MatryoshkaHead(3, dims=(2, 8)))
inner = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer="sgd", loss=MatryoshkaLoss(inner))
model.fit(x, np.arange(16) % 3, batch_size=16, verbose=0)
print(export_saved_model(model, os.environ["OUT"], x[:4]))
"""
GUARDED = (
    "def main():\n" + re.sub("(?m)^", "    ", BODY) + "\nif __name__ == '__main__':\n    main()"
)
# What stands in the script, what in a module beside it, and whether it is given with -c.
SCRIPTS = {
    "guarded": (IMPORTS + PARTS + GUARDED, "", False),
    "unguarded": (IMPORTS + PARTS + BODY, "", False),
    "-c": (IMPORTS + PARTS + BODY, "", True),
    "beside": (IMPORTS + "from parts import wobble, Halves, Scaled" + BODY, PARTS, False),
}


@dataclass
class Script:
    """A training script of a user, under way."""

    folder: Path
    process: subprocess.Popen[str]

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


def start(folder: Path, text: str, beside: str, inline: bool) -> Script:
    if beside:
        (folder / "parts.py").write_text(beside)
    (folder / "train.py").write_text(text)
    environment = {
        **os.environ,
        "KERAS_BACKEND": BACKEND,
        "OUT": str(folder / "models"),
        "RAN": str(folder / "ran"),
    }
    process = subprocess.Popen(
        [sys.executable, *(["-c", text] if inline else ["train.py"])],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Script(folder, process)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Script]:
    """All of them at once: each starts a process or two."""
    return {
        name: start(tmp_path_factory.mktemp("script"), *script) for name, script in SCRIPTS.items()
    }


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_exports_parts_of_its_own_and_runs_once(
    scripts: dict[str, Script], name: str
) -> None:
    script = scripts[name]
    status, out, err = script.end()
    assert status == 0, err
    version = script.folder / "models" / "1"
    # Importing the export imports TensorFlow only where Keras runs on it.
    assert out.splitlines() == [str(BACKEND == "tensorflow"), "training", str(version)]
    assert (script.folder / "ran").read_text() == "once\n"
    manifest = Manifest.from_json((version / MANIFEST_FILE).read_bytes())
    assert manifest.made_with["trained_on"] == BACKEND
    assert os.listdir(version.parent) == ["1"]


def model_of(*layers: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((5,), name="x")
    features = inputs
    for layer in layers:
        features = layer(features)
    return keras.Model(inputs, MatryoshkaHead(3, dims=(2, 5))(features))


def refusal(base_path: Path, model: keras.Model) -> str:
    with pytest.raises(ExportError) as caught:
        export_saved_model(model, base_path, X)
    assert not base_path.exists() or os.listdir(base_path) == []
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
    text = refusal(tmp_path / "models", model_of(Moody()))
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
