"""The small residual net that every method of a comparison trains."""

from __future__ import annotations

from math import prod
from typing import Any

import keras
from keras import layers


def backbone(shape: tuple[int, ...], width: int, filters: int = 32) -> keras.Model:
    """Return a net from uint8 images to features: eight convolutions, pooling, one dense layer.

    Nets of different `width` differ in the dense layer alone, so a comparison of widths compares
    features and not depth.

    Args:
        shape: Of an image, `(height, width, channels)`.
        width: Number of features.
        filters: Of the first convolution; the last has eight times as many.

    Shapes:
        Input: `(batch, *shape)`. Output: `(batch, width)`.

    Examples:
        >>> backbone((32, 32, 3), width=64).output_shape
        (None, 64)
    """
    image = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 64, offset=-2)(image)
    x = _convolution(x, filters, 2)
    for factor in (2, 4):
        x = _convolution(x, factor * filters, 2)
        inner = _convolution(x, factor * filters)
        x = layers.ReLU()(layers.Add()([x, _normal(inner, factor * filters)]))
    x = _convolution(x, 8 * filters)
    pooled = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(width)(pooled), name="backbone")


def _convolution(x: Any, filters: int, strides: int = 1) -> Any:
    return layers.ReLU()(_normal(x, filters, strides))


def _normal(x: Any, filters: int, strides: int = 1) -> Any:
    x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
    return layers.BatchNormalization(momentum=0.9)(x)


def madds(model: keras.Model) -> int:
    """Return the multiply-adds of an image in the convolutions and dense layers of a model.

    Examples:
        >>> madds(backbone((8, 8, 1), width=4, filters=8))
        65920
    """
    total = 0
    for layer in model.layers:
        if isinstance(layer, (layers.Conv2D, layers.Dense)):
            # Every weight of a kernel is used once at each place of the output.
            total += prod(layer.output.shape[1:-1]) * prod(layer.kernel.shape)
    return total
