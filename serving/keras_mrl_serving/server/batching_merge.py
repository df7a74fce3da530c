"""Requests put together along dimension 0, and their answers taken apart again."""

from collections.abc import Mapping, Sequence

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.types_pb2 import DataType

from .status import StatusError, invalid_argument

Arrays = Mapping[str, np.ndarray]  # by the name of the tensor in the graph
_MAX_RANK = 6


def batch_size(feeds: Arrays) -> int:
    """How many rows a request has.

    Args:
        feeds: the inputs.

    Raises:
        StatusError: INVALID_ARGUMENT, they have no common number of rows.
    """
    if not feeds:
        raise invalid_argument("Batching Run() must have at least one input tensor")
    sizes = set()
    for _, array in sorted(feeds.items()):
        if array.ndim == 0:
            raise invalid_argument("Batching Run() input tensors must have at least one dimension")
        sizes.add(len(array))
        if len(sizes) > 1:
            raise invalid_argument(
                "Batching Run() input tensors must have equal 0th-dimension size"
            )
    return sizes.pop()


def padding_size(size: int, allowed: Sequence[int]) -> int:
    """How many rows a batch is padded by.

    Args:
        size: its rows.
        allowed: the sizes a batch may have; empty means any.
    """
    # Without a row there is none to repeat; TensorFlow Serving ends itself over it.
    return next((larger - size for larger in allowed if larger >= size), 0) if size else 0


def merge(
    tasks: Sequence[Arrays], padding: int, pad_variable_length: bool
) -> dict[str, np.ndarray]:
    """One batch of the inputs of several requests, which have the same names.

    Args:
        tasks: the inputs of each request, at least one.
        padding: how many rows to add: the first row of the last request that has one.
        pad_variable_length: whether inner shapes may differ; the shorter are filled with their
            own first element then.

    Raises:
        StatusError: FAILED_PRECONDITION or INTERNAL, the requests do not fit together.
    """
    merged = {}
    for name in sorted(tasks[0]):
        arrays = [task[name] for task in tasks]
        if pad_variable_length:
            arrays = _filled(name, arrays)
        elif any(array.shape[1:] != arrays[0].shape[1:] for array in arrays):
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Tensors with name '{name}' from different tasks have different shapes and "
                "padding is turned off. Set pad_variable_length_inputs to true, or ensure that all "
                "tensors with the same name have equal dimensions starting with the first dim.",
            )
        _check_dtypes(arrays)
        if padding:
            last = next(array for array in reversed(arrays) if len(array))
            arrays.append(np.repeat(last[:1], padding, axis=0))
        merged[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return merged


def split(outputs: Arrays, sizes: Sequence[int], padding: int) -> list[dict[str, np.ndarray]]:
    """The part of each request in the answer to a batch.

    Args:
        outputs: the answer.
        sizes: the rows of each request, in the order of the batch.
        padding: how many rows of padding follow.

    Raises:
        StatusError: FAILED_PRECONDITION, an output has no row per row.
    """
    for _, array in sorted(outputs.items()):
        if array.ndim == 0:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION, "Batched output tensor has 0 dimensions"
            )
        if len(array) != sum(sizes) + padding:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension "
                "sizes of the input tensors",
            )
    ends = np.cumsum(sizes)
    return [
        {name: array[end - size : end] for name, array in outputs.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def _check_dtypes(arrays: Sequence[np.ndarray]) -> None:
    first = arrays[0].dtype
    for array in arrays:
        if array.dtype != first:
            raise StatusError(
                grpc.StatusCode.INTERNAL,
                "Tensor concat operation failed: INVALID_ARGUMENT: Cannot concatenate tensors that "
                f"have different data types. Got {_name(first)} and {_name(array.dtype)}.",
            )


def _name(dtype: np.dtype) -> str:
    name: str = DataType.Name(tf.as_dtype(dtype).as_datatype_enum)
    return name.removeprefix("DT_").lower()


def _filled(name: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    ranks = {array.ndim for array in arrays}
    if max(ranks) > _MAX_RANK:
        raise invalid_argument("Only tensors with rank from 1 to 6 can be padded.")
    if len(ranks) > 1:  # TensorFlow Serving reads past the end of its sizes here
        raise StatusError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"Tensors with name '{name}' from different tasks have different ranks",
        )
    inner = tuple(np.max([array.shape[1:] for array in arrays], axis=0, initial=0))
    return [_grown(array, (len(array), *inner)) for array in arrays]


def _grown(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.size == np.prod(shape, dtype=np.int64):
        return array.reshape(shape)
    if array.size < 1:
        raise invalid_argument("Got empty tensor in batch of non-empty tensors.")
    grown = np.full(shape, array.flat[0], array.dtype)
    grown[tuple(slice(size) for size in array.shape)] = array
    return grown
