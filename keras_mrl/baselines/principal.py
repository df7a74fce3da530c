"""PCA: the directions in which the features of a fixed-feature net vary most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._features import Array, check_features, check_fitted


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

    The covariance is taken in float64 and decomposed, so the memory is that of `width` squared,
    however many rows there are. The largest entry of every direction is positive.

    Args:
        features: Those of the training images, `(rows, width)`.
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


_ROWS = 4096  # centred at a time, in float64
