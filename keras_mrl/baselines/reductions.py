"""Nets of one dim, and ways to reduce the features of such a net to fewer coordinates.

A net trained at one dim alone is called fixed-feature (FF). Its features are cut without training
the net again: to some coordinates (Rand. FS, Rand. LP), to the directions in which they vary most
(PCA), or to those its head reads most (SVD).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from .._arrays import Array, check_features, check_fitted
from .._dims import check_dims, check_width
from ..evaluation.probe import LinearProbe, linear_probe
from ..layers import MatryoshkaHead
from ..models import MatryoshkaClassifier

_ROWS = 4096  # centred at a time, in float64


def fixed_features(
    make_backbone: Callable[[int], keras.layers.Layer],
    num_classes: int,
    dims: Sequence[int],
    train: Callable[[MatryoshkaClassifier], Any],
) -> dict[int, MatryoshkaClassifier]:
    """Make and train one classifier per dim, each with a backbone as wide as its dim (FF).

    Each is a `MatryoshkaClassifier` whose head has one dim, so `train` can be the recipe of the
    Matryoshka model itself: the same loss, optimizer, batches and log names.

    Args:
        make_backbone: Takes a dim and returns a new backbone with features of that width.
        num_classes: Number of classes.
        dims: Strictly increasing widths, one net each.
        train: The recipe, which compiles and fits the model it receives.

    Returns:
        The trained models by dim.

    Raises:
        ValueError: If a backbone has another width than its dim.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4: the baseline FF.

    Examples:
        >>> def make_backbone(dim):
        ...     return keras.Sequential([keras.Input((5,)), keras.layers.Dense(dim)])
        >>> def train(model):
        ...     loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        ...     model.compile("sgd", MatryoshkaLoss(loss))
        ...     model.fit(np.ones((4, 5)), np.arange(4) % 3, verbose=0)
        >>> models = fixed_features(make_backbone, 3, dims=(2, 4), train=train)
        >>> {dim: model.head.dims for dim, model in models.items()}
        {2: (2,), 4: (4,)}
    """
    models = {}
    for dim in check_dims(dims):
        backbone = make_backbone(dim)
        width = (getattr(backbone, "output_shape", None) or (dim,))[-1]
        if width != dim:
            raise ValueError(
                "make_backbone must return features of the width it is asked for. "
                f"Received: a backbone of width {width} for dim {dim}. "
                "End it with keras.layers.Dense(dim)."
            )
        head = MatryoshkaHead(num_classes, dims=(dim,))
        models[dim] = MatryoshkaClassifier(backbone, head, name=f"fixed_feature_{dim}")
        train(models[dim])
    return models


def first_coordinates(features: Any, dim: int) -> Array:
    """Return the first `dim` coordinates: the paper's Rand. FS, which it judges by 1-NN accuracy.

    The order of the coordinates means nothing in a net that was trained at its full width alone.

    Args:
        features: `(rows, width)`.
        dim: Number of coordinates.

    Raises:
        ValueError: If `features` are no finite table with at least one row, or narrower than `dim`.

    Examples:
        >>> first_coordinates([[1.0, 2.0, 3.0]], dim=2).tolist()
        [[1.0, 2.0]]
    """
    return check_features(features, dim)[:, :dim]


@dataclass(frozen=True, eq=False)
class RandomProbe:
    """A linear probe on some coordinates of the features.

    Args:
        indices: Positions of the coordinates, `(dim,)`.
        probe: A linear probe of these coordinates.
        width: Of the features that the coordinates were chosen from.

    Examples:
        >>> probe = LinearProbe(kernel=np.eye(2), bias=np.zeros(2), classes=np.array([4, 7]))
        >>> RandomProbe(np.array([2, 0]), probe, width=3).predict([[1.0, 9.0, 5.0]]).tolist()
        [4]
    """

    indices: Array
    probe: LinearProbe
    width: int

    def embed(self, features: Any) -> Array:
        """Return the chosen coordinates `(rows, dim)` of features `(rows, width)`."""
        return check_fitted(features, self.width)[:, self.indices]

    def predict(self, features: Any) -> Array:
        """Return the likeliest label of every row of features `(rows, width)`."""
        return self.probe.predict(self.embed(features))


def random_probe(features: Any, labels: Any, dim: int, seed: int = 0) -> RandomProbe:
    """Return a linear probe of coordinates chosen at random: the paper's Rand. LP.

    With the same seed, the coordinates of a smaller dim are the first of those of a larger dim.

    Args:
        features: Of the training images, `(rows, width)`.
        labels: Their labels, `(rows,)`.
        dim: Number of coordinates.
        seed: Of the choice; training needs none.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If `features` and `labels` do not fit, or the features are narrower than `dim`.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4: the baseline Rand. LP.

    Examples:
        >>> features = np.repeat([[0.0, 9.0, 1.0], [9.0, 0.0, 1.0]], 4, axis=0)
        >>> random_probe(features, np.repeat([3, 5], 4), dim=3).predict(features).tolist()
        [3, 3, 3, 3, 5, 5, 5, 5]
    """
    table = check_features(features, dim)
    width = table.shape[1]
    indices = np.random.default_rng(seed).permutation(width)[:dim]
    return RandomProbe(indices, linear_probe(table[:, indices], labels), width)


@dataclass(frozen=True, eq=False)
class PrincipalComponents:
    """A mean, and orthonormal directions in the order of their variance.

    Their first columns are the components of fewer dims: keep the widest and slice.

    Args:
        mean: Of the features, `(width,)`.
        components: One direction per column, `(width, dim)`.

    Examples:
        >>> components = PrincipalComponents(mean=np.ones(2), components=np.eye(2))
        >>> components.embed([[3.0, 1.0]]).tolist()
        [[2.0, 0.0]]
    """

    mean: Array
    components: Array

    def embed(self, features: Any) -> Array:
        """Return the coordinates `(rows, dim)` of features `(rows, width)`."""
        return (check_fitted(features, len(self.mean)) - self.mean) @ self.components


def principal_components(features: Any, dim: int) -> PrincipalComponents:
    """Return the `dim` directions of largest variance.

    The covariance is computed in float64, so the memory grows with `width` squared and not with the
    rows. The largest entry of every direction is positive.

    Args:
        features: Of the training images, `(rows, width)`.
        dim: Number of directions.

    Raises:
        ValueError: If `features` are no finite table with at least one row, or narrower than `dim`.

    Examples:
        >>> line = np.outer(np.arange(5.0), [0.6, 0.8])
        >>> principal_components(line, dim=1).components.round(3).tolist()
        [[0.6], [0.8]]
    """
    table = check_features(features, dim)
    mean = table.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for start in range(0, len(table), _ROWS):
        block = table[start : start + _ROWS] - mean
        covariance += block.T @ block
    directions = np.linalg.eigh(covariance)[1][:, ::-1][:, :dim]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    components = directions * np.where(largest < 0, -1, 1)
    return PrincipalComponents(mean.astype(table.dtype), components.astype(table.dtype))


@dataclass(frozen=True, eq=False)
class LowRankHead:
    """A linear head that reads a few coordinates, each a direction of the features.

    Args:
        projection: From features to coordinates, `(width, dim)`; its columns are orthonormal.
        kernel: From coordinates to logits, `(dim, num_classes)`.
        bias: `(num_classes,)`.

    Examples:
        >>> head = LowRankHead(np.eye(3)[:, :1], kernel=np.ones((1, 2)), bias=np.zeros(2))
        >>> head.embed([[5.0, 6.0, 7.0]]).tolist(), head.logits([[5.0, 6.0, 7.0]]).tolist()
        ([[5.0]], [[5.0, 5.0]])
    """

    projection: Array
    kernel: Array
    bias: Array

    def embed(self, features: Any) -> Array:
        """Return the coordinates `(rows, dim)` of features `(rows, width)`."""
        return check_fitted(features, len(self.projection)) @ self.projection

    def logits(self, features: Any) -> Array:
        """Return the logits `(rows, num_classes)` of features `(rows, width)`."""
        return self.embed(features) @ self.kernel + self.bias


def low_rank_head(kernel: Any, bias: Any, dim: int) -> LowRankHead:
    """Return the head of rank `dim` nearest to a full one, by singular value decomposition.

    Nothing is trained. For a fixed-feature net give `*model.head.weights_at(width)`.

    Args:
        kernel: Of the full head, `(width, num_classes)`.
        bias: Of the full head, `(num_classes,)`; None where it has none.
        dim: Number of coordinates. From `num_classes` on the head is the full one again.

    Formula:
        W = U S V^T;  logits = (x . U_{1:m}) . (S V^T)_{1:m} + b

    Raises:
        ValueError: If `kernel` is no finite matrix, `bias` is not one finite number per class, or
            `dim` exceeds the width of the kernel.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4: the baseline SVD.

    Examples:
        >>> head = low_rank_head(np.diag([3.0, 2.0]), np.zeros(2), dim=1)
        >>> np.abs(head.logits([[1.0, 1.0]])).tolist()
        [[3.0, 0.0]]
    """
    full = keras.ops.convert_to_numpy(kernel)
    if full.ndim != 2 or not full.size or not np.isfinite(full).all():
        raise ValueError(
            "kernel must be a finite matrix (width, num_classes). "
            f"Received: {full.dtype} of shape {full.shape}. "
            "Give that of a trained head: model.head.weights_at(width)[0]."
        )
    classes = full.shape[1]
    offsets = np.zeros(classes, full.dtype) if bias is None else keras.ops.convert_to_numpy(bias)
    if offsets.shape != (classes,) or not np.isfinite(offsets).all():
        raise ValueError(
            "bias must be finite numbers, one per class. "
            f"Received: {offsets.dtype} of shape {offsets.shape} for {classes} classes. "
            "Give that of the same head: model.head.weights_at(width)[1]."
        )
    check_width(check_dims((dim,)), len(full))
    # Directions beyond the rank complete the basis and carry no logits.
    beyond = dim > min(full.shape)
    left, singular, right = np.linalg.svd(full.astype(np.float64), full_matrices=beyond)
    low = np.zeros((dim, classes))
    low[: len(singular)] = (singular[:, None] * right[: len(singular)])[:dim]
    return LowRankHead(left[:, :dim].astype(full.dtype), low.astype(full.dtype), offsets)
