"""SVD: the head of a fixed-feature net, factored through fewer coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from .._dims import check_dims, check_width
from .._features import Array, check_fitted


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
        kernel: That of the full head, `(width, num_classes)`.
        bias: That of the full head, `(num_classes,)`; None where it has none.
        dim: Number of coordinates. From `num_classes` on the head is the full one again.

    Formula:
        W = U S V^T;  logits = (x . U_{1:m}) . (S V^T)_{1:m} + b

    Raises:
        ValueError: If `kernel` is no finite matrix, `bias` not a finite number per class, or `dim`
            exceeds the width of the kernel.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4: the baseline SVD.

    Examples:
        >>> head = low_rank_head(np.diag([3.0, 2.0]), np.zeros(2), dim=1)
        >>> np.abs(head.logits([[1.0, 1.0]])).tolist()
        [[3.0, 0.0]]
    """
    matrix = keras.ops.convert_to_numpy(kernel)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise ValueError(
            "kernel must be a finite matrix (width, num_classes). "
            f"Received: {matrix.dtype} of shape {matrix.shape}. "
            "Give that of a trained head: model.head.weights_at(width)[0]."
        )
    classes = matrix.shape[1]
    shift = np.zeros(classes, matrix.dtype) if bias is None else keras.ops.convert_to_numpy(bias)
    if shift.shape != (classes,) or not np.isfinite(shift).all():
        raise ValueError(
            "bias must be finite numbers, one per class. "
            f"Received: {shift.dtype} of shape {shift.shape} for {classes} classes. "
            "Give that of the same head: model.head.weights_at(width)[1]."
        )
    check_width(check_dims((dim,)), len(matrix))
    # Beyond the rank the directions are any that complete the basis: they carry no logits.
    more = dim > min(matrix.shape)
    left, singular, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=more)
    short = np.zeros((dim, classes))
    short[: len(singular)] = (singular[:, None] * right[: len(singular)])[:dim]
    return LowRankHead(
        projection=left[:, :dim].astype(matrix.dtype),
        kernel=short.astype(matrix.dtype),
        bias=shift,
    )
