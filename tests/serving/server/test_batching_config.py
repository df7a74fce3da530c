"""--enable_batching and --batching_parameters_file: defaults, and parameters that are refused."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from keras_mrl_serving.server.batching_config import batching_options, batching_parameters
from keras_mrl_serving.server.status import StatusError


def parameters(text: str) -> Any:
    empty: Any = batching_parameters(True, None)
    return text_format.Parse(text, empty)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            "max_batch_size {value: 32} allowed_batch_sizes: [8, 16]",
            "Last entry in allowed_batch_sizes must match max_batch_size; last entry was 16; "
            "expected 32",
        ),
        (
            "allowed_batch_sizes: 8",
            "Last entry in allowed_batch_sizes must match max_batch_size; last entry was 8; "
            "expected 1000",
        ),
        ("num_batch_threads {value: 0}", "num_batch_threads must be positive; was 0"),
        ("max_batch_size {value: 0}", "input_batch_size_limit must be positive; was 0"),
        ("batch_timeout_micros {value: -1}", "batch_timeout_micros must be non-negative; was -1"),
        ("max_enqueued_batches {value: -1}", "max_enqueued_batches must be positive; was -1"),
        (
            "max_batch_size {value: 4} enable_large_batch_splitting {value: true} "
            "max_execution_batch_size {value: 8}",
            "When enable_large_batch_splitting is true, input_batch_size_limit must be greater "
            "than or equal to max_execution_batch_size.148",
        ),
    ],
)
def test_parameters_that_cannot_work(text: str, refusal: str) -> None:
    with pytest.raises(StatusError) as caught:
        batching_options(parameters(text))
    assert (caught.value.code.name, caught.value.message) == ("INVALID_ARGUMENT", refusal)


def test_defaults() -> None:
    options = batching_options(parameters(""))
    assert (options.max_batch_size, options.max_execution_batch_size) == (1000, 1000)
    assert (options.batch_timeout_s, options.max_enqueued_batches) == (0, 10)
    assert options.num_batch_threads >= 1
    assert options.allowed_batch_sizes == ()
    assert not options.pad_variable_length_inputs
    assert not options.enable_large_batch_splitting
    assert batching_options(parameters("max_enqueued_batches {}")).max_enqueued_batches == 1


def test_the_two_flags(tmp_path: Path) -> None:
    file = tmp_path / "batching.config"
    file.write_text('max_batch_size { value: 7 }  # small\nthread_pool_name { value: "pool" }')
    assert batching_parameters(False, None) is None
    assert batching_parameters(False, "") is None
    assert str(batching_parameters(True, None)) == ""
    from_file: Any = batching_parameters(True, str(file))
    assert from_file.max_batch_size.value == 7
    with pytest.raises(ValueError, match="without setting") as caught:
        batching_parameters(False, str(file))
    assert str(caught.value) == (
        "server_options.batching_parameters_file is set without setting "
        "server_options.enable_batching to true."
    )


def test_a_file_that_is_no_text_proto(tmp_path: Path) -> None:
    file = tmp_path / "batching.config"
    file.write_text("max_batch_size: 7")
    with pytest.raises(ValueError, match="must be a text proto") as caught:
        batching_parameters(True, str(file))
    assert str(caught.value) == (
        "batching_parameters_file must be a text proto of tensorflow.serving.BatchingParameters. "
        f"Received: batching_parameters_file='{file}', Error parsing text-format "
        'tensorflow.serving.BatchingParameters: 1:17: Expected "{", found "7". Correct '
        "the file: max_batch_size { value: 128 } and the like."
    )
