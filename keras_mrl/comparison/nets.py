"""The nets of a comparison: one small net under different heads, losses and widths.

Images go through a residual net of convolutions; embeddings, which are features already, through
two dense layers.
"""

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
        half: Trained for half of the epochs: shows what more epochs still change.
    """

    method: str
    dims: tuple[int, ...]
    seed: int = 0
    all_classes: bool = True
    half: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        dim = f"_{self.dims[-1]}" if self.method == "ff" else ""
        part = ("" if self.all_classes else "_seen") + ("_half" if self.half else "")
        return f"{self.method}{dim}{part}-{self.seed}"

    @property
    def is_searched(self) -> bool:
        """Whether neighbours are searched among its features."""
        return self.seed == 0 and not self.half and self.method in ("mrl", "mrl_e", "ff")

    def epochs_of(self, epochs: int) -> int:
        """Return its share of a plan's epochs."""
        return epochs // 2 if self.half else epochs

    def make(self, shape: tuple[int, ...], num_classes: int, filters: int) -> keras.Model:
        """Return the net, built and newly initialised."""
        keras.utils.set_random_seed(self.seed)
        width, is_embedded = self.dims[-1], len(shape) == 1
        if self.method == "slimmable" and is_embedded:
            embedding, x = _standardised(shape[0])
            # The embedding has one width; what follows has one per dim.
            inner = keras.Input(x.shape[1:])
            narrowing = keras.Model(inner, _dense_layers(inner, width))
            return keras.Model(embedding, slimmable(narrowing, num_classes, self.dims)(x))
        body = dense_net(shape[0], width) if is_embedded else backbone(shape, width, filters)
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
    dims: Sequence[int], seeds: int, seeded: Sequence[int], unseen: bool, variants: bool = True
) -> tuple[Net, ...]:
    """Return the nets of a comparison in the order of training, the most telling first.

    Args:
        dims: Of the nested heads.
        seeds: How many times the Matryoshka net and some fixed-feature nets are trained.
        seeded: The dims of those fixed-feature nets.
        unseen: Whether the Matryoshka net and a fixed-feature net per dim are also trained without
            the unseen classes.
        variants: Whether slimmable nets and the boosted loss are trained, too.
    """
    ladder, width = tuple(dims), dims[-1]
    nets = [Net("mrl", ladder), Net("ff", (width,)), Net("mrl_e", ladder)]
    nets += [Net("ff", (dim,)) for dim in ladder[:-1]]
    nets += [Net("mrl", ladder, half=True), *(Net("ff", (dim,), half=True) for dim in seeded)]
    if variants:
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


HIDDEN = 512
_SCALED = "scaled_embedding"
_DROPPED = 0.3


def dense_net(inputs: int, width: int) -> keras.Model:
    """Return a net from embeddings to features: a hidden layer of 512, and one of `width`.

    Embeddings of any scale are standardised first. Features are standardised, too: several losses
    that share them then learn about as fast as one.

    Args:
        inputs: How wide the embeddings are.
        width: Number of features.

    Shapes:
        Input: `(batch, inputs)`. Output: `(batch, width)`.

    Examples:
        >>> from keras_mrl.comparison.nets import dense_net
        >>> dense_net(384, width=64).output_shape
        (None, 64)
    """
    embedding, x = _standardised(inputs)
    return keras.Model(embedding, _dense_layers(x, width), name="backbone")


def _standardised(inputs: int) -> tuple[Any, Any]:
    """An input of embeddings, and them with every coordinate at mean 0 and variance 1."""
    embedding = keras.Input((inputs,), name="embedding")
    # Embeddings of unit length are small numbers: a usual epsilon would count beside them.
    scaled = layers.BatchNormalization(
        momentum=0.9, epsilon=1e-9, center=False, scale=False, name=_SCALED
    )
    return embedding, scaled(embedding)


def start_scaled(model: keras.Model, embeddings: Any) -> None:
    """Let a net on embeddings begin with their mean and variance.

    It follows those of its batches from there. From 0 and 1, where such layers begin, short
    trainings would end before it has reached those of small numbers.
    """
    layer = getattr(model, "backbone", model).get_layer(_SCALED)
    layer.moving_mean.assign(embeddings.mean(axis=0))
    layer.moving_variance.assign(embeddings.var(axis=0))


def _dense_layers(x: Any, width: int) -> Any:
    hidden = layers.Dropout(_DROPPED)(layers.Dense(HIDDEN, activation="relu")(x))
    return layers.BatchNormalization(momentum=0.9)(layers.Dense(width)(hidden))


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
