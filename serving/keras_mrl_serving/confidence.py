"""How sure a row is: the measures a cascade may stop by, from logits.

The manifest and the exported graph know the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def softmax(logits: npt.NDArray[Any], temperature: float = 1.0) -> Floats:
    """Return the probabilities of `logits (..., classes)`, in float32.

    Examples:
        >>> softmax(np.log([1.0, 3.0])).tolist()
        [0.25, 0.75]
    """
    scores = np.asarray(logits, dtype=np.float32)
    # Divided last: the difference of two large quotients keeps fewer digits.
    raised = np.exp((scores - scores.max(axis=-1, keepdims=True)) / np.float32(temperature))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), np.float32)


def max_probability(logits: npt.NDArray[Any], temperature: float = 1.0) -> Floats:
    """Return the largest probability of each row of `logits (..., classes)`.

    Examples:
        >>> max_probability(np.log([[1.0, 3.0]])).tolist()
        [0.75]
    """
    return np.asarray(softmax(logits, temperature).max(axis=-1))


def _margin(shares: Floats) -> Floats:
    """By how much the largest probability exceeds the second; of one class, 1."""
    if shares.shape[-1] == 1:
        return shares[..., 0]
    second, first = np.moveaxis(np.partition(shares, -2, axis=-1)[..., -2:], -1, 0)
    return np.asarray(first - second)


def _entropy(shares: Floats) -> Floats:
    """The negative entropy in nats: 0 is certain."""
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.asarray((shares * logs).sum(axis=-1))


_MEASURES: dict[str, Callable[[Floats], Floats]] = {
    "max_probability": lambda shares: np.asarray(shares.max(axis=-1)),
    "margin": _margin,
    "entropy": _entropy,
}
CONFIDENCES = tuple(_MEASURES)


def check_confidence(measure: str) -> str:
    """Return the name of a measure.

    Raises:
        ValueError: If it is none of `CONFIDENCES`.

    Examples:
        >>> check_confidence("margin")
        'margin'
    """
    if measure not in CONFIDENCES:
        raise ValueError(
            f"confidence must be one of {', '.join(CONFIDENCES)}. "
            f"Received: confidence={measure!r}. Choose one of those."
        )
    return measure


def confidence_in(measure: str, shares: Floats) -> Floats:
    """Return how sure each row of probabilities `(..., classes)` is; higher is surer.

    Args:
        measure: `max_probability`, `margin` (the best minus the second) or `entropy` (the negative
            entropy in nats).
        shares: What `softmax` returns.

    Examples:
        >>> shares = np.float32([0.25, 0.75])
        >>> [round(float(confidence_in(name, shares)), 3) for name in CONFIDENCES]
        [0.75, 0.5, -0.562]
    """
    return _MEASURES[check_confidence(measure)](shares)


def confidence_of(measure: str, logits: npt.NDArray[Any], temperature: float = 1.0) -> Floats:
    """Return how sure each row of `logits (..., classes)` is: `confidence_in` of their softmax.

    Args:
        measure: One of `CONFIDENCES`.
        logits: `(..., classes)`.
        temperature: Divides the logits before the softmax.

    Examples:
        >>> confidence_of("margin", np.log([[1.0, 3.0]])).tolist()
        [0.5]
    """
    return confidence_in(measure, softmax(logits, temperature))


def lowest(measure: str, num_classes: int) -> float:
    """Return what a measure says of a row whose classes are all as likely.

    Examples:
        >>> lowest("max_probability", 4), lowest("margin", 4), round(lowest("entropy", 4), 2)
        (0.25, 0.0, -1.39)
    """
    return {
        "max_probability": 1 / num_classes,
        "margin": 0.0,
        "entropy": -math.log(num_classes),
    }[check_confidence(measure)]
