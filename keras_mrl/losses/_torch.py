"""The nested cross-entropy on PyTorch, computed in place.

PyTorch runs one operation at a time, takes the memory of every result from the system, and gives it
back. For the twenty temporaries of a chunk, page faults cost more than multiplications. So here all
chunks share one buffer of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from .targets import Kernels, Sums, Targets


def _in_place(
    x: Any, targets: Targets, loss_weights: Any, nested: Kernels, size: int, training: bool
) -> Sums:
    """Return the sums over all rows, from `size` rows at a time."""
    import torch

    with torch.no_grad():
        num_rows, num_dims = len(x), len(nested.dims)
        size = max(1, min(size, num_rows))
        num_buffers = num_dims if nested.is_tied else 1
        buffer = torch.empty((num_buffers, size, nested.kernels[0].shape[1]), device=x.device)
        by_row = torch.zeros((3, num_rows, num_dims), device=x.device)
        d_x = torch.zeros_like(x)
        d_kernels = [torch.zeros_like(kernel) for kernel in nested.kernels if training]
        d_biases = [torch.zeros_like(bias) for bias in nested.biases if training]
        chunk = _tied_chunk if nested.is_tied else _untied_chunk
        for start in range(0, num_rows, size):
            rows = slice(start, start + size)
            chunk_targets = targets.map(lambda tensor, rows=rows: tensor[rows]).taught()
            logits = buffer[:, : len(x[rows])]
            own = by_row[:, rows]
            sums = Sums(own[0], own[1], own[2], d_x[rows], d_kernels, d_biases)
            chunk(x[rows], chunk_targets, loss_weights[rows], nested, logits, sums)
        d_features = d_x if training else None
        return Sums(by_row[0], by_row[1], by_row[2], d_features, d_kernels, d_biases)


def _tied_chunk(
    x: Any, targets: Targets, loss_weights: Any, nested: Kernels, logits: Any, sums: Sums
) -> None:
    """Write losses and ranks to `sums`, add to its gradients; `logits` holds every dim."""
    import torch

    kernel = nested.kernels[0]
    blocks = [slice(*block) for block in nested.blocks]
    wider = nested.biases[0] if nested.biases else torch.zeros((), device=x.device)
    for m, block in enumerate(blocks):
        wider = torch.addmm(wider, x[:, block], kernel[block], out=logits[m])
    for m in range(len(blocks)):
        _softmax(logits[m], targets, sums, m)
    if not sums.d_kernels:
        return
    d_logits = None
    for m in reversed(range(len(blocks))):
        block = blocks[m]
        d_logits = _gradient(logits[m], targets, loss_weights[:, m, None], d_logits)
        sums.d_features[:, block] = d_logits @ kernel[block].T
        sums.d_kernels[0][block].addmm_(x[:, block].T, d_logits)
    for d_bias in sums.d_biases:
        d_bias += d_logits.sum(0)  # type: ignore[union-attr]


def _untied_chunk(
    x: Any, targets: Targets, loss_weights: Any, nested: Kernels, logits: Any, sums: Sums
) -> None:
    """Write losses and ranks to `sums`, add to its gradients; `logits` holds one dim at a time."""
    import torch

    for m, dim in enumerate(nested.dims):
        bias = nested.biases[m] if nested.biases else torch.zeros((), device=x.device)
        torch.addmm(bias, x[:, :dim], nested.kernels[m], out=logits[0])
        _softmax(logits[0], targets, sums, m)
        if sums.d_kernels:
            d_logits = _gradient(logits[0], targets, loss_weights[:, m, None], None)
            sums.d_features[:, :dim] += d_logits @ nested.kernels[m].T
            sums.d_kernels[m].addmm_(x[:, :dim].T, d_logits)
            for d_bias in sums.d_biases[m : m + 1]:
                d_bias += d_logits.sum(0)


def _softmax(logits: Any, targets: Targets, sums: Sums, m: int) -> None:
    """Write the values of the rows at dim m to `sums`; the logits become probabilities."""
    import torch

    rows, right = torch.arange(len(logits), device=logits.device), targets.classes.long()
    largest, best = logits.max(1)
    right_logit = logits[rows, right]
    ranks = (logits > right_logit[:, None]).sum(1)
    ranks = torch.where(best == right, 0, ranks.clamp(min=1))  # equal logits as in argmax
    if targets.shares is not None:
        expected_logit = (logits * targets.smooth_shares()).sum(1)
    elif targets.smoothing:
        mean = logits.mean(1)
        expected_logit = (1 - targets.smoothing) * right_logit + targets.smoothing * mean
    else:
        expected_logit = right_logit
    lesson = targets.lesson
    if lesson is not None:
        sums.divergences[:, m] = lesson.negative_entropy[:, 0]
        sums.divergences[:, m] -= (logits * lesson.probabilities).sum(1)
    torch.softmax(logits, 1, out=logits)
    log_sum = largest - logits[rows, best].log()  # the largest's probability is one over the sum
    total = targets.total()
    total = total[:, 0] if targets.shares is not None else total
    losses = log_sum * total - expected_logit
    losses = torch.where(targets.outside.bool(), float("nan"), losses)
    sums.losses[:, m] = losses
    sums.ranks[:, m] = torch.where(losses.isnan(), targets.num_classes, ranks)
    if lesson is not None:
        sums.divergences[:, m] += log_sum


def _gradient(probabilities: Any, targets: Targets, weight: Any, wider: Any) -> Any:
    """Turn probabilities into the gradient of their logits, and add it to that of wider dims."""
    import torch

    lesson = targets.lesson
    scale = weight * (targets.total() + (0.0 if lesson is None else lesson.weight))
    if wider is None:
        d_logits = probabilities.mul_(scale)
    else:
        d_logits = wider.addcmul_(probabilities, scale)
    if lesson is not None:
        d_logits.addcmul_(lesson.probabilities, weight, value=-lesson.weight)
    if targets.shares is not None:
        return d_logits.addcmul_(targets.smooth_shares(), weight, value=-1)
    rows = torch.arange(len(d_logits), device=d_logits.device)
    d_logits[rows, targets.classes.long()] -= (1 - targets.smoothing) * weight[:, 0]
    if targets.smoothing:
        d_logits -= weight * (targets.smoothing / targets.num_classes)
    return d_logits


in_place: Callable[..., Sums] | None = _in_place if keras.backend.backend() == "torch" else None
