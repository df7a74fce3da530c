"""Which nets a comparison trains, and how each is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

from ..baselines import slimmable
from ..layers import MatryoshkaHead
from ..losses import MatryoshkaLoss, first_boosted
from ..models import MatryoshkaClassifier
from .data import Images

# Batches of an epoch: shuffled, shifted and mirrored, the same whenever they are asked for.

SIZE = 128


class Batches(keras.utils.PyDataset):
    """The batches of one epoch.

    All that is random comes from the seed and the epoch's number, so that an epoch begun again
    after an interruption sees the same images.

    Args:
        part: What to draw from.
        seed: Of the net.
        epoch: Its number.
        flip: Whether half of the images are mirrored.
    """

    def __init__(self, part: Images, seed: int, epoch: int, flip: bool) -> None:
        super().__init__()
        self._part = part
        self._seed = (seed, epoch)
        self._flip = flip
        self._order = np.random.default_rng(self._seed).permutation(len(part.labels))

    def __len__(self) -> int:
        return -(-len(self._order) // SIZE)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        rows = self._order[index * SIZE : (index + 1) * SIZE]
        draw = np.random.default_rng((*self._seed, index))
        return moved(self._part.pixels[rows], draw, self._flip), self._part.labels[rows]


def moved(
    images: npt.NDArray[np.uint8], draw: np.random.Generator, flip: bool
) -> npt.NDArray[np.uint8]:
    """Return each image shifted by up to an eighth of its side and, maybe, mirrored."""
    rows, height, width, _ = images.shape
    most = max(height, width) // 8
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    down, right = draw.integers(0, 2 * most + 1, (2, rows))
    shifted: Any = windows[np.arange(rows), down, right].transpose(0, 2, 3, 1)
    if flip:
        mirrored = np.asarray(draw.random(rows) < 0.5)
        shifted = np.where(mirrored[:, None, None, None], shifted[:, :, ::-1], shifted)
    return np.asarray(shifted, np.uint8)


# The small residual net that every method of a comparison trains.


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


@dataclass(frozen=True)
class Net:
    """One net to train.

    Args:
        method: `mrl`, `mrl_e`, `mrl_boosted` (the first dim's loss counts twice), `ff` or
            `slimmable`.
        dims: Of its head.
        seed: Of its weights and its batches.
        all_classes: False leaves the unseen classes out.
    """

    method: str
    dims: tuple[int, ...]
    seed: int = 0
    all_classes: bool = True

    @property
    def name(self) -> str:
        """As its folder is called."""
        dim = f"_{self.dims[-1]}" if self.method == "ff" else ""
        seen = "" if self.all_classes else "_seen"
        return f"{self.method}{dim}{seen}-{self.seed}"

    @property
    def is_searched(self) -> bool:
        """Whether neighbours are looked for among its features."""
        return self.seed == 0 and self.method in ("mrl", "mrl_e", "ff")

    def make(self, shape: tuple[int, ...], num_classes: int, filters: int) -> keras.Model:
        """Return the net, newly initialised."""
        keras.utils.set_random_seed(self.seed)
        body = backbone(shape, self.dims[-1], filters)
        if self.method == "slimmable":
            return slimmable(body, num_classes, self.dims)
        head = MatryoshkaHead(num_classes, dims=self.dims, tied=self.method == "mrl_e")
        return MatryoshkaClassifier(body, head)

    def loss(self) -> MatryoshkaLoss:
        """Return what it is trained on."""
        inner = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return MatryoshkaLoss(inner, first_boosted if self.method == "mrl_boosted" else None)


def nets_for(
    dims: Sequence[int], seeds: int, seeded: Sequence[int], unseen: bool
) -> tuple[Net, ...]:
    """Return the nets of a comparison, those one would miss most first.

    Args:
        dims: Of the nested heads.
        seeds: How many times the Matryoshka net and some fixed-feature nets are trained.
        seeded: The dims of those fixed-feature nets.
        unseen: Whether the Matryoshka net and a fixed-feature net per dim are also trained without
            the unseen classes.
    """
    ladder, width = tuple(dims), dims[-1]
    first = [Net("mrl", ladder), Net("ff", (width,)), Net("mrl_e", ladder)]
    first += [Net("ff", (dim,)) for dim in ladder[:-1]]
    first += [Net("slimmable", ladder), Net("mrl_boosted", ladder)]
    if unseen:
        first += [Net("mrl", ladder, all_classes=False), Net("ff", (width,), all_classes=False)]
    for seed in range(1, seeds):
        first += [Net("mrl", ladder, seed), *(Net("ff", (dim,), seed) for dim in seeded)]
    if unseen:
        first += [Net("ff", (dim,), all_classes=False) for dim in ladder[:-1]]
    return tuple(first)
