"""How sure a row is: the measures a cascade may stop by, and the temperatures they are taken at.

A stage of a cascade accepts a row if its confidence is strictly above the stage's threshold. The
manifest and the exported graph name the measures as here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..inputs import as_float32, as_float64, check_holdout
from .stages import Logits, labelled_stages

Floats = npt.NDArray[np.float32]


def softmax(logits: npt.NDArray[Any], temperature: float = 1.0) -> Floats:
    """Return the probabilities of `logits (..., classes)`, in float32.

    Examples:
        >>> softmax(np.log([1.0, 3.0])).tolist()
        [0.25, 0.75]
    """
    scores = np.asarray(logits, dtype=np.float32)
    # Subtract, then divide: the difference of two large quotients keeps fewer digits.
    exponentials = np.exp((scores - scores.max(axis=-1, keepdims=True)) / np.float32(temperature))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True), np.float32)


def max_probability(logits: npt.NDArray[Any], temperature: float = 1.0) -> Floats:
    """Return the largest probability of each row of `logits (..., classes)`.

    Examples:
        >>> max_probability(np.log([[1.0, 3.0]])).tolist()
        [0.75]
    """
    return np.asarray(softmax(logits, temperature).max(axis=-1))


def _margin(probabilities: Floats) -> Floats:
    """Return by how much the largest probability exceeds the second; 1 for one class."""
    if probabilities.shape[-1] == 1:
        return probabilities[..., 0]
    second, first = np.moveaxis(np.partition(probabilities, -2, axis=-1)[..., -2:], -1, 0)
    return np.asarray(first - second)


def _negative_entropy(probabilities: Floats) -> Floats:
    """Return the negative entropy in nats: 0 is certain."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1))
    return np.asarray((probabilities * logs).sum(axis=-1))


_MEASURES: dict[str, Callable[[Floats], Floats]] = {
    "max_probability": lambda probabilities: np.asarray(probabilities.max(axis=-1)),
    "margin": _margin,
    "entropy": _negative_entropy,
}
CONFIDENCES = tuple(_MEASURES)


def check_confidence(measure: str) -> str:
    """Return `measure` if it is one of `CONFIDENCES`.

    Raises:
        ValueError: If it is not.

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


def confidence_in(measure: str, probabilities: Floats) -> Floats:
    """Return how sure each row of probabilities `(..., classes)` is; higher is surer.

    Args:
        measure: `max_probability`, `margin` (the best minus the second) or `entropy` (the negative
            entropy in nats).
        probabilities: As `softmax` returns them.

    Examples:
        >>> probabilities = np.float32([0.25, 0.75])
        >>> [round(float(confidence_in(name, probabilities)), 3) for name in CONFIDENCES]
        [0.75, 0.5, -0.562]
    """
    return _MEASURES[check_confidence(measure)](probabilities)


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


def fit_temperatures(logits: Logits, labels: npt.ArrayLike) -> tuple[float, ...]:
    """Return for each stage the temperature of least cross-entropy on a holdout.

    A temperature divides the logits of a stage. Nets are more confident than they are accurate, at
    some stages more than at others; one number each corrects most of that and changes no class.
    Give the result, of numbers from 0.001 to 1,000, to `CascadePolicy.learn` or
    `search_cascades`.

    Args:
        logits: What `predict` of the nested model returns for the holdout; or logits by stage, as
            `stage_logits` makes them.
        labels: Class ids of the holdout, from 0.

    Shapes:
        logits: `(rows, num_dims, num_classes)`, or `(rows, num_classes)` for each stage. labels:
        `(rows,)`.

    Formula:
        T_m = argmin_T mean_i CE(softmax(logits_m / T); y_i), which is convex in 1/T

    Raises:
        ValueError: If shapes do not fit, there are no rows, or these are probabilities.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 2000)
        >>> scores = np.eye(3)[labels] + rng.normal(size=(2000, 3))  # as probable as they say
        >>> [round(t) for t in fit_temperatures(np.stack([scores, 5 * scores], axis=1), labels)]
        [1, 5]
    """
    if isinstance(logits, Mapping):
        scores, truth, _ = labelled_stages(logits, labels, None)
    else:
        array = as_float32("logits", logits)
        scores, truth = check_holdout(array, labels, array.shape[1] if array.ndim == 3 else 1)
    return tuple(_fit(scores[:, i].astype(np.float64), truth) for i in range(scores.shape[1]))


_SHARPEST, _FLATTEST = 1e3, 1e-3  # bounds of 1/T
_STEPS = 100


def _fit(scores: npt.NDArray[np.float64], truth: npt.NDArray[np.int64]) -> float:
    """Bisect for the sharpness 1/T at which the slope of the cross-entropy is 0."""
    low, high = np.log(_FLATTEST), np.log(_SHARPEST)
    mean_true_score = scores[np.arange(len(truth)), truth].mean()
    for _ in range(_STEPS):
        middle = (low + high) / 2
        weights = np.exp(np.exp(middle) * (scores - scores.max(axis=-1, keepdims=True)))
        expected_scores = (weights * scores).sum(axis=-1) / weights.sum(axis=-1)
        if expected_scores.mean() > mean_true_score:  # the slope, which rises with 1/T
            high = middle
        else:
            low = middle
        if high - low < 1e-6:
            break
    return float(np.exp(-(low + high) / 2))


def check_temperatures(temperatures: Sequence[float] | None, num_stages: int) -> tuple[float, ...]:
    """Return one temperature per stage; ones for None.

    Raises:
        ValueError: If they are not one finite number above 0 per stage.

    Examples:
        >>> check_temperatures(None, 2)
        (1.0, 1.0)
    """
    if temperatures is None:
        return (1.0,) * num_stages
    checked = as_float64("temperatures", temperatures)
    if checked.shape != (num_stages,) or not (np.isfinite(checked) & (checked > 0)).all():
        raise ValueError(
            "temperatures must be one finite number above 0 per stage. "
            f"Received: temperatures={temperatures!r} for {num_stages} stages. "
            "Give what fit_temperatures returns."
        )
    return tuple(checked.tolist())
