"""Similarities of nested prefixes, each coordinate multiplied once for all the dims it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops

TINY = 1e-12  # a prefix whose squared length is no larger has no direction


@dataclass(frozen=True)
class Task:
    """Which candidates an anchor should find, and which it is never compared with.

    Attributes:
        targets: From the numbers `(rows,)` of some anchors to the shares `(rows, candidates)` that
            a perfect softmax would give: a row sums to one, or to zero where nothing is right.
            None means that the candidate of an anchor's own number is right.
        allowed: The same for what is compared, as booleans; None if everything is.
        symmetric: Whether the first candidates, one per anchor, look for their anchor as well.
            Only without `targets`.
    """

    targets: Callable[[Any], Any] | None = None
    allowed: Callable[[Any], Any] | None = None
    symmetric: bool = False


def blocks(dims: Sequence[int]) -> list[tuple[int, int]]:
    """Return the coordinates that each dim adds, as (start, stop)."""
    return list(zip((0, *dims[:-1]), dims, strict=True))


def inverse_lengths(vectors: Any, dims: Sequence[int]) -> Any:
    """Return `(num_dims, rows)`, one over the length of every prefix of float32 `vectors`.

    A prefix of no direction (all zero) has 0: its similarities and its gradient are zero, where
    the gradient of a division by its length would be huge or NaN.
    """
    square: Any = 0.0
    inverse = []
    for start, stop in blocks(dims):
        square = square + ops.sum(ops.square(vectors[:, start:stop]), axis=-1)
        root = ops.rsqrt(ops.maximum(square, TINY))
        inverse.append(ops.where(square > TINY, root, ops.zeros_like(root)))
    return ops.stack(inverse)


def products(anchors: Any, candidates: Any, dims: Sequence[int]) -> Iterator[Any]:
    """Yield the inner products of prefixes, `(rows, candidates)`, dim by dim."""
    product: Any = None
    for start, stop in blocks(dims):
        block = ops.matmul(anchors[:, start:stop], ops.transpose(candidates[:, start:stop]))
        product = block if product is None else product + block
        yield product


def own_logits(
    anchors: Any, candidates: Any, inverse: Any, candidate_inverse: Any, dims: Any, scale: Any
) -> Any:
    """Return `(num_dims, rows)`, the logit of every anchor and the candidate of its number."""
    rows = ops.shape(anchors)[0]
    both = anchors * candidates[:rows]
    sums = [ops.sum(both[:, start:stop], axis=-1) for start, stop in blocks(dims)]
    return ops.cumsum(ops.stack(sums), axis=0) * inverse * candidate_inverse[:, :rows] * scale


def scaled(product: Any, inverse: Any, candidate_inverse: Any, scale: Any) -> Any:
    """Return logits: cosines over the temperature."""
    return product * ops.expand_dims(inverse * scale, 1) * candidate_inverse


def masked(logits: Any, allowed: Any) -> Any:
    """Return `logits`, lowest where nothing is compared."""
    return logits if allowed is None else ops.where(allowed, logits, -1e30)


def found(best: Any, numbers: Any, targets: Any) -> Any:
    """Return whether the `best` candidate of every row is a right one, as `(rows,)` floats."""
    if targets is None:
        return ops.cast(ops.equal(best, numbers), "float32")
    share = ops.take_along_axis(targets, ops.expand_dims(best, 1), axis=1)
    return ops.cast(share[:, 0] > 0, "float32")


def plain_rows(
    anchors: Any, candidates: Any, dims: Sequence[int], scale: Any, task: Task
) -> tuple[Any, Any]:
    """Return losses `(num_dims, rows)` and hits, with all similarities in memory at once.

    Args:
        anchors: `(rows, width)`, float32.
        candidates: `(candidates, width)`, float32.
        dims: Strictly increasing prefix lengths.
        scale: One over the temperature.
        task: What is right.
    """
    lengths = inverse_lengths(anchors, dims), inverse_lengths(candidates, dims)
    numbers = ops.arange(ops.shape(anchors)[0], dtype="int32")
    targets = None if task.targets is None else task.targets(numbers)
    allowed = None if task.allowed is None else task.allowed(numbers)
    losses, hits = [], []
    for index, product in enumerate(products(anchors, candidates, dims)):
        logits = scaled(product, lengths[0][index], lengths[1][index], scale)
        compared = masked(logits, allowed)
        rows = ops.logsumexp(compared, axis=1)
        if task.symmetric:
            rows = (rows + ops.logsumexp(logits[:, : ops.shape(anchors)[0]], axis=0)) / 2
        if targets is not None:
            rows = ops.sum(targets, axis=1) * rows - ops.sum(targets * logits, axis=1)
        losses.append(rows)
        best = ops.cast(ops.argmax(ops.stop_gradient(compared), axis=1), "int32")
        hits.append(found(best, numbers, targets))
    stacked = ops.stack(losses)
    if targets is None:
        stacked = stacked - own_logits(anchors, candidates, *lengths, dims, scale)
    return stacked, ops.stack(hits)
