"""The gradient of nested cross-entropy as loops in float64: what errors are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def float64_gradients(x: Any, y: Any, kernels: Sequence[Any], dims: Sequence[int]) -> list[Any]:
    """Return the gradients by features, kernels and biases; the biases are zero.

    Args:
        x: Features `(batch, width)`.
        y: Class ids `(batch,)`.
        kernels: One per dim, or a single one of which every dim reads the first rows.
        dims: The dims.
    """
    x, rows = x.astype(float), np.arange(len(x))
    d_x = np.zeros_like(x)
    d_kernels = [np.zeros(kernel.shape) for kernel in kernels]
    d_biases = [np.zeros(kernel.shape[1]) for kernel in kernels]
    for index, dim in enumerate(dims):
        owner = index if len(kernels) > 1 else 0
        kernel = kernels[owner][:dim].astype(float)
        logits = x[:, :dim] @ kernel
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        logits[rows, y] -= 1
        logits /= len(x)
        d_x[:, :dim] += logits @ kernel.T
        d_kernels[owner][:dim] += x[:, :dim].T @ logits
        d_biases[owner] += logits.sum(axis=0)
    return [d_x, *d_kernels, *d_biases]
