"""Keras's reductions of a loss, as what each row counts in the sum."""

from __future__ import annotations

import math
from typing import Any

from keras import ops

from ._backend import num_replicas

REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight")


def row_weights(reduction: str, like: Any, sample_weight: Any = None, mask: Any = None) -> Any:
    """Return what each value counts in the reduced loss.

    Args:
        reduction: One of `REDUCTIONS`.
        like: A tensor of the shape of the values, `(batch, ...)`.
        sample_weight: `(batch,)`, or of that shape; None for ones.
        mask: Which values count, `(batch, ...)`; None for all.

    Returns:
        float32 weights of the shape of `like`: `keras.losses.Loss` reduces values to their
        weighted sum.
    """
    weights = ops.ones_like(like, dtype="float32")
    count = ops.cast(math.prod(ops.shape(like)), "float32")
    if mask is not None:
        kept = ops.cast(ops.reshape(mask, ops.shape(like)), "float32")
        if reduction in ("sum_over_batch_size", "mean"):
            kept = kept * ops.divide_no_nan(count, ops.sum(kept))
        weights = weights * kept
    if sample_weight is not None:
        weights = weights * aligned(sample_weight, like)
    if reduction == "sum":
        return weights
    divisor = ops.sum(weights) if reduction == "mean_with_sample_weight" else count
    return ops.divide_no_nan(weights, divisor) / num_replicas()


def aligned(sample_weight: Any, like: Any) -> Any:
    """Return float32 sample weights with the rank of `like`."""
    given = ops.cast(sample_weight, "float32")
    if len(given.shape) > len(like.shape):  # a column
        return ops.reshape(given, ops.shape(like))
    missing = len(like.shape) - len(given.shape)
    return ops.reshape(given, (*ops.shape(given), *(1,) * missing))
