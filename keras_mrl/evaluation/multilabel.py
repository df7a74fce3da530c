"""Measures of rows that may have several classes, as scikit-learn defines them."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mrl_serving.inputs import as_float32, as_float64

from .._arrays import Array, check_unmasked


def score_multilabel(logits: Any, labels: Any) -> dict[str, float]:
    """Return average precision and F1: the mean of all classes (macro), and of all as one (micro).

    `ap_macro` and `ap_micro` need no threshold: they judge the order of the rows. `f1_macro` and
    `f1_micro` take the classes above a probability of 0.5, which is a logit of 0. A class that no
    row has counts 0 in both means, as in scikit-learn.

    Args:
        logits: `(rows, num_classes)`, such as what `predict` gives at one dim.
        labels: 0 or 1, `(rows, num_classes)`; of one class also `(rows,)`.

    Formula:
        AP = sum_n (R_n - R_{n-1}) P_n over the distinct logits, the largest first

    Raises:
        ValueError: If shapes do not fit, a logit is not finite, or a label is neither 0 nor 1.

    Examples:
        >>> scores = score_multilabel([[2.0, -1.0], [1.0, 3.0]], [[1, 0], [0, 1]])
        >>> scores["ap_macro"], round(scores["f1_micro"], 2)
        (1.0, 0.8)
    """
    scores, relevant = check_outputs(logits, labels, "logits")
    check_zeros_and_ones(relevant)
    is_relevant = relevant > 0
    positives, chosen = is_relevant.sum(axis=0), scores > 0
    hits = (chosen & is_relevant).sum(axis=0)
    return {
        "ap_macro": float(np.mean(list(map(_average_precision, scores.T, is_relevant.T)))),
        "ap_micro": _average_precision(scores.ravel(), is_relevant.ravel()),
        "f1_macro": float(np.mean(_f1(hits, chosen.sum(axis=0), positives))),
        "f1_micro": float(_f1(hits.sum(), chosen.sum(), positives.sum())),
    }


def _average_precision(scores: Array, is_relevant: Array) -> float:
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(is_relevant[order])
    if not hits[-1]:
        return 0.0
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of equal scores
    steps = np.diff(hits[ends], prepend=0) / hits[-1]
    return float(steps @ (hits[ends] / (ends + 1)))


def _f1(hits: Any, chosen: Any, positives: Any) -> Any:
    return 2 * hits / np.maximum(chosen + positives, 1)


def check_zeros_and_ones(labels: Array) -> None:
    """Raise a `ValueError` unless every label says whether a row has a class."""
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        raise ValueError(
            "Labels of rows that may have several classes are 0 or 1 for each class. "
            f"Received: {labels[wrong][0]:g} in {int(wrong.any(axis=1).sum())} of {len(labels)} "
            "rows. Give one column per class; for class ids, evaluate(..., activation='softmax')."
        )


def check_outputs(outputs: Any, targets: Any, name: str) -> tuple[Array, Array]:
    """Return outputs and targets, both finite and `(rows, outputs)`, as float32 and float64.

    Args:
        outputs: Of the head.
        targets: What they should be; of one output also `(rows,)`.
        name: What the outputs are called in errors.

    Raises:
        ValueError: If their shapes differ, there are no rows, or a number is not finite.
    """
    check_unmasked(outputs, targets)
    predicted = as_float32(name, outputs)
    expected = check_targets(targets, predicted.shape)
    if not np.isfinite(predicted).all():
        raise ValueError(
            f"{name} must be finite. Received: NaN or infinity in "
            f"{int((~np.isfinite(predicted)).any(axis=1).sum())} of {len(predicted)} rows. "
            "Train the model to a finite loss."
        )
    return predicted, expected


def check_targets(targets: Any, shape: tuple[int | None, ...]) -> Array:
    """Return targets as float64 of this shape, `(rows, outputs)`.

    Args:
        targets: Numbers; of one output also `(rows,)`.
        shape: Of the outputs; None for any number of rows.

    Raises:
        ValueError: If they have another shape or none, or one is not finite.
    """
    check_unmasked(targets)
    array = np.asarray(as_float64("labels", targets))
    if array.ndim == 1 and shape[-1] == 1:
        array = array[:, None]
    fits = array.ndim == len(shape) == 2 and array.shape[1] == shape[1] and len(array)
    if not fits or shape[0] not in (None, len(array)) or not np.isfinite(array).all():
        rows = "rows" if shape[0] is None else shape[0]
        raise ValueError(
            "labels must be finite numbers, one for each output of the head. Received: labels of "
            f"shape {array.shape} for outputs ({rows}, {shape[-1]}). "
            "Give them as in training, without NaN; name the model's kind with activation=."
        )
    return array
