"""How far rankings by prefixes are from those by whole embeddings, for `MatryoshkaAdaptor`.

Both compare the rows of a batch with one another, at every dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from keras import ops

from .._dims import blocks

_COPY = 1 - 1e-5  # cosine of a row with a copy of it, and above
_TINY = 1e-12
_NEVER = -1e9  # a logit whose exponential is zero


def listwise_divergences(
    rows: Any, projected: Any, right: Any, dims: tuple[int, ...], scales: Any, temperature: float
) -> Any:
    """Return how far the ranking of each prefix is from that of the full width, by row.

    Copies of a row are left out of its softmax: at every dim they are as near as can be.

    Args:
        rows: Of unit length `(rows, width)`.
        projected: The same, projected `(rows, dims[-1])`.
        right: The place of the right row of each, half of its target; -1 for none `(rows,)`.
            Rows with one count together as much as all rows.
        dims: Prefix lengths.
        scales: Multiplies the cosines of each dim `(num_dims,)`.
        temperature: Divides all cosines.

    Formula:
        KL(p || softmax_j(s_m cos_m(i, j) / T)), p = softmax_j(cos(i, j) / T)

    Examples:
        >>> from keras_mrl.losses.rankings import listwise_divergences
        >>> rows = keras.ops.eye(3)
        >>> none = keras.ops.full((3,), -1, dtype="int32")
        >>> losses = listwise_divergences(rows, rows, none, (2, 3), keras.ops.ones((2,)), 0.5)
        >>> tuple(losses.shape), round(float(losses[0, 1]), 6)
        ((3, 2), 0.0)
    """
    cosines, is_right, is_left_out = _full_width(rows, right)
    target = ops.softmax(ops.where(is_left_out, _NEVER, cosines / temperature))
    answers = ops.cast(is_right, "float32")
    has_answer = ops.sum(answers, axis=1, keepdims=True)
    target = target * (1 - 0.5 * has_answer) + 0.5 * answers
    entropy = ops.sum(target * ops.log(ops.maximum(target, 1e-30)), axis=1)
    losses = []
    for m, own in enumerate(_cosines_by_dim(projected, dims)):
        logits = ops.where(is_left_out, _NEVER, own * scales[m] / temperature)
        losses.append(entropy - ops.sum(target * ops.log_softmax(logits), axis=1))
    return ops.stack(losses, axis=1) * _weights(right)


def pairwise_differences(
    rows: Any,
    projected: Any,
    right: Any,
    dims: tuple[int, ...],
    temperature: float,
    nearest: int = 10,
) -> Any:
    """Return how far the cosines of each prefix are from those of the full width, by row.

    Args:
        rows: As for `listwise_divergences`.
        projected: Likewise.
        right: Likewise; adds how far the right row is from being the nearest of a batch.
        dims: Likewise.
        temperature: Divides the cosines that are ranked.
        nearest: Rows whose cosines count twice, fewer than there are rows.

    Formula:
        mean_j |cos - cos_m| + mean_(nearest j) |cos - cos_m|, and for a pair
        -log softmax_j(cos_m(i, j) / T) of the right row

    Reference:
        Yoon et al., Matryoshka-Adaptor, arXiv 2407.20243, equations of L_pair and L_topk.

    Examples:
        >>> from keras_mrl.losses.rankings import pairwise_differences
        >>> none = keras.ops.full((3,), -1, dtype="int32")
        >>> losses = pairwise_differences(keras.ops.eye(3), keras.ops.eye(3), none, (2, 3), 0.05, 2)
        >>> [round(float(loss), 6) for loss in losses[0]]
        [0.0, 0.0]
    """
    cosines, is_right, is_left_out = _full_width(rows, right)
    others = ops.cast(ops.logical_not(is_left_out), "float32")
    lowest = ops.top_k(ops.where(is_left_out, -2.0, cosines), nearest)[0][:, -1:]
    is_near = others * ops.cast(cosines >= lowest, "float32")
    answers = ops.cast(is_right, "float32")
    losses = []
    for own in _cosines_by_dim(projected, dims):
        difference = ops.abs(cosines - own)
        loss = _mean_where(difference, others) + _mean_where(difference, is_near)
        logits = ops.where(is_left_out, _NEVER, own / temperature)
        ranking = -ops.sum(answers * ops.log_softmax(logits), axis=1)
        losses.append(loss + ranking)
    return ops.stack(losses, axis=1) * _weights(right)


def _weights(right: Any) -> Any:
    """Return the weight of each row `(rows, 1)`: few queries count as much as all rows do."""
    is_query = ops.cast(right >= 0, "float32")
    share = ops.mean(is_query)
    return ops.expand_dims(1 + is_query * (1 / ops.maximum(share, 1e-3) - 1), 1)


def _full_width(rows: Any, right: Any) -> tuple[Any, Any, Any]:
    """Return cosines, whether a row is the right one, and whether it is left out: all squares."""
    cosines = ops.matmul(rows, ops.transpose(rows))
    places = ops.arange(ops.shape(rows)[0], dtype="int32")
    is_right = ops.equal(ops.expand_dims(right, 1), places)
    is_same = ops.equal(ops.expand_dims(places, 1), places)
    is_copy = ops.logical_and(cosines > _COPY, ops.logical_not(is_right))
    return cosines, is_right, ops.logical_or(is_same, is_copy)


def _cosines_by_dim(projected: Any, dims: tuple[int, ...]) -> Iterator[Any]:
    """Yield the cosines of prefixes `(rows, rows)`; a coordinate is multiplied once for all."""
    product: Any = 0.0
    square: Any = 0.0
    for start, stop in blocks(dims):
        block = projected[:, start:stop]
        product = product + ops.matmul(block, ops.transpose(block))
        square = square + ops.sum(ops.square(block), axis=1)
        inverse = ops.rsqrt(ops.maximum(square, _TINY))
        yield product * ops.expand_dims(inverse, 1) * inverse


def _mean_where(values: Any, weights: Any) -> Any:
    return ops.sum(values * weights, axis=1) / ops.maximum(ops.sum(weights, axis=1), 1.0)
