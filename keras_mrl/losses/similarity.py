"""Softmaxes over the cosines of anchors and candidates, at every dim.

A coordinate is multiplied once for all the dims it is in: the inner products of a prefix are those
of the next narrower prefix plus those of one block of coordinates.

`_all_at_once` holds all similarities of the batch. `_ByChunks` holds those of a chunk of anchors,
forward and backward, so its memory grows with the batch and not with its square. Only its two
softmaxes over the batch have a gradient of our own. The lengths of prefixes, and the logit of an
anchor and its own candidate, are computed row by row, and the backend differentiates them.

A prefix of no direction (all zero) has similarities of zero and a gradient of zero. Divided by a
length that is merely kept above zero, its gradient would be finite and enormous: one black image
would throw the weights away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from .._dims import blocks

TINY = 1e-12  # a prefix whose squared length is no larger has no direction
NEVER = -1e30  # a logit whose exponential is zero


@dataclass(frozen=True)
class Task:
    """Which candidates an anchor should find, and which it is compared with.

    Attributes:
        targets: A function from the numbers `(rows,)` of some anchors to the shares
            `(rows, candidates)` of a perfect softmax: a row sums to one, or to zero where no
            candidate is right. None means that the right candidate has the anchor's own number.
        compared: A function from the same numbers to booleans, true where anchor and candidate are
            compared; None means everywhere.
        offsets: A function from the same numbers to two arrays `(rows, candidates)` or None: what
            is added to the logits in the softmax of an anchor, and in that of a candidate. Both are
            zero at an anchor's own candidate. Hits are counted without them.
        symmetric: Whether the first candidates, one per anchor, also look for their anchor. Only
            without `targets`.
    """

    targets: Callable[[Any], Any] | None = None
    compared: Callable[[Any], Any] | None = None
    offsets: Callable[[Any], tuple[Any, Any]] | None = None
    symmetric: bool = False

    def of(self, numbers: Any) -> tuple[Any, Any, Any, Any]:
        """Return targets, compared pairs and both offsets of some anchors, each None if it is."""
        targets = None if self.targets is None else self.targets(numbers)
        compared = None if self.compared is None else self.compared(numbers)
        return targets, compared, *((None, None) if self.offsets is None else self.offsets(numbers))


def check_temperature(temperature: float) -> float:
    """Return `temperature` as a float; raise a `ValueError` if it cannot divide a cosine."""
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(
            "temperature must be a positive number. "
            f"Received: temperature={temperature!r}. "
            "Give for example 0.05: cosines lie in -1..1 and a softmax needs more."
        )
    return float(temperature)


class NestedRows(keras.Operation):
    """The loss and the hit of every anchor at every dim.

    An operation, so that symbolic tensors pass: the computation needs a number of rows.

    Args:
        dims: Strictly increasing prefix lengths.
        task: Which candidates are right.
        chunk_size: Anchors at a time; None for all.
    """

    def __init__(self, dims: tuple[int, ...], task: Task, chunk_size: int | None) -> None:
        super().__init__()
        self.dims = dims
        self.task = task
        self.chunk_size = chunk_size

    def call(self, anchors: Any, candidates: Any, scale: Any) -> tuple[Any, Any]:
        """Return losses and hits, both `(num_dims, rows)`.

        Args:
            anchors: `(rows, width)`, float32.
            candidates: `(candidates, width)`, float32.
            scale: One over the temperature.
        """
        if self.chunk_size is None:
            return _all_at_once(anchors, candidates, self.dims, scale, self.task)
        return _by_chunks(anchors, candidates, self.dims, scale, self.task, self.chunk_size)

    def compute_output_spec(self, anchors: Any, *others: Any) -> tuple[Any, Any]:
        """Return symbolic losses and hits."""
        del others
        shape = (len(self.dims), anchors.shape[0])
        return keras.KerasTensor(shape), keras.KerasTensor(shape)


def _all_at_once(
    anchors: Any, candidates: Any, dims: Sequence[int], scale: Any, task: Task
) -> tuple[Any, Any]:
    """Return losses and hits `(num_dims, rows)`, with all similarities in memory."""
    inverse, candidate_inverse = _inverse_lengths(anchors, dims), _inverse_lengths(candidates, dims)
    numbers = ops.arange(ops.shape(anchors)[0], dtype="int32")
    targets, compared, offsets, column_offsets = task.of(numbers)
    losses, hits = [], []
    for m, product in enumerate(_products(anchors, candidates, dims)):
        logits = _logits(product, inverse[m], candidate_inverse[m], scale)
        row_logits = _masked(logits, compared)
        loss = ops.logsumexp(_plus(row_logits, offsets), axis=1)
        if task.symmetric:
            column = _plus(logits, column_offsets)[:, : ops.shape(anchors)[0]]
            loss = (loss + ops.logsumexp(column, axis=0)) / 2
        if targets is not None:
            loss = ops.sum(targets, axis=1) * loss - ops.sum(targets * logits, axis=1)
        losses.append(loss)
        best = ops.cast(ops.argmax(ops.stop_gradient(row_logits), axis=1), "int32")
        hits.append(_is_right(best, numbers, targets))
    stacked = ops.stack(losses)
    if targets is None:
        stacked = stacked - _own_logits(
            anchors, candidates, inverse, candidate_inverse, dims, scale
        )
    return stacked, ops.stack(hits)


def _inverse_lengths(vectors: Any, dims: Sequence[int]) -> Any:
    """Return `(num_dims, rows)`, one over the length of every prefix; 0 for one of no direction."""
    square: Any = 0.0
    inverse = []
    for start, stop in blocks(dims):
        square = square + ops.sum(ops.square(vectors[:, start:stop]), axis=-1)
        root = ops.rsqrt(ops.maximum(square, TINY))
        inverse.append(ops.where(square > TINY, root, ops.zeros_like(root)))
    return ops.stack(inverse)


def _products(anchors: Any, candidates: Any, dims: Sequence[int]) -> Iterator[Any]:
    """Yield the inner products of prefixes, `(rows, candidates)`, dim by dim."""
    product: Any = None
    for start, stop in blocks(dims):
        block = ops.matmul(anchors[:, start:stop], ops.transpose(candidates[:, start:stop]))
        product = block if product is None else product + block
        yield product


def _logits(product: Any, inverse: Any, candidate_inverse: Any, scale: Any) -> Any:
    """Return cosines over the temperature, from inner products and inverse lengths."""
    return product * ops.expand_dims(inverse * scale, 1) * candidate_inverse


def _masked(logits: Any, compared: Any) -> Any:
    return logits if compared is None else ops.where(compared, logits, NEVER)


def _plus(logits: Any, offsets: Any) -> Any:
    return logits if offsets is None else logits + offsets


def _is_right(best: Any, numbers: Any, targets: Any) -> Any:
    """Return 1.0 where the `best` candidate of an anchor is a right one, else 0.0, `(rows,)`."""
    if targets is None:
        return ops.cast(ops.equal(best, numbers), "float32")
    share = ops.take_along_axis(targets, ops.expand_dims(best, 1), axis=1)
    return ops.cast(share[:, 0] > 0, "float32")


def _own_logits(
    anchors: Any, candidates: Any, inverse: Any, candidate_inverse: Any, dims: Any, scale: Any
) -> Any:
    """Return `(num_dims, rows)`, the logit of every anchor and the candidate of its number."""
    rows = ops.shape(anchors)[0]
    both = anchors * candidates[:rows]
    sums = [ops.sum(both[:, start:stop], axis=-1) for start, stop in blocks(dims)]
    return ops.cumsum(ops.stack(sums), axis=0) * inverse * candidate_inverse[:, :rows] * scale


def _by_chunks(
    anchors: Any, candidates: Any, dims: Sequence[int], scale: Any, task: Task, chunk_size: int
) -> tuple[Any, Any]:
    """Return losses and hits `(num_dims, rows)`, from `chunk_size` anchors at a time."""
    if anchors.shape[0] is not None:
        chunk_size = min(chunk_size, anchors.shape[0])
    arguments = (
        anchors[:, : dims[-1]],
        candidates[:, : dims[-1]],
        _inverse_lengths(anchors, dims),
        _inverse_lengths(candidates, dims),
    )
    scale = ops.convert_to_tensor(scale, "float32")
    losses, hits = _ByChunks(tuple(dims), task, chunk_size)(*arguments, scale)
    if task.targets is None:
        losses = losses - _own_logits(*arguments, dims, scale)
    return losses, hits


class _ByChunks:
    """Losses, but for the logit of an anchor's own candidate, and hits: a function with a gradient.

    Its arguments are the anchors, the candidates, the inverse lengths of both and the scale: the
    backend differentiates what made the lengths.

    Forward keeps the log of the sum of every softmax, one number per row and dim. Backward computes
    the similarities of each chunk again, and from them its share of the gradient.
    """

    def __init__(self, dims: tuple[int, ...], task: Task, chunk_size: int) -> None:
        self.dims = dims
        self.task = task
        self.chunk_size = chunk_size

    def __call__(self, *arguments: Any) -> tuple[Any, Any]:
        losses_and_hits = ops.custom_gradient(self._with_gradient)(*arguments)
        return losses_and_hits[0], losses_and_hits[1]

    def _with_gradient(self, *arguments: Any) -> tuple[Any, Any]:
        losses, hits, row_log_sums, column_log_sums = self._forward(*arguments)

        def gradient(*upstreams: Any, upstream: Any = None) -> Any:
            # Keras passes it by name on PyTorch, by position elsewhere.
            of_both = upstreams[0] if upstream is None else upstream
            return self._backward(arguments, row_log_sums, column_log_sums, of_both[0])

        return ops.stack([losses, hits]), gradient

    def _forward(
        self, anchors: Any, candidates: Any, inverse: Any, candidate_inverse: Any, scale: Any
    ) -> tuple[Any, Any, Any, Any]:
        """Return losses, hits and the logs of the sums of both softmaxes, `(num_dims, rows)`."""
        rows = ops.shape(anchors)[0]
        padded_anchors, padded_inverse = self._pad_rows(anchors), self._pad_columns(inverse)

        def chunk(
            index: Any, losses: Any, hits: Any, log_sums: Any, column_max: Any, column_sums: Any
        ) -> Any:
            start = index * self.chunk_size
            numbers, targets, compared, offsets, column_offsets = self._task_of(start)
            part = self._rows(padded_anchors, start)
            part_inverse = self._columns(padded_inverse, start)
            values_by_dim = []
            for m, product in enumerate(_products(part, candidates, self.dims)):
                logits = _logits(product, part_inverse[m], candidate_inverse[m], scale)
                row_logits = _masked(logits, compared)
                best = ops.cast(ops.argmax(row_logits, axis=1), "int32")
                if offsets is None:
                    row_max = ops.take_along_axis(row_logits, ops.expand_dims(best, 1), axis=1)
                else:
                    row_logits = row_logits + offsets
                    row_max = ops.max(row_logits, axis=1, keepdims=True)
                exponentials = ops.exp(row_logits - row_max)
                loss = log_sum = row_max[:, 0] + ops.log(ops.sum(exponentials, axis=1))
                if targets is not None:
                    loss = ops.sum(targets, axis=1) * log_sum - ops.sum(targets * logits, axis=1)
                new_max, new_sum = column_max[m], column_sums[m]
                if self.task.symmetric:
                    column = _plus(logits, column_offsets)[:, :rows]
                    column = _masked(column, ops.expand_dims(numbers < rows, 1))
                    new_max = ops.maximum(column_max[m], ops.max(column, axis=0))
                    new_sum = new_sum * ops.exp(column_max[m] - new_max)
                    new_sum = new_sum + ops.sum(ops.exp(column - new_max), axis=0)
                hit = _is_right(best, numbers, targets)
                values_by_dim.append((loss, hit, log_sum, new_max, new_sum))
            loss, hit, log_sum, *new_columns = map(ops.stack, zip(*values_by_dim, strict=True))
            return (
                index + 1,
                ops.slice_update(losses, (0, start), loss),
                ops.slice_update(hits, (0, start), hit),
                ops.slice_update(log_sums, (0, start), log_sum),
                *new_columns,
            )

        nothing = ops.zeros_like(padded_inverse)
        lowest = ops.zeros_like(inverse) - 1e30
        state = (nothing, nothing, nothing, lowest, ops.zeros_like(inverse))
        _, *by_row, column_max, column_sums = self._over_chunks(chunk, rows, state)
        losses, hits, row_log_sums = (values[:, :rows] for values in by_row)
        if not self.task.symmetric:
            return losses, hits, row_log_sums, column_sums
        column_log_sums = column_max + ops.log(column_sums)
        return (losses + column_log_sums) / 2, hits, row_log_sums, column_log_sums

    def _backward(
        self, arguments: tuple[Any, ...], row_log_sums: Any, column_log_sums: Any, upstream: Any
    ) -> tuple[Any, ...]:
        """Return the gradients of the five arguments."""
        anchors, candidates, inverse, candidate_inverse, scale = arguments
        rows = ops.shape(anchors)[0]
        padded_anchors, padded_inverse = self._pad_rows(anchors), self._pad_columns(inverse)
        padded_sums, padded_upstream = self._pad_columns(row_log_sums), self._pad_columns(upstream)
        spare = ops.zeros_like(candidate_inverse[:, rows:])  # hard negatives look for no anchor
        column_log_sums = ops.concatenate([column_log_sums, spare], axis=1)
        column_upstream = ops.concatenate([upstream, spare], axis=1)

        def chunk(
            index: Any, d_anchors: Any, d_candidates: Any, d_inverse: Any, d_candidate_inverse: Any
        ) -> Any:
            start = index * self.chunk_size
            numbers, targets, compared, offsets, column_offsets = self._task_of(start)
            part = self._rows(padded_anchors, start)
            part_inverse, part_sums, part_upstream = (
                self._columns(values, start)
                for values in (padded_inverse, padded_sums, padded_upstream)
            )
            d_products, d_part_inverse, d_other_inverse = [], [], []
            for m, product in enumerate(_products(part, candidates, self.dims)):
                logits = _logits(product, part_inverse[m], candidate_inverse[m], scale)
                row_logits = _plus(_masked(logits, compared), offsets)
                d_logits = ops.exp(row_logits - ops.expand_dims(part_sums[m], 1))
                if targets is not None:
                    d_logits = ops.sum(targets, axis=1, keepdims=True) * d_logits - targets
                row_weight = part_upstream[m]  # of the whole row, so applied where it is cheapest
                if self.task.symmetric:
                    column = _plus(logits, column_offsets)
                    column = _masked(column, ops.expand_dims(numbers < rows, 1))
                    d_column = ops.exp(column - column_log_sums[m]) * column_upstream[m]
                    d_logits = d_logits * ops.expand_dims(row_weight, 1) + d_column
                    row_weight = ops.full_like(row_weight, 0.5)
                by_lengths = d_logits * product
                to_candidates = ops.matmul(by_lengths, candidate_inverse[m])
                d_part_inverse.append(scale * row_weight * to_candidates)
                weighted_inverse = part_inverse[m] * row_weight
                d_other_inverse.append(ops.matmul(weighted_inverse, by_lengths))
                d_products.append(_logits(d_logits, weighted_inverse, candidate_inverse[m], scale))
            d_part: list[Any] = []
            d_all: list[Any] = []
            d_product: Any = None
            for start_column, stop_column in reversed(blocks(self.dims)):
                wider = d_products.pop()  # a block is in its own dim's prefix and in all wider ones
                d_product = wider if d_product is None else d_product + wider
                block = slice(start_column, stop_column)
                d_part.insert(0, ops.matmul(d_product, candidates[:, block]))
                d_all.insert(0, ops.matmul(ops.transpose(d_product), part[:, block]))
            return (
                index + 1,
                ops.slice_update(d_anchors, (start, 0), ops.concatenate(d_part, axis=1)),
                d_candidates + ops.concatenate(d_all, axis=1),
                ops.slice_update(d_inverse, (0, start), ops.stack(d_part_inverse)),
                d_candidate_inverse + ops.stack(d_other_inverse),
            )

        state = (padded_anchors, candidates, padded_inverse, candidate_inverse)
        zeros = tuple(ops.zeros_like(values) for values in state)
        gradients = self._over_chunks(chunk, rows, zeros)
        _, d_anchors, d_candidates, d_inverse, d_candidate_inverse = gradients
        return (
            d_anchors[:rows],
            d_candidates,
            d_inverse[:, :rows],
            scale * d_candidate_inverse,
            ops.sum(d_candidate_inverse * candidate_inverse),
        )

    def _over_chunks(self, chunk: Any, rows: Any, state: tuple[Any, ...]) -> Any:
        """Call `chunk(index, *state)` for every chunk; it returns the next index and state.

        The index counts by one: if it counts by more, XLA runs a loop up to 1 not even once.
        """
        num_chunks = (rows + self.chunk_size - 1) // self.chunk_size
        first = ops.convert_to_tensor(0, "int32")
        return ops.while_loop(lambda index, *_: index < num_chunks, chunk, (first, *state))

    def _task_of(self, start: Any) -> tuple[Any, Any, Any, Any, Any]:
        numbers = start + ops.arange(self.chunk_size, dtype="int32")
        return numbers, *self.task.of(numbers)

    def _pad_rows(self, rows: Any) -> Any:
        """Return `(rows, width)` with a chunk of zeros after the last, so that chunks are whole."""
        return ops.concatenate([rows, ops.zeros((self.chunk_size, rows.shape[1]))])

    def _pad_columns(self, values: Any) -> Any:
        return ops.concatenate([values, ops.zeros((len(self.dims), self.chunk_size))], axis=1)

    def _rows(self, padded: Any, start: Any) -> Any:
        return ops.slice(padded, (start, 0), (self.chunk_size, padded.shape[1]))

    def _columns(self, padded: Any, start: Any) -> Any:
        return ops.slice(padded, (0, start), (len(self.dims), self.chunk_size))
