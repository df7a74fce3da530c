"""How requests are batched: the file of --batching_parameters_file, and the defaults."""

import os
from dataclasses import dataclass
from typing import Any

from .status import invalid_argument
from .text_proto import TextProtoFile, empty_message

_PARAMETERS = {
    "max_batch_size": "google.protobuf.Int64Value",
    "batch_timeout_micros": "google.protobuf.Int64Value",
    "max_enqueued_batches": "google.protobuf.Int64Value",
    "num_batch_threads": "google.protobuf.Int64Value",
    "thread_pool_name": "google.protobuf.StringValue",
    "enable_large_batch_splitting": "google.protobuf.BoolValue",
    "max_execution_batch_size": "google.protobuf.Int64Value",
    "allowed_batch_sizes": "repeated int64",
    "pad_variable_length_inputs": "bool",
}


@dataclass(frozen=True, kw_only=True)
class BatchingOptions:
    """BatchingParameters with every default filled in.

    Args:
        max_batch_size: the most rows of a request, and of a batch where requests are not split.
        batch_timeout_s: how long a batch that is not full waits for more rows.
        max_enqueued_batches: how many batches a queue holds.
        num_batch_threads: how many batches are computed at once, of all models together.
        allowed_batch_sizes: the sizes that batches are padded to; empty means no padding.
        pad_variable_length_inputs: whether inputs of one batch may differ in their inner shapes.
        enable_large_batch_splitting: whether a request may be spread over several batches.
        max_execution_batch_size: the most rows of a batch.
    """

    max_batch_size: int
    batch_timeout_s: float
    max_enqueued_batches: int
    num_batch_threads: int
    allowed_batch_sizes: tuple[int, ...]
    pad_variable_length_inputs: bool
    enable_large_batch_splitting: bool
    max_execution_batch_size: int


def batching_parameters(enable_batching: bool, path: str | None) -> Any | None:
    """The `BatchingParameters` of TensorFlow Serving's two flags; None means without batching.

    Args:
        enable_batching: --enable_batching.
        path: --batching_parameters_file; None or empty means the defaults.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text proto of BatchingParameters, or is given without batching.
    """
    if path and not enable_batching:
        raise ValueError(
            "server_options.batching_parameters_file is set without setting "
            "server_options.enable_batching to true."
        )
    if not enable_batching:
        return None
    return read_batching_parameters(path) if path else _empty_parameters()


def read_batching_parameters(path: str) -> Any:
    """The `BatchingParameters` of a file.

    Args:
        path: a text proto.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text proto of BatchingParameters.
    """
    example = "max_batch_size { value: 128 } and the like"
    return TextProtoFile("batching_parameters_file", path, _empty_parameters(), example).read()


def batching_options(parameters: Any) -> BatchingOptions:
    """The options that BatchingParameters stand for.

    Args:
        parameters: a `BatchingParameters`.

    Raises:
        StatusError: INVALID_ARGUMENT, with TensorFlow Serving's text.
    """

    def value(name: str, default: int) -> int:
        return getattr(parameters, name).value if parameters.HasField(name) else default

    size = value("max_batch_size", 1000)
    allowed = tuple(parameters.allowed_batch_sizes)
    threads = value("num_batch_threads", os.cpu_count() or 1)
    timeout = value("batch_timeout_micros", 0)
    enqueued = value("max_enqueued_batches", 10)
    splits = bool(value("enable_large_batch_splitting", 0))
    execution_size = value("max_execution_batch_size", size) if splits else size
    if allowed and allowed[-1] != size:
        raise invalid_argument(
            "Last entry in allowed_batch_sizes must match max_batch_size; last entry was "
            f"{allowed[-1]}; expected {size}"
        )
    if threads < 1:
        raise invalid_argument(f"num_batch_threads must be positive; was {threads}")
    if size < 1:
        raise invalid_argument(f"input_batch_size_limit must be positive; was {size}")
    if timeout < 0:
        raise invalid_argument(f"batch_timeout_micros must be non-negative; was {timeout}")
    if enqueued < 0 or (splits and enqueued == 0):
        raise invalid_argument(f"max_enqueued_batches must be positive; was {enqueued}")
    if not 0 < execution_size <= size:
        raise invalid_argument(
            "When enable_large_batch_splitting is true, input_batch_size_limit must be greater "
            # TensorFlow Serving too puts no blanks between the three; the first stands for "true".
            f"than or equal to max_execution_batch_size.1{size}{execution_size}"
        )
    return BatchingOptions(
        max_batch_size=size,
        batch_timeout_s=timeout / 1e6,
        max_enqueued_batches=max(enqueued, 1),
        num_batch_threads=threads,
        allowed_batch_sizes=allowed,
        pad_variable_length_inputs=parameters.pad_variable_length_inputs,
        enable_large_batch_splitting=splits,
        max_execution_batch_size=execution_size,
    )


def _empty_parameters() -> Any:
    return empty_message("BatchingParameters", _PARAMETERS)
