"""Training scripts as users write them, with layer, activation and initializer of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import keras

HEAD = """
import os, sys
import keras
import numpy as np
from keras import ops
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss
from keras_mrl_export import export_saved_model
print("tensorflow" in sys.modules)
"""
PARTS = """
import keras
from keras import ops

STRENGTH = 1.5

def wobble(x):
    return STRENGTH * ops.sin(x)

class Halves(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return ops.full(shape, 0.5, dtype)
"""
LAYER = """
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
BODY = """
print("training")
with open(os.environ["RUNS"], "a") as file:
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
# Each script and the module beside it: one is a file with some of its parts beside it, the other
# is run with -c and holds everything itself.
SCRIPTS = {
    "file": (HEAD + "from parts import wobble, Halves" + LAYER + BODY, PARTS),
    "inline": (HEAD + PARTS + LAYER + BODY, ""),
}


@dataclass(frozen=True)
class Ended:
    """A script that has ended, where it published, and the file with a line for each run."""

    status: int
    output: str
    errors: str
    base_path: Path
    runs: Path


def run(folder: Path, name: str) -> Ended:
    """Run one of the scripts in `folder`, on the backend of this process."""
    script, beside = SCRIPTS[name]
    (folder / "train.py").write_text(script)
    (folder / "parts.py").write_text(beside)
    base_path, runs = folder / "models", folder / "runs"
    done = subprocess.run(
        [sys.executable, *(["-c", script] if name == "inline" else ["train.py"])],
        cwd=folder,
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "OUT": str(base_path),
            "RUNS": str(runs),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Ended(done.returncode, done.stdout, done.stderr, base_path, runs)
