"""The nets of a comparison: one small residual net under different heads, losses and widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
from keras import layers

from ..baselines import slimmable
from ..layers import MatryoshkaHead
from ..losses import MatryoshkaLoss, first_boosted
from ..models import MatryoshkaClassifier


@dataclass(frozen=True)
class Net:
    """One net to train.

    Args:
        method: `mrl`, `mrl_e`, `mrl_boosted` (the first dim's loss counts twice), `ff` or
            `slimmable`.
        dims: Of its head.
        seed: Of its weights and its batches.
        all_classes: False trains it without the unseen classes.
    """

    method: str
    dims: tuple[int, ...]
    seed: int = 0
    all_classes: bool = True

    @property
    def name(self) -> str:
        """The name of its folder."""
        dim = f"_{self.dims[-1]}" if self.method == "ff" else ""
        seen = "" if self.all_classes else "_seen"
        return f"{self.method}{dim}{seen}-{self.seed}"

    @property
    def is_searched(self) -> bool:
        """Whether neighbours are searched among its features."""
        return self.seed == 0 and self.method in ("mrl", "mrl_e", "ff")

    def make(self, shape: tuple[int, ...], num_classes: int, filters: int) -> keras.Model:
        """Return the net, built and newly initialised."""
        keras.utils.set_random_seed(self.seed)
        body = backbone(shape, self.dims[-1], filters)
        if self.method == "slimmable":
            return slimmable(body, num_classes, self.dims)
        head = MatryoshkaHead(num_classes, dims=self.dims, tied=self.method == "mrl_e")
        model = MatryoshkaClassifier(body, head)
        model.build((None, *shape))
        return model

    def loss(self) -> MatryoshkaLoss:
        """Return the loss it is trained on."""
        inner = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return MatryoshkaLoss(inner, first_boosted if self.method == "mrl_boosted" else None)


def nets_for(
    dims: Sequence[int], seeds: int, seeded: Sequence[int], unseen: bool
) -> tuple[Net, ...]:
    """Return the nets of a comparison in the order of training, the most telling first.

    Args:
        dims: Of the nested heads.
        seeds: How many times the Matryoshka net and some fixed-feature nets are trained.
        seeded: The dims of those fixed-feature nets.
        unseen: Whether the Matryoshka net and a fixed-feature net per dim are also trained without
            the unseen classes.
    """
    ladder, width = tuple(dims), dims[-1]
    nets = [Net("mrl", ladder), Net("ff", (width,)), Net("mrl_e", ladder)]
    nets += [Net("ff", (dim,)) for dim in ladder[:-1]]
    nets += [Net("slimmable", ladder), Net("mrl_boosted", ladder)]
    if unseen:
        nets += [Net("mrl", ladder, all_classes=False), Net("ff", (width,), all_classes=False)]
    for seed in range(1, seeds):
        nets += [Net("mrl", ladder, seed), *(Net("ff", (dim,), seed) for dim in seeded)]
    if unseen:
        nets += [Net("ff", (dim,), all_classes=False) for dim in ladder[:-1]]
    return tuple(nets)


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
        >>> from keras_mrl.comparison.nets import backbone
        >>> backbone((32, 32, 3), width=64).output_shape
        (None, 64)
    """
    image = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 64, offset=-2)(image)
    x = _convolution(x, filters, 2)
    for factor in (2, 4):
        x = _convolution(x, factor * filters, 2)
        inner = _convolution(x, factor * filters)
        x = layers.ReLU()(layers.Add()([x, _linear_convolution(inner, factor * filters)]))
    x = _convolution(x, 8 * filters)
    pooled = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(width)(pooled), name="backbone")


def _convolution(x: Any, filters: int, strides: int = 1) -> Any:
    return layers.ReLU()(_linear_convolution(x, filters, strides))


def _linear_convolution(x: Any, filters: int, strides: int = 1) -> Any:
    x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
    return layers.BatchNormalization(momentum=0.9)(x)


def madds(model: keras.Model) -> int:
    """Return the multiply-adds of an image in the convolutions and dense layers of a model.

    Examples:
        >>> from keras_mrl.comparison.nets import backbone, madds
        >>> madds(backbone((8, 8, 1), width=4, filters=8))
        65920
    """
    total = 0
    for layer in model.layers:
        if isinstance(layer, (layers.Conv2D, layers.Dense)):
            # Every weight of a kernel is used once at each place of the output.
            total += prod(layer.output.shape[1:-1]) * prod(layer.kernel.shape)
    return total
