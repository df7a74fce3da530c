"""Rows of embeddings, and a loss on them beside its float64 loop."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tests.helpers.differentiate import value, value_and_gradient
from tests.helpers.loss_reference import gradient_of

RANDOM = np.random.default_rng(0)
DIMS = (1, 4, 9)  # one of length one, a width that is no power of two; one coordinate is in none
WIDTH = 10


def embeddings(*shape: int) -> Any:
    rows = RANDOM.normal(size=(*shape, WIDTH)).astype("float32")
    rows[..., 0] += np.sign(rows[..., 0])  # the prefix of length one is not divided by next to none
    return rows


def rows_and_gradient(loss: keras.losses.Loss, labels: Any, rows: Any) -> tuple[Any, Any]:
    """One loss per row, and the gradient of their sum by the embeddings."""
    losses, (gradient,) = value_and_gradient(lambda r: loss.call(labels, r), [rows])
    return losses, gradient


def of(loss: keras.losses.Loss, labels: Any, rows: Any, **weights: Any) -> Any:
    return value(lambda r: loss(labels, r, **weights), rows)


def equals_the_loop(
    loss: keras.losses.Loss, labels: Any, rows: Any, reference: Callable[[Any], Any]
) -> Any:
    losses, gradient = rows_and_gradient(loss, labels, rows)
    np.testing.assert_allclose(losses, reference(rows), rtol=1e-5, atol=1e-6)
    expected = gradient_of(lambda values: reference(values).sum(), rows)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5)
    assert np.abs(expected[..., :9]).max() > 0.1
    assert not gradient[..., 9].any()
    return losses
