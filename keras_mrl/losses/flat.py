"""The same losses with a chunk of the similarities in memory at a time, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from .similarity import (
    Task,
    blocks,
    found,
    inverse_lengths,
    masked,
    own_logits,
    products,
    scaled,
)


def flat_rows(
    anchors: Any, candidates: Any, dims: Sequence[int], scale: Any, task: Task, chunk_size: int
) -> tuple[Any, Any]:
    """Return what `plain_rows` does, from `chunk_size` anchors at a time.

    Forward keeps the log of every softmax's sum, one number per row and dim. Backward computes
    each chunk's similarities again, and from them its share of the gradient.

    Args:
        anchors: `(rows, width)`, float32.
        candidates: `(candidates, width)`, float32.
        dims: Strictly increasing prefix lengths.
        scale: One over the temperature.
        task: What is right.
        chunk_size: Anchors at a time; no more than there are, where their number is known.
    """
    if anchors.shape[0] is not None:
        chunk_size = min(chunk_size, anchors.shape[0])
    arguments = (
        anchors[:, : dims[-1]],
        candidates[:, : dims[-1]],
        inverse_lengths(anchors, dims),
        inverse_lengths(candidates, dims),
    )
    scale = ops.convert_to_tensor(scale, "float32")
    losses, hits = _Chunks(tuple(dims), task, chunk_size)(*arguments, scale)
    if task.targets is None:
        losses = losses - own_logits(*arguments, dims, scale)
    return losses, hits


class _Chunks:
    """Losses and hits as one function with a gradient of its own; own logits are left to others.

    Its arguments are the anchors, the candidates, their inverse lengths and the scale. Lengths
    are arguments so that the backend differentiates them.
    """

    def __init__(self, dims: tuple[int, ...], task: Task, chunk_size: int) -> None:
        self.dims = dims
        self.task = task
        self.chunk_size = chunk_size

    def __call__(self, *arguments: Any) -> tuple[Any, Any]:
        both = ops.custom_gradient(self._with_gradient)(*arguments)
        return both[0], both[1]

    def _with_gradient(self, *arguments: Any) -> tuple[Any, Any]:
        losses, hits, row_sums, column_sums = self._forward(*arguments)

        def gradient(*upstreams: Any, upstream: Any = None) -> Any:
            given = upstreams[0] if upstream is None else upstream  # by the backend's own custom
            return self._backward(arguments, row_sums, column_sums, given[0])

        return ops.stack([losses, hits]), gradient

    def _forward(
        self, anchors: Any, candidates: Any, inverse: Any, candidate_inverse: Any, scale: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Return losses, hits and the logs of the sums of both softmaxes, `(num_dims, rows)`."""
        rows = ops.shape(anchors)[0]
        padded, lengths = self._padded(anchors), self._padded_lengths(inverse)

        def chunk(index: Any, *state: Any) -> Any:
            *wholes, high, low = state
            start = index * self.chunk_size
            numbers, targets, allowed = self._task_of(start)
            part = ops.slice(padded, (start, 0), (self.chunk_size, anchors.shape[1]))
            own = self._columns(lengths, start)
            said: list[list[Any]] = [[] for _ in state]
            for m, product in enumerate(products(part, candidates, self.dims)):
                logits = scaled(product, own[m], candidate_inverse[m], scale)
                compared = masked(logits, allowed)
                best = ops.cast(ops.argmax(compared, axis=1), "int32")
                most = ops.take_along_axis(compared, ops.expand_dims(best, 1), axis=1)
                loss = sums = most[:, 0] + ops.log(ops.sum(ops.exp(compared - most), axis=1))
                if targets is not None:
                    loss = ops.sum(targets, axis=1) * sums - ops.sum(targets * logits, axis=1)
                top, total = high[m], low[m]
                if self.task.symmetric:
                    column = masked(logits[:, :rows], ops.expand_dims(numbers < rows, 1))
                    top = ops.maximum(high[m], ops.max(column, axis=0))
                    total = total * ops.exp(high[m] - top)
                    total = total + ops.sum(ops.exp(column - top), axis=0)
                new = (loss, found(best, numbers, targets), sums, top, total)
                for values, value in zip(said, new, strict=True):
                    values.append(value)
            parts = [ops.stack(values) for values in said]
            updated = (
                ops.slice_update(whole, (0, start), own_part)
                for whole, own_part in zip(wholes, parts, strict=False)
            )
            return index + 1, *updated, *parts[-2:]

        nothing = ops.zeros_like(lengths)
        lowest = ops.zeros_like(inverse) - 1e30
        state = (nothing, nothing, nothing, lowest, ops.zeros_like(inverse))
        _, *wholes, high, low = self._over_chunks(chunk, rows, state)
        losses, hits, row_sums = (whole[:, :rows] for whole in wholes)
        if self.task.symmetric:
            low = high + ops.log(low)
            losses = (losses + low) / 2
        return losses, hits, row_sums, low

    def _backward(
        self, arguments: tuple[Any, ...], row_sums: Any, column_sums: Any, upstream: Any
    ) -> tuple[Any, ...]:
        """Return the gradient with respect to the five arguments."""
        anchors, candidates, inverse, candidate_inverse, scale = arguments
        rows = ops.shape(anchors)[0]
        padded, lengths = self._padded(anchors), self._padded_lengths(inverse)
        sums, given = self._padded_lengths(row_sums), self._padded_lengths(upstream)
        spare = ops.zeros_like(candidate_inverse[:, rows:])  # hard negatives look for no anchor
        column_sums = ops.concatenate([column_sums, spare], axis=1)
        column_given = ops.concatenate([upstream, spare], axis=1)

        def chunk(index: Any, d_anchors: Any, d_candidates: Any, d_own: Any, d_other: Any) -> Any:
            start = index * self.chunk_size
            numbers, targets, allowed = self._task_of(start)
            part = ops.slice(padded, (start, 0), (self.chunk_size, anchors.shape[1]))
            own, row_sum, weight = (self._columns(x, start) for x in (lengths, sums, given))
            d_products, d_lengths, d_others = [], [], []
            for m, product in enumerate(products(part, candidates, self.dims)):
                logits = scaled(product, own[m], candidate_inverse[m], scale)
                d_logits = ops.exp(masked(logits, allowed) - ops.expand_dims(row_sum[m], 1))
                if targets is not None:
                    d_logits = ops.sum(targets, axis=1, keepdims=True) * d_logits - targets
                row_weight = weight[m]  # of the whole row, so applied where it is cheapest
                if self.task.symmetric:
                    column = masked(logits, ops.expand_dims(numbers < rows, 1)) - column_sums[m]
                    d_logits = d_logits * ops.expand_dims(row_weight, 1)
                    d_logits = d_logits + ops.exp(column) * column_given[m]
                    row_weight = ops.full_like(row_weight, 0.5)
                of_lengths = d_logits * product
                d_lengths.append(scale * row_weight * ops.matmul(of_lengths, candidate_inverse[m]))
                d_others.append(ops.matmul(own[m] * row_weight, of_lengths))
                d_products.append(
                    scaled(d_logits, own[m] * row_weight, candidate_inverse[m], scale)
                )
            d_part: list[Any] = []
            d_whole: list[Any] = []
            total: Any = None
            for low, high in reversed(blocks(self.dims)):
                wider = d_products.pop()  # a block is in its own dim's prefix and in all wider ones
                total = wider if total is None else total + wider
                d_part.insert(0, ops.matmul(total, candidates[:, low:high]))
                d_whole.insert(0, ops.matmul(ops.transpose(total), part[:, low:high]))
            return (
                index + 1,
                ops.slice_update(d_anchors, (start, 0), ops.concatenate(d_part, axis=1)),
                d_candidates + ops.concatenate(d_whole, axis=1),
                ops.slice_update(d_own, (0, start), ops.stack(d_lengths)),
                d_other + ops.stack(d_others),
            )

        state = (padded, candidates, lengths, candidate_inverse)
        zeros = tuple(ops.zeros_like(values) for values in state)
        _, d_anchors, d_candidates, d_own, d_other = self._over_chunks(chunk, rows, zeros)
        return (
            d_anchors[:rows],
            d_candidates,
            d_own[:, :rows],
            scale * d_other,
            ops.sum(d_other * candidate_inverse),
        )

    def _over_chunks(self, chunk: Any, rows: Any, state: tuple[Any, ...]) -> Any:
        """Call `chunk(index, *state)` for every chunk; it returns the next index and state.

        The index counts by one: XLA runs no iteration at all of a loop that counts by more up to 1.
        """
        num_chunks = (rows + self.chunk_size - 1) // self.chunk_size
        first = ops.convert_to_tensor(0, "int32")
        return ops.while_loop(lambda index, *_: index < num_chunks, chunk, (first, *state))

    def _task_of(self, start: Any) -> tuple[Any, Any, Any]:
        numbers = start + ops.arange(self.chunk_size, dtype="int32")
        targets = None if self.task.targets is None else self.task.targets(numbers)
        allowed = None if self.task.allowed is None else self.task.allowed(numbers)
        return numbers, targets, allowed

    def _padded(self, rows: Any) -> Any:
        """With a chunk of zeros after the last row, so that every chunk is whole."""
        return ops.concatenate([rows, ops.zeros((self.chunk_size, rows.shape[1]))])

    def _padded_lengths(self, values: Any) -> Any:
        return ops.concatenate([values, ops.zeros((len(self.dims), self.chunk_size))], axis=1)

    def _columns(self, values: Any, start: Any) -> Any:
        return ops.slice(values, (0, start), (len(self.dims), self.chunk_size))
