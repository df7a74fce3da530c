"""What one backend does better than `keras.ops` says it: arithmetic in place, on PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from .targets import Targets


def _in_place(
    x: Any,
    targets: Targets,
    counts: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
    size: int,
    training: bool,
) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """Return what `chunks.chunked` does, with one buffer of logits for all chunks.

    PyTorch runs one operation at a time: every temporary of a chunk's size would be memory taken
    from the system and given back.
    """
    import torch

    with torch.no_grad():
        tied = len(kernels) == 1
        size = max(1, min(size, len(x)))
        held = (len(dims) if tied else 1, size, kernels[0].shape[1])
        said = torch.empty((2, len(x), len(dims)), device=x.device)
        d_x = torch.zeros_like(x)
        d_kernels = [torch.zeros_like(kernel) for kernel in kernels if training]
        d_biases = [torch.zeros_like(bias) for bias in biases if training]
        buffer = torch.empty(held, device=x.device)
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            own = targets.map(lambda tensor, part=part: tensor[part])
            rows = (x[part], own, counts[part], buffer[:, : len(x[part])], said[:, part])
            (_tied if tied else _untied)(
                *rows, kernels, biases, dims, d_x[part], d_kernels, d_biases
            )
        return said[0], said[1], d_x if training else None, d_kernels, d_biases


def _tied(
    x: Any,
    targets: Targets,
    counts: Any,
    logits: Any,
    said: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
    d_x: Any,
    d_kernels: Sequence[Any],
    d_biases: Sequence[Any],
) -> None:
    import torch

    blocks = [slice(*edges) for edges in zip((0, *dims[:-1]), dims, strict=True)]
    last = biases[0] if biases else torch.zeros((), device=x.device)
    for index, block in enumerate(blocks):
        last = torch.addmm(last, x[:, block], kernels[0][block], out=logits[index])
    for index in range(len(dims)):
        said[0, :, index], said[1, :, index] = _softmax(logits[index], targets)
    if not d_kernels:
        return
    d_logits = None
    for index in reversed(range(len(dims))):
        block = blocks[index]
        d_logits = _gradient(logits[index], targets, counts[:, index, None], d_logits)
        d_x[:, block] = d_logits @ kernels[0][block].T
        d_kernels[0][block].addmm_(x[:, block].T, d_logits)
    for d_bias in d_biases:
        d_bias += d_logits.sum(0)  # type: ignore[union-attr]


def _untied(
    x: Any,
    targets: Targets,
    counts: Any,
    logits: Any,
    said: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
    d_x: Any,
    d_kernels: Sequence[Any],
    d_biases: Sequence[Any],
) -> None:
    import torch

    for index, dim in enumerate(dims):
        bias = biases[index] if biases else torch.zeros((), device=x.device)
        torch.addmm(bias, x[:, :dim], kernels[index], out=logits[0])
        said[0, :, index], said[1, :, index] = _softmax(logits[0], targets)
        if d_kernels:
            d_logits = _gradient(logits[0], targets, counts[:, index, None], None)
            d_x[:, :dim] += d_logits @ kernels[index].T
            d_kernels[index].addmm_(x[:, :dim].T, d_logits)
            for d_bias in d_biases[index : index + 1]:
                d_bias += d_logits.sum(0)


def _softmax(logits: Any, targets: Targets) -> tuple[Any, Any]:
    """Return losses and ranks `(rows,)`; the logits become probabilities."""
    import torch

    rows, right = torch.arange(len(logits), device=logits.device), targets.classes.long()
    largest, best = logits.max(1)
    own = logits[rows, right]
    ranks = (logits > own[:, None]).sum(1)
    ranks = torch.where(best == right, 0, ranks.clamp(min=1))  # as argmax breaks ties
    if targets.shares is not None:
        said = (logits * targets.smooth_shares()).sum(1)
    elif targets.smoothing:
        said = (1 - targets.smoothing) * own + targets.smoothing * logits.mean(1)
    else:
        said = own
    torch.softmax(logits, 1, out=logits)
    normalizer = largest - logits[rows, best].log()  # the largest's share is one over the sum
    total = targets.total()
    total = total[:, 0] if targets.shares is not None else total
    losses = normalizer * total - said
    losses = torch.where(targets.outside.bool(), float("nan"), losses)
    return losses, torch.where(losses.isnan(), targets.num_classes, ranks)


def _gradient(probabilities: Any, targets: Targets, count: Any, wider: Any) -> Any:
    """Turn probabilities into the gradient of their logits, and add it to that of `wider` dims."""
    import torch

    scale = count * targets.total()
    if wider is None:
        total = probabilities.mul_(scale)
    else:
        total = wider.addcmul_(probabilities, scale)
    if targets.shares is not None:
        return total.addcmul_(targets.smooth_shares(), count, value=-1)
    rows = torch.arange(len(total), device=total.device)
    total[rows, targets.classes.long()] -= (1 - targets.smoothing) * count[:, 0]
    if targets.smoothing:
        total -= count * (targets.smoothing / targets.num_classes)
    return total


in_place: Callable[..., Any] | None = _in_place if keras.backend.backend() == "torch" else None


def num_replicas() -> int:
    """Return how many replicas share a batch: TensorFlow's strategies sum their losses."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return int(tf.distribute.get_strategy().num_replicas_in_sync)
