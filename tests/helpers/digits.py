"""Scikit-learn's handwritten digits, a net small enough to learn them in a second, one recipe."""

import functools
from typing import Any, TypeVar

import keras
import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from tests.helpers.small_models import compiled

Array = npt.NDArray[Any]
Trained = TypeVar("Trained", bound=keras.Model)

NUM_CLASSES = 10
WIDTH = 64
DIMS = (2, 4, 8, WIDTH)
_pixels, _labels = load_digits(return_X_y=True)
_order = np.random.default_rng(0).permutation(len(_labels))
X: Array = (_pixels[_order] / 16).astype("float32")
Y: Array = _labels[_order]
TRAIN, TEST = slice(0, 1000), slice(1000, None)


def body(width: int = WIDTH) -> keras.Model:
    hidden = keras.layers.Dense(128, activation="relu")
    return keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(width)])


def nested(dims: tuple[int, ...] = DIMS, width: int = WIDTH) -> MatryoshkaClassifier:
    return MatryoshkaClassifier(body(width), MatryoshkaHead(NUM_CLASSES, dims=dims))


def learn(model: Trained, epochs: int = 20, **arguments: Any) -> Trained:
    """The one recipe: whatever is compared was trained by it."""
    compiled(model, optimizer=keras.optimizers.Adam(0.02), **arguments)
    model.fit(X[TRAIN], Y[TRAIN], batch_size=100, epochs=epochs, verbose=0)
    return model


@functools.cache
def trained(dims: tuple[int, ...] = DIMS) -> MatryoshkaClassifier:
    """Trained once for all tests that only ask it; dims of the width alone are fixed features."""
    keras.utils.set_random_seed(0)
    return learn(nested(dims))


def features(model: MatryoshkaClassifier, rows: slice) -> Array:
    return np.asarray(model.backbone.predict(X[rows], batch_size=1000, verbose=0))


def nearest_accuracy(gallery: Array, queries: Array) -> float:
    """Share of the test images whose nearest training image, by angle, has their label."""
    unit = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in (gallery, queries)]
    return float((Y[TRAIN][(unit[1] @ unit[0].T).argmax(1)] == Y[TEST]).mean())
