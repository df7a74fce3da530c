"""The paper's nested loss (equation 1) and its gradient, as plain NumPy loops.

In float64 they are what the layers must equal; in float32 they are the naive implementation, whose
own error sets the tolerance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class NestedGradient:
    features: Array
    kernels: list[Array]
    biases: list[Array]


def tie(kernel: Array, bias: Array, dims: Sequence[int]) -> tuple[list[Array], list[Array]]:
    """The kernels and biases of MRL-E: W^(m) is the first rows of one W, the bias is shared."""
    return [kernel[:dim] for dim in dims], [bias for _ in dims]


def fold(gradient: NestedGradient) -> tuple[Array, Array]:
    """The gradient of MRL-E's one kernel and one bias: the sum over the dims that read them."""
    kernel = np.zeros_like(gradient.kernels[-1])
    bias = np.zeros_like(gradient.biases[-1])
    for kernel_m, bias_m in zip(gradient.kernels, gradient.biases, strict=True):
        kernel[: len(kernel_m)] += kernel_m
        bias += bias_m
    return kernel, bias


def nested_loss(
    features: Array,
    kernels: Sequence[Array],
    biases: Sequence[Array],
    labels: Array,
    weights: Sequence[float],
    dtype: npt.DTypeLike = np.float64,
) -> Array:
    """sum_m c_m * CE(W^(m) . x_{1:m} + b^(m); y), for every row x of `features`."""
    losses = np.zeros(len(features), dtype)
    for i, (x, label) in enumerate(zip(features.astype(dtype), labels, strict=True)):
        for kernel, bias, weight in zip(kernels, biases, weights, strict=True):
            logits = x[: len(kernel)] @ kernel.astype(dtype) + bias.astype(dtype)
            largest = logits.max()
            log_sum = largest + np.log(np.exp(logits - largest).sum())
            losses[i] += np.asarray(weight, dtype) * (log_sum - logits[label])
    return losses


def nested_gradient(
    features: Array,
    kernels: Sequence[Array],
    biases: Sequence[Array],
    labels: Array,
    weights: Sequence[float],
    sample_weights: Array,
    dtype: npt.DTypeLike = np.float64,
) -> NestedGradient:
    """The gradient of (1/N) sum_i s_i * nested_loss_i, kernel by kernel."""
    d_features = np.zeros(features.shape, dtype)
    d_kernels = [np.zeros(kernel.shape, dtype) for kernel in kernels]
    d_biases = [np.zeros(bias.shape, dtype) for bias in biases]
    for i, (x, label) in enumerate(zip(features.astype(dtype), labels, strict=True)):
        for m, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            dim = len(kernel)
            logits = x[:dim] @ kernel.astype(dtype) + bias.astype(dtype)
            shares = np.exp(logits - logits.max())
            d_logits = shares / shares.sum()
            d_logits[label] -= 1
            d_logits *= np.asarray(weights[m] * sample_weights[i] / len(features), dtype)
            d_features[i, :dim] += kernel.astype(dtype) @ d_logits
            d_kernels[m] += np.outer(x[:dim], d_logits)
            d_biases[m] += d_logits
    return NestedGradient(d_features, d_kernels, d_biases)


def error_budget(exact: Array, naive: Array, k: float = 8.0) -> float:
    """k times the naive implementation's error, at least one rounding of the largest number."""
    error = np.abs(naive.astype(np.float64) - exact).max()
    return float(k * max(error, np.finfo(naive.dtype).eps * np.abs(exact).max()))
