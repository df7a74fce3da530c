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
    ids: Array | None = None,
    chances: Array | None = None,
) -> Array:
    """Of embeddings `(batch, sides, width)`, one loss per row.

    `ids` and `chances` are of every candidate `(batch, sides - 1)`, or of none.
    """
    anchors, positives, *hard = np.moveaxis(rows.astype(np.float64), 1, 0)
    losses = np.zeros(len(rows))
    all_ids = np.arange(rows[:, 1:, 0].size) if ids is None else ids.T.ravel()
    own_ids = all_ids[: len(rows)]
    if chances is None:
        excess = np.array([np.log((all_ids == own).sum()) for own in all_ids])
        own_excess = np.zeros(len(rows))
        anchor_excess = np.array([np.log((own_ids == own).sum()) for own in own_ids])
    else:
        excess = np.log(chances.T.ravel())
        own_excess, anchor_excess = excess[: len(rows)], np.zeros(len(rows))
    for dim, weight in zip(dims, weights, strict=True):
        for i, anchor in enumerate(anchors):
            own = cosine(anchor[:dim], positives[i, :dim]) / temperature
            candidates = [c for side in (positives, *hard) for c in side]
            negatives = [
                cosine(anchor[:dim], candidate[:dim]) / temperature + own_excess[i] - excess[j]
                for j, candidate in enumerate(candidates)
                if all_ids[j] != own_ids[i]
            ]
            loss = log_sum([own, *negatives]) - own
            if symmetric:
                back = [
                    cosine(other[:dim], positives[i, :dim]) / temperature - anchor_excess[k]
                    for k, other in enumerate(anchors)
                    if own_ids[k] != own_ids[i]
                ]
                loss = (loss + log_sum([own, *back]) - own) / 2
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
