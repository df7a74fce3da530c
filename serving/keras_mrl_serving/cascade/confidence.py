"""How sure a row is: the measures a cascade may stop by, from logits.

The manifest and the exported graph know the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..inputs import as_float32, as_float64, check_holdout

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


# Where a threshold goes among the confidences of a holdout.


def paper_grid(measure: str, num_classes: int) -> Floats:
    """Return the 100 thresholds that the paper's procedure tries: from 0.1 to 1.

    Of the other measures they reach over all values there are.

    Examples:
        >>> paper_grid("max_probability", 10)[[0, -1]].tolist()
        [0.10000000149011612, 1.0]
    """
    if measure == "max_probability":
        return np.linspace(0.1, 1.0, 100, dtype=np.float32)
    top = 0.0 if measure == "entropy" else 1.0
    return np.linspace(lowest(measure, num_classes), top, 100, dtype=np.float32)


def smallest_best(
    confidence: Floats,
    right: npt.NDArray[np.bool],
    right_next: npt.NDArray[np.bool],
    grid: Floats,
) -> float:
    """Return the smallest best threshold of one adjacent pair of dims.

    With rows in order of confidence, a threshold accepts a tail of them, so the accuracies of all
    thresholds are two cumulative sums. The best is moved midway between the two confidences that
    it separates.

    Args:
        confidence: At the smaller dim, `(rows,)`.
        right: Whether the smaller dim's class is right.
        right_next: Whether the wider dim's is.
        grid: The thresholds to try, ascending.

    Examples:
        >>> sure, unsure = [True, False], [True, True]
        >>> smallest_best(np.float32([0.75, 0.25]), *map(np.array, (sure, unsure)), [0.1, 0.5])
        0.5
    """
    order = np.argsort(confidence, kind="stable")
    ascending = confidence[order]
    first_accepted = np.searchsorted(ascending, grid, side="right")
    below = np.concatenate([[0], np.cumsum(right_next[order])])
    above = np.concatenate([np.cumsum(right[order][::-1])[::-1], [0]])
    best = int(np.argmax(below[first_accepted] + above[first_accepted]))
    return midway(ascending, int(first_accepted[best]))


def midway(ascending: Floats, first: int) -> float:
    """Return the threshold that accepts exactly `ascending[first:]`, far from both neighbours.

    Examples:
        >>> midway(np.float32([0.25, 0.5, 0.75]), first=1)
        0.375
        >>> midway(np.float32([-0.5, -0.25]), first=0)  # of negative entropies, too
        -1.0
    """
    least = ascending[0] if len(ascending) else np.float32(1)
    under = np.float32(0) if least > 0 else least - np.float32(1)
    below = ascending[first - 1] if first > 0 else under
    above = ascending[first] if first < len(ascending) else np.float32(1)
    middle = np.float32(below + (above - below) / 2)
    return float(middle if below <= middle < above else below)


# Temperatures: what the logits of each dim are divided by, so that confidences are comparable.

_SHARPEST, _FLATTEST = 1e3, 1e-3  # what logits may be multiplied by
_STEPS = 100


def fit_temperatures(logits: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, ...]:
    """Return for each dim the temperature of least cross-entropy on a holdout.

    Nets are surer than they are right, and more so at some dims than at others. One number per dim
    mends most of it, and no class changes. Give the result to `CascadePolicy.learn` or
    `search_cascades`; it lies in 0.001 to 1,000.

    Args:
        logits: What `predict` of the nested model returns for the holdout.
        labels: Class ids of the holdout, from 0.

    Shapes:
        logits: `(rows, num_dims, num_classes)`. labels: `(rows,)`.

    Formula:
        T_m = argmin_T mean_i CE(softmax(logits_m / T); y_i), which is convex in 1/T

    Raises:
        ValueError: If shapes do not fit, rows are none, or probabilities were given.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 2000)
        >>> scores = np.eye(3)[labels] + rng.normal(size=(2000, 3))  # as probable as they say
        >>> [round(t) for t in fit_temperatures(np.stack([scores, 5 * scores], axis=1), labels)]
        [1, 5]
    """
    given = as_float32("logits", logits)
    scores, truth = check_holdout(given, labels, given.shape[1] if given.ndim == 3 else 1)
    return tuple(_fit(scores[:, i].astype(np.float64), truth) for i in range(scores.shape[1]))


def check_temperatures(temperatures: Sequence[float] | None, num_dims: int) -> tuple[float, ...]:
    """Return one temperature per dim; ones for None.

    Raises:
        ValueError: If they are not one finite number above 0 per dim.

    Examples:
        >>> check_temperatures(None, 2)
        (1.0, 1.0)
    """
    if temperatures is None:
        return (1.0,) * num_dims
    checked = as_float64("temperatures", temperatures)
    if checked.shape != (num_dims,) or not (np.isfinite(checked) & (checked > 0)).all():
        raise ValueError(
            "temperatures must be one finite number above 0 per dim. "
            f"Received: temperatures={temperatures!r} for {num_dims} dims. "
            "Give what fit_temperatures returns."
        )
    return tuple(checked.tolist())


def _fit(scores: npt.NDArray[np.float64], truth: npt.NDArray[np.int64]) -> float:
    """By the sign of the slope, which rises with the sharpness 1/T: it cannot run away."""
    low, high = np.log(_FLATTEST), np.log(_SHARPEST)
    mean_right = scores[np.arange(len(truth)), truth].mean()
    for _ in range(_STEPS):
        middle = (low + high) / 2
        scaled = np.exp(middle) * (scores - scores.max(axis=-1, keepdims=True))
        shares = np.exp(scaled)
        expected = (shares * scores).sum(axis=-1) / shares.sum(axis=-1)
        if expected.mean() > mean_right:
            high = middle
        else:
            low = middle
        if high - low < 1e-6:
            break
    return float(np.exp(-(low + high) / 2))
