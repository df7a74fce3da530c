"""Training scripts as users write them, each with a layer, an activation and an initializer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import keras

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


@dataclass(frozen=True)
class Ran:
    """A script that has ended, and where it was to publish and to note that it ran."""

    status: int
    out: str
    err: str
    base_path: Path
    notes: Path


def run(folder: Path, name: str) -> Ran:
    """Run one of the scripts in `folder`, on the backend of this process."""
    text, beside, inline = SCRIPTS[name]
    (folder / "train.py").write_text(text)
    if beside:
        (folder / "parts.py").write_text(beside)
    base_path, notes = folder / "models", folder / "ran"
    done = subprocess.run(
        [sys.executable, *(["-c", text] if inline else ["train.py"])],
        cwd=folder,
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "OUT": str(base_path),
            "RAN": str(notes),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Ran(done.returncode, done.stdout, done.stderr, base_path, notes)
