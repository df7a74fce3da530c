"""Linear probes: linear classifiers trained on frozen features."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from .._arrays import Array, check_features, check_fitted, check_labels_of


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of features.

    Args:
        kernel: `(width, num_classes)`.
        bias: `(num_classes,)`.
        classes: The label of every logit, ascending; labels that training did not have are none.

    Examples:
        >>> probe = LinearProbe(kernel=np.eye(2), bias=np.zeros(2), classes=np.array([3, 5]))
        >>> probe.predict([[0.0, 1.0], [2.0, 1.0]]).tolist()
        [5, 3]
    """

    kernel: Array = field(repr=False)
    bias: Array = field(repr=False)
    classes: Array = field(repr=False)

    def logits(self, features: Any) -> Array:
        """Return `(rows, num_classes)` of features `(rows, width)`."""
        return check_fitted(features, len(self.kernel)) @ self.kernel + self.bias

    def predict(self, features: Any) -> Array:
        """Return the likeliest label of every row."""
        return self.classes[self.logits(features).argmax(axis=-1)]


def linear_probe(features: Any, labels: Any, regularization: float = 1.0) -> LinearProbe:
    """Return a linear classifier trained on features.

    This is scikit-learn's logistic regression on standardised features, and not a Keras layer: the
    problem is convex, so it has one solution, the same on every backend, and no learning rate, no
    batches and no seed to choose.

    Args:
        features: `(rows, width)`.
        labels: `(rows,)`, of two classes or more.
        regularization: Factor of the squared kernel beside the summed loss, finite and above 0.

    Formula:
        minimise sum_i CE(W . s(x_i) + b; y_i) + regularization / 2 * ||W||^2, where s subtracts the
        mean of every feature and divides by its standard deviation

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If `features` are no finite table, `labels` not one per row or of one class
            alone, or `regularization` is not a finite number above 0.

    Examples:
        >>> features, labels = [[0.0, 1.0], [1.0, 1.0], [4.0, 1.0], [5.0, 1.0]], [7, 7, 9, 9]
        >>> linear_probe(features, labels).predict([[0.5, 1.0], [4.5, 1.0]]).tolist()
        [7, 9]
    """
    if not isinstance(regularization, Real) or not 0 < regularization < np.inf:
        raise ValueError(
            "regularization must be a finite number above 0. "
            f"Received: regularization={regularization!r}. "
            "Give a small one, 1e-6, to have next to none."
        )
    table = check_features(features).astype(np.float64)
    truth = check_labels_of(table, labels)
    check_probe(truth)
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(table)
    regression = LogisticRegression(C=1 / float(regularization), max_iter=1000)
    regression.fit(scaler.transform(table), truth)
    weights, biases = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # one sigmoid is a softmax whose first logit is zero
        weights = np.concatenate([np.zeros_like(weights), weights])
        biases = np.concatenate([np.zeros_like(biases), biases])
    kernel = weights.T / scaler.scale_[:, None]
    return LinearProbe(kernel, biases - scaler.mean_ @ kernel, regression.classes_)


def check_probe(labels: Array) -> None:
    """Raise an error where no probe can be trained on rows of these labels.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If all labels are equal.
    """
    try:
        import sklearn.linear_model  # noqa: F401 - is it installed?
    except ImportError as error:
        raise ImportError(
            f"A linear probe is trained by scikit-learn. Received: {error}. "
            "Install it: pip install 'keras-mrl[evaluate]'."
        ) from error
    if len(np.unique(labels)) < 2:
        raise ValueError(
            "A linear probe tells classes apart. "
            f"Received: {len(labels)} labels, all of them {labels[0]}. "
            "Give rows of two classes or more."
        )
