"""A batch, and models small enough for every test to train one."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, MatryoshkaMetric

NUM_CLASSES = 3
DIMS = (2, 4, 8)
X = np.random.default_rng(0).normal(size=(12, 5)).astype("float32")
Y = np.arange(12) % NUM_CLASSES


def cross_entropy(**arguments: Any) -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **arguments)


def accuracy(dims: Sequence[int] = DIMS) -> MatryoshkaMetric:
    return MatryoshkaMetric(keras.metrics.SparseCategoricalAccuracy(name="accuracy"), dims)


def backbone(name: str | None = None) -> keras.Model:
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)], name=name)


def compiled(model: keras.Model, **arguments: Any) -> keras.Model:
    """With a nested cross-entropy, and one SGD step per `fit` on the whole batch."""
    defaults = {"optimizer": keras.optimizers.SGD(0.1), "loss": MatryoshkaLoss(cross_entropy())}
    model.compile(**(defaults | arguments))
    return model


def classifier(body: keras.layers.Layer | None = None, **arguments: Any) -> MatryoshkaClassifier:
    head = MatryoshkaHead(NUM_CLASSES, dims=DIMS)
    return compiled(MatryoshkaClassifier(body or backbone(), head), **arguments)


def functional(head: MatryoshkaHead | None = None) -> keras.Model:
    """Not compiled: a plain functional model that ends in a head."""
    inputs = keras.Input((5,))
    features = keras.layers.Dense(8, name="features")(inputs)
    return keras.Model(inputs, (head or MatryoshkaHead(NUM_CLASSES, dims=DIMS))(features))


def as_numpy(tensor: Any) -> Any:
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def run_fresh(program: str, *arguments: object) -> str:
    """Run Python text in a process of its own, under this backend; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
