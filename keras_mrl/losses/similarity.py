"""Similarities of nested prefixes, each coordinate multiplied once for all the dims it is in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
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


# The same losses with a chunk of the similarities in memory at a time, forward and backward.


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


# The losses of nested similarities, row by row: in one piece or chunk by chunk.


def nested_rows(
    anchors: Any,
    candidates: Any,
    dims: tuple[int, ...],
    scale: Any,
    task: Task,
    chunk_size: int | None,
) -> tuple[Any, Any]:
    """Return losses and hits, both `(num_dims, rows)`, of float32 embeddings `(rows, width)`."""
    return _NestedRows(dims, task, chunk_size)(anchors, candidates, scale)


class _NestedRows(keras.Operation):
    """So that symbolic tensors go through, too: the computation itself needs numbers of rows."""

    def __init__(self, dims: tuple[int, ...], task: Task, chunk_size: int | None) -> None:
        super().__init__()
        self.dims = dims
        self.task = task
        self.chunk_size = chunk_size

    def call(self, anchors: Any, candidates: Any, scale: Any) -> tuple[Any, Any]:
        if self.chunk_size is None:
            return plain_rows(anchors, candidates, self.dims, scale, self.task)
        return flat_rows(anchors, candidates, self.dims, scale, self.task, self.chunk_size)

    def compute_output_spec(self, anchors: Any, *others: Any) -> tuple[Any, Any]:
        del others
        shape = (len(self.dims), anchors.shape[0])
        return keras.KerasTensor(shape), keras.KerasTensor(shape)


def weighted(losses: Any, weights: Any) -> Any:
    """Return the sum over dims of `(num_dims, rows)`, one value per row."""
    return ops.sum(losses * ops.expand_dims(ops.convert_to_tensor(weights, "float32"), 1), axis=0)


def check_temperature(temperature: float) -> float:
    """Return `temperature` as a float if it can divide a cosine; raise otherwise."""
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(
            "temperature must be a positive number. "
            f"Received: temperature={temperature!r}. "
            "Give for example 0.05: cosines lie in -1..1 and a softmax needs more."
        )
    return float(temperature)


def check_chunk_size(chunk_size: int | None) -> int | None:
    """Return `chunk_size` if it is None or a positive integer; raise otherwise."""
    is_integer = hasattr(chunk_size, "__index__") and not isinstance(chunk_size, bool)
    if chunk_size is not None and (not is_integer or chunk_size < 1):
        raise ValueError(
            "chunk_size must be a positive integer. "
            f"Received: chunk_size={chunk_size!r}. "
            "Give how many rows are compared at a time, or None for all at once."
        )
    return None if chunk_size is None else int(chunk_size)


def check_rows(loss: Any, embeddings: Any) -> None:
    """Raise where a batch is empty."""
    if embeddings.shape[0] == 0:
        raise ValueError(
            f"{type(loss).__name__} needs at least one row. "
            f"Received: embeddings of shape {tuple(embeddings.shape)}. "
            "Leave empty batches out."
        )
