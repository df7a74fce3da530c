"""Some coordinates of a fixed-feature net: its first (Rand. FS), or random ones (Rand. LP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._features import Array, check_features, check_fitted
from ..evaluation.probe import LinearProbe, linear_probe


def first_coordinates(features: Any, dim: int) -> Array:
    """Return the first `dim` coordinates: the paper's Rand. FS, whose measure is 1-NN.

    In a net trained at its full width alone the order of the coordinates means nothing.

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
        indices: Which coordinates, `(dim,)`.
        probe: What was learned on them.
        width: Of the features they were chosen from.

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
    """Choose coordinates at random and train a linear probe on them: the paper's Rand. LP.

    The coordinates of a smaller dim are the first of a larger one's, for the same seed.

    Args:
        features: Those of the training images, `(rows, width)`.
        labels: Their labels, `(rows,)`.
        dim: Number of coordinates.
        seed: Of the choice. The probe itself has one optimum: see `linear_probe`.

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
