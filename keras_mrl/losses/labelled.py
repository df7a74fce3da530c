"""What labels take off the gradient of a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from .targets import Targets


def label_gradient(
    x: Any,
    targets: Targets,
    counts: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
) -> tuple[Any, list[Any], list[Any]]:
    """Return the right classes' own share of the gradient by features, kernels and biases.

    It is apart from the softmax's for the sake of rounding: a label's entry is as large as all
    others together, and in one product with them would cost them their last bits. And it needs no
    matrix of one-hot labels: a gather and a scatter do. Of labels that are shares it is zero.

    Args:
        x: `(rows, dims[-1])`, float32.
        targets: What each row should say.
        counts: What each loss counts in the sum, `(rows, num_dims)`.
        kernels: One per dim, or one for all.
        biases: As many, or none.
        dims: The prefix lengths.
    """
    if targets.shares is not None:
        return (
            ops.zeros_like(x),
            [ops.zeros_like(kernel) for kernel in kernels],
            [ops.zeros_like(bias) for bias in biases],
        )
    classes, counts = targets.classes, counts * (targets.smoothing - 1)
    if len(kernels) == 1:
        # A block counts in its own dim and in all wider ones.
        wider = ops.flip(ops.cumsum(ops.flip(counts, axis=1), axis=1), axis=1)
        heights = [stop - start for start, stop in zip((0, *dims[:-1]), dims, strict=True)]
        blocks = [
            ops.repeat(wider[:, index : index + 1], height, axis=1)
            for index, height in enumerate(heights)
        ]
        each = ops.concatenate(blocks, axis=1)
        own = ops.transpose(ops.take(kernels[0], classes, axis=1))
        d_bias = [_scattered(wider[:, :1], targets)[0] for _ in biases]
        return own * each, [_scattered(x * each, targets)], d_bias
    d_x: Any = ops.zeros_like(x)
    d_kernels, d_biases = [], []
    for index, (dim, kernel) in enumerate(zip(dims, kernels, strict=True)):
        count = counts[:, index : index + 1]
        own = ops.transpose(ops.take(kernel, classes, axis=1)) * count
        d_x = d_x + ops.pad(own, ((0, 0), (0, dims[-1] - dim)))
        d_kernels.append(_scattered(x[:, :dim] * count, targets))
        d_biases.append(_scattered(count, targets)[0])
    return d_x, d_kernels, d_biases[: len(biases)]


def _scattered(rows: Any, targets: Targets) -> Any:
    """Add `(rows, width)` to the columns of their classes, `(width, num_classes)`."""
    sums = ops.segment_sum(rows, targets.classes, num_segments=targets.num_classes)
    return ops.transpose(sums)
