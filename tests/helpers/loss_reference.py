"""Losses on embeddings over nested prefixes as plain NumPy loops, in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def log_sum(values: Sequence[float]) -> float:
    return float(np.log(np.exp(np.asarray(values)).sum()))


def contrastive(
    rows: Array,
    dims: Sequence[int],
    weights: Sequence[float],
    temperature: float,
    symmetric: bool,
) -> Array:
    """Of embeddings `(batch, 2 or 3, width)`, one loss per row."""
    anchors, positives, *hard = np.moveaxis(rows.astype(np.float64), 1, 0)
    losses = np.zeros(len(rows))
    for dim, weight in zip(dims, weights, strict=True):
        for i, anchor in enumerate(anchors):
            own = cosine(anchor[:dim], positives[i, :dim]) / temperature
            candidates = [c for side in (positives, *hard) for c in side]
            logits = [cosine(anchor[:dim], c[:dim]) / temperature for c in candidates]
            loss = log_sum(logits) - own
            if symmetric:
                back = [cosine(a[:dim], positives[i, :dim]) / temperature for a in anchors]
                loss = (loss + log_sum(back) - own) / 2
            losses[i] += weight * loss
    return losses


def supervised(
    rows: Array,
    labels: Array,
    dims: Sequence[int],
    weights: Sequence[float],
    temperature: float,
) -> Array:
    """Of embeddings `(batch, width)` or `(batch, views, width)`, one loss per row."""
    views = rows.shape[1] if rows.ndim == 3 else 1
    flat = rows.astype(np.float64).reshape(-1, rows.shape[-1])
    classes = np.repeat(labels, views)
    losses = np.zeros(len(flat))
    for dim, weight in zip(dims, weights, strict=True):
        for i, row in enumerate(flat):
            logits = {
                j: cosine(row[:dim], other[:dim]) / temperature
                for j, other in enumerate(flat)
                if j != i
            }
            right = [logit for j, logit in logits.items() if classes[j] == classes[i]]
            if right:
                losses[i] += weight * (log_sum([*logits.values()]) - np.mean(right))
    return losses.reshape(-1, views).mean(axis=1)


def distilled(rows: Array, teacher: Array, dims: Sequence[int], weights: Sequence[float]) -> Array:
    """The mean squared distance of unit prefixes of `rows` and `teacher`, one loss per row."""
    losses = np.zeros(len(rows))
    for i, (row, target) in enumerate(zip(rows, teacher.astype(np.float64), strict=True)):
        for dim, weight in zip(dims, weights, strict=True):
            unit = row[:dim] / np.sqrt((row[:dim].astype(np.float64) ** 2).sum())
            unit_target = target[:dim] / np.sqrt((target[:dim] ** 2).sum())
            losses[i] += weight * ((unit - unit_target) ** 2).mean()
    return losses


def gradient_of(function: Callable[[Array], float], values: Array, step: float = 1e-6) -> Array:
    """Central differences in float64: right to about 1e-8 here."""
    values = values.astype(np.float64)
    gradient = np.zeros_like(values)
    for position in np.ndindex(*values.shape):
        moved = [values.copy(), values.copy()]
        moved[0][position] += step
        moved[1][position] -= step
        gradient[position] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient
