"""The losses of nested similarities, row by row: in one piece or chunk by chunk."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from .flat import flat_rows
from .similarity import Task, plain_rows


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
