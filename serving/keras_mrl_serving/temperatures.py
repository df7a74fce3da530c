"""Temperatures: what the logits of each dim are divided by, so that confidences are comparable."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .inputs import as_float32, as_float64, check_holdout

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
