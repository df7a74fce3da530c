"""What the outputs of a nested head mean: a class, several classes, or values.

The loss says it, since it is what the outputs were trained to be.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from ..losses import MatryoshkaLoss
from ..losses.targets import (
    MARGIN_LOSSES,
    MULTILABEL_LOSSES,
    REGRESSION_LOSSES,
    SINGLE_LABEL_LOSSES,
)
from ._compiled import class_of
from .outputs import holds_head

ACTIVATIONS = ("softmax", "sigmoid", "none")
_KINDS = (
    ("softmax", SINGLE_LABEL_LOSSES),
    ("sigmoid", MULTILABEL_LOSSES),
    ("none", REGRESSION_LOSSES),
)


def check_activation(activation: str) -> str:
    """Return `activation`, or raise `ValueError` unless it is one of `ACTIVATIONS`.

    Examples:
        >>> from keras_mrl.models.activation import check_activation
        >>> check_activation("sigmoid")
        'sigmoid'
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            "activation must be 'softmax' for one class a row, 'sigmoid' for any number of "
            "classes, or 'none' for values. "
            f"Received: activation={activation!r}. Give one of them."
        )
    return activation


def activation_of(model: keras.Model) -> str | None:
    """Return what makes probabilities of the outputs of the head of a model.

    Args:
        model: A model that ends in a nested head.

    Returns:
        "softmax" where a row has one class, "sigmoid" where it may have several, "none" of values;
        None where the model was never compiled, or with a loss that is not Keras's own.

    Raises:
        ValueError: If the loss takes probabilities and nothing in the model makes them, or if it
            is a hinge loss, whose outputs are neither probabilities nor values.

    Examples:
        >>> from keras_mrl.models.activation import activation_of
        >>> features = keras.Input((8,))
        >>> model = keras.Model(features, MatryoshkaHead(3, dims=(4, 8))(features))
        >>> print(activation_of(model))
        None
        >>> model.compile(loss=MatryoshkaLoss(keras.losses.BinaryCrossentropy(from_logits=True)))
        >>> activation_of(model)
        'sigmoid'
    """
    loss = inner_loss(model)
    if loss is None:  # what was trained may stand inside a model that never was
        layers = getattr(model, "layers", [])
        within = [own for own in layers if isinstance(own, keras.Model) and holds_head(own)]
        return activation_of(within[0]) if len(within) == 1 else None
    if loss.get_config().get("from_logits") is False:
        raise ValueError(
            "A MatryoshkaHead gives logits, and a loss with from_logits=False takes probabilities. "
            f"Received: {type(loss).__name__} with from_logits=False for model {model.name!r}, "
            "which ends in the head. Train it with from_logits=True, or name what its outputs are: "
            "activation='sigmoid'."
        )
    if isinstance(loss, MARGIN_LOSSES):
        raise ValueError(
            "A hinge loss trains the sign of each output, not a probability or a value. "
            f"Received: {type(loss).__name__} for model {model.name!r}. Name what its outputs are: "
            "activation='sigmoid' for the classes, those above 0.5, 'none' for the outputs."
        )
    return next((name for name, kinds in _KINDS if isinstance(loss, kinds)), None)


def inner_loss(model: keras.Model) -> keras.losses.Loss | None:
    """Return the loss of one dim that a model is compiled with; None if there is not just one.

    Examples:
        >>> from keras_mrl.models.activation import inner_loss
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> model.compile(loss="mse")
        >>> type(inner_loss(model)).__name__
        'MeanSquaredError'
    """
    losses = [loss for loss in keras.tree.flatten(getattr(model, "loss", None)) if loss is not None]
    if len(losses) != 1:
        return None
    loss: Any = losses[0]
    if isinstance(loss, MatryoshkaLoss):
        return loss.loss
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if inspect.isfunction(loss) and loss.__module__.startswith("keras."):
        loss = class_of(loss)()
    return loss if isinstance(loss, keras.losses.Loss) else None
