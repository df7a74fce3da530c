"""How large an answer may be: known before it is computed, wherever it grows with the rows.

`describe` answers each key with the whole manifest, and a key takes two bytes: a megabyte of keys
would be gigabytes of answer. TensorFlow Serving computes them, and then cannot send them: no
message has more than 2 GiB.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from math import prod
from typing import Any

import grpc
import numpy as np
import tensorflow as tf

from .._session import Signature
from .status import StatusError

MAX_ANSWER_BYTES = 2**28  # no less than the client takes by default
_LARGE_BYTES = 2**24
_FEW_ROWS = 16
_STRING_BYTES = 64  # what a string takes besides its text
_NUMBER_BYTES = 4  # what the smallest number takes in a message
_large = threading.Lock()


def size_of(arrays: Mapping[str, np.ndarray]) -> int:
    """The bytes that arrays take as an answer, about.

    Args:
        arrays: the outputs of a run, by name.
    """
    return sum(
        sum(map(len, array.flat)) + _STRING_BYTES * array.size
        if array.dtype == object
        else array.size * max(array.itemsize, _NUMBER_BYTES)
        for array in arrays.values()
    )


def check_size(size: int, max_bytes: int) -> None:
    """Refuses an answer that is too large.

    Args:
        size: its bytes, about.
        max_bytes: the most it may have.

    Raises:
        StatusError: RESOURCE_EXHAUSTED.
    """
    if size > max_bytes:
        raise StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"An answer of the development server must have at most {max_bytes} bytes. Received: a "
            f"request whose answer has about {size}. Send fewer rows in a request.",
        )


def expected_size(
    run: Any, signature: Signature, inputs: Mapping[str, np.ndarray], names: Sequence[str]
) -> int:
    """The bytes of the answer to some rows, about; 0 where it does not go with the rows.

    The declared shapes tell it, or else the first row of the request does, which is run alone.

    Args:
        run: from inputs to the outputs.
        signature: the signature.
        inputs: arrays by the signature's input names.
        names: the outputs that are asked for; empty means all of them.
    """
    rows, row_sizes = _rows_of(signature)
    sizes = {len(inputs[name]) for name in rows if name in inputs and inputs[name].ndim}
    if len(sizes) != 1:
        return 0
    num_rows = sizes.pop()
    row_size = 0
    for name in names or row_sizes:
        size = row_sizes.get(name, 0)
        if size is None:
            break
        row_size += size
    else:
        return num_rows * row_size
    if num_rows <= _FEW_ROWS:
        return 0
    first = {name: array[:1] if name in rows else array for name, array in inputs.items()}
    try:
        return num_rows * size_of(run(first))
    except (StatusError, tf.errors.OpError):  # as the whole request will say
        return 0


@lru_cache(maxsize=1024)
def _rows_of(signature: Signature) -> tuple[frozenset[str], dict[str, int | None]]:
    """The inputs that have rows; each output that has rows, with the bytes of one, see below."""
    rows = {name for name, info in signature.inputs.items() if _has_rows(info)}
    outputs = signature.outputs.items()
    return frozenset(rows), {n: _row_size(info) for n, info in outputs if _has_rows(info)}


def _has_rows(info: Any) -> bool:
    dims = info.tensor_shape.dim
    return info.tensor_shape.unknown_rank or (len(dims) > 0 and dims[0].size < 0)


def _row_size(info: Any) -> int | None:
    """The bytes of a row of an output; None where its declared shape does not tell."""
    dtype, dims = tf.as_dtype(info.dtype), info.tensor_shape.dim[1:]
    if info.tensor_shape.unknown_rank or dtype == tf.string or any(dim.size < 0 for dim in dims):
        return None
    return prod(dim.size for dim in dims) * max(dtype.size or 0, _NUMBER_BYTES)


def one_large_at_a_time(size: int, timeout_s: float | None) -> AbstractContextManager[None]:
    """Has the runs of large answers wait for each other.

    Args:
        size: the bytes of the answer, about.
        timeout_s: the time left until the caller's deadline; None without one.

    Raises:
        StatusError: DEADLINE_EXCEEDED, another large answer took all the time.
    """
    return nullcontext() if size <= _LARGE_BYTES else _alone(timeout_s)


@contextmanager
def _alone(timeout_s: float | None) -> Iterator[None]:
    timeout = -1 if timeout_s is None else min(max(timeout_s, 0), threading.TIMEOUT_MAX)
    if not _large.acquire(timeout=timeout):
        raise StatusError(
            grpc.StatusCode.DEADLINE_EXCEEDED, "Timed out waiting for another large answer"
        )
    try:
        yield
    finally:
        _large.release()
