"""How requests are batched: what --batching_parameters_file says, and the defaults."""

import os
from dataclasses import dataclass
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

from .status import invalid_argument, read_text_proto

_NAME = "tensorflow.serving.BatchingParameters"
_INT64, _BOOL, _STRING = (f".google.protobuf.{kind}Value" for kind in ("Int64", "Bool", "String"))
_WRAPPED = {
    "max_batch_size": _INT64,
    "batch_timeout_micros": _INT64,
    "max_enqueued_batches": _INT64,
    "num_batch_threads": _INT64,
    "thread_pool_name": _STRING,
    "enable_large_batch_splitting": _BOOL,
    "max_execution_batch_size": _INT64,
}


@dataclass(frozen=True, kw_only=True)
class BatchingOptions:
    """BatchingParameters with every default filled in.

    Args:
        max_batch_size: the most rows of a request, and of a batch where requests are not split.
        batch_timeout_s: how long a batch that is not full waits for more.
        max_enqueued_batches: how many batches a queue holds.
        num_batch_threads: how many batches are computed at once, of all models together.
        allowed_batch_sizes: what batches are padded up to; empty means no padding.
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
    """What the two flags of TensorFlow Serving ask for; None means without batching.

    Args:
        enable_batching: --enable_batching.
        path: --batching_parameters_file, None or empty where it is not given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text of BatchingParameters, or is given without batching.
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
        path: file with the text of the proto.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such text.
    """
    example = "max_batch_size { value: 128 } and the like"
    return read_text_proto(path, _empty_parameters(), "batching_parameters_file", example)


def batching_options(parameters: Any) -> BatchingOptions:
    """BatchingParameters as they act.

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
            # Its three numbers have no blanks between them there either; the first is "true".
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
    """An empty BatchingParameters; `tensorflow-serving-api` ships without this message."""
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_mrl_serving/batching_parameters.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    message = file.message_type.add(name="BatchingParameters")
    for name, wrapper in _WRAPPED.items():
        message.field.add(
            name=name, type=kinds.TYPE_MESSAGE, type_name=wrapper, label=kinds.LABEL_OPTIONAL
        )
    message.field.add(name="allowed_batch_sizes", type=kinds.TYPE_INT64, label=kinds.LABEL_REPEATED)
    message.field.add(
        name="pad_variable_length_inputs", type=kinds.TYPE_BOOL, label=kinds.LABEL_OPTIONAL
    )
    for number, field in enumerate(message.field, start=1):  # only the text has a meaning
        field.number = number
    pool = descriptor_pool.DescriptorPool()  # its own, lest the package ships it one day
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(_NAME))()
