"""Every way in which a nested head may end a model, and models with several outputs."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from tests.helpers.small_models import DIMS, NUM_CLASSES, X, backbone, classifier, functional


@keras.saving.register_keras_serializable(package="tests")
class Own(keras.Model):
    """A class of a user's whose call ends in a head."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.body = layers.Dense(8)
        self.head = MatryoshkaHead(NUM_CLASSES, dims=DIMS)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.head(self.body(inputs / 2), training=training)


@keras.saving.register_keras_serializable(package="tests")
class Scaled(MatryoshkaClassifier):
    """A classifier with a call of its own."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return super().call(inputs / 2, training=training, mask=mask)


def around(model: keras.Model) -> keras.Model:
    """A functional model around another, and something before it."""
    inputs = keras.Input((5,))
    return keras.Model(inputs, model(layers.Rescaling(0.5)(inputs)), name="around")


def sequence(*models: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((5,)), layers.Rescaling(0.5), *models])


def own() -> keras.Model:
    model = Own()
    model(X)
    return model


def sequential() -> keras.Model:
    head = MatryoshkaHead(NUM_CLASSES, dims=DIMS)
    return keras.Sequential([keras.Input((5,)), layers.Dense(8), head])


NESTED: dict[str, Callable[[], keras.Model]] = {
    "classifier": classifier,
    "functional": functional,
    "sequential": sequential,
    "functional in a sequence": lambda: sequence(functional()),
    "classifier in a sequence": lambda: sequence(classifier()),
    "classifier in a functional": lambda: around(classifier()),
    "twice within": lambda: around(sequence(classifier())),
    "class of a user's": own,
    "class of a user's in a sequence": lambda: sequence(own()),
    "classifier with a call of its own": lambda: Scaled(
        backbone(), MatryoshkaHead(NUM_CLASSES, dims=DIMS)
    ),
}


def two_heads(**outputs: Any) -> keras.Model:
    """Outputs `digit` and `odd`, each of a head, which read features of their own, and others."""
    inputs = keras.Input((5,), name="x")
    features = layers.Dense(8)(inputs)
    digit = MatryoshkaHead(NUM_CLASSES, dims=DIMS, name="digit_head")(features)
    odd = MatryoshkaHead(2, dims=DIMS, tied=True)(layers.Dense(8)(features))
    others = {name: layer(features) for name, layer in outputs.items()}
    return keras.Model(inputs, {"digit": digit, "odd": odd, **others}, name="two")
