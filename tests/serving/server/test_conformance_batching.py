"""Rows 33 to 38 of the reference, the refusals of batching; and callers do not notice each other.

Against the development server, or against the tensorflow_model_server at
KERAS_MRL_TFS_BATCHING_TARGET that watches the folder KERAS_MRL_TFS_BATCHING_BASE_PATH (which the
test fills) for a model named "default", started with --enable_batching and the parameters below.
Row 35 reaches no client over gRPC, whose own deadline ends the call earlier; test_batching.py has
it.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tensorflow_serving.apis.predict_pb2 import PredictRequest

from keras_mrl_serving._wire import from_proto
from tests.helpers.batchable_models import save
from tests.helpers.server_target import Served, predict, server_under_test

PARAMETERS = """
max_batch_size { value: 32 }
batch_timeout_micros { value: 250000 }
max_enqueued_batches { value: 2 }
num_batch_threads { value: 1 }
allowed_batch_sizes: 4
allowed_batch_sizes: 32
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    def put(base: Path, name: str) -> None:
        save(base / f"copying-{name}").rename(base / name)

    base = tmp_path_factory.mktemp("base")
    file = base / "batching.config"
    file.write_text(PARAMETERS)
    flags = {"enable_batching": True, "batching_parameters_file": file}
    with server_under_test("BATCHING_", base, put, **flags) as served:
        yield served


def rows(x: Any, *outputs: str) -> PredictRequest:
    return predict(outputs, signature="rows", inputs={"x": np.asarray(x, np.float32)})


def at_once(served: Served, *requests: PredictRequest) -> Sequence[Any]:
    """The calls of these requests, which wait for each other in the server."""
    calls = [served.future(request) for request in requests]
    for call in calls:
        call.exception()
    return calls


REFUSED = {
    "33": (
        rows(np.ones((33, 1)), "count"),
        "INVALID_ARGUMENT",
        "Task size 33 is larger than maximum input batch size 32",
    ),
    "36 no dimension": (
        predict(signature="scalar", inputs={"x": np.float32(1)}),
        "INVALID_ARGUMENT",
        "Batching Run() input tensors must have at least one dimension",
    ),
    "36 unequal": (
        predict(signature="pair", inputs={"a": np.ones(2, np.float32), "b": [b""]}),
        "INVALID_ARGUMENT",
        "Batching Run() input tensors must have equal 0th-dimension size",
    ),
    "38 no dimension": (
        rows([[1]], "sum"),
        "FAILED_PRECONDITION",
        "Batched output tensor has 0 dimensions",
    ),
    "38 other dimension": (
        rows([[1], [2]], "first"),
        "FAILED_PRECONDITION",
        "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes "
        "of the input tensors",
    ),
}


@pytest.mark.parametrize(("request_", "code", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(served: Served, request_: Any, code: str, text: str) -> None:
    assert served.refuses(request_) == (code, text)


def test_requests_meet_are_padded_and_get_their_own(served: Served) -> None:
    answers = at_once(served, *(rows([[n, n]] * n, "count", "total", "width") for n in (1, 2, 3)))
    outputs = [
        {name: from_proto(proto).tolist() for name, proto in call.result().outputs.items()}
        for call in answers
    ]
    assert [answer["total"] for answer in outputs] == [[2.0], [4.0] * 2, [6.0] * 3]
    assert [answer["count"] for answer in outputs] == [[32], [32] * 2, [32] * 3]


def test_34_a_queue_that_is_full(served: Served) -> None:
    spin = predict(signature="spin", inputs={"steps": np.full(32, 2**62)})
    under_way = served.future(spin, timeout_s=1.5)  # its deadline ends it
    time.sleep(0.3)  # until a thread of the server has surely taken it
    quick = predict(signature="spin", inputs={"steps": np.zeros(32, np.int64)})
    calls = at_once(served, *[quick] * 4)
    assert under_way.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
    codes = [call.code().name for call in calls]
    assert sorted(codes) == ["OK", "OK", "UNAVAILABLE", "UNAVAILABLE"]
    assert {call.details() for call in calls if call.code() is not grpc.StatusCode.OK} == {
        "The batch scheduling queue to which this task was submitted is full; currently 2 batches "
        "enqueued and max_enqueued_batches is 2"
    }


def test_37_inner_shapes_that_differ_fail_every_request(served: Served) -> None:
    calls = at_once(served, rows([[1, 2]], "total"), rows([[1, 2, 3]], "total"))
    text = (
        "Tensors with name 'rows_x:0' from different tasks have different shapes and padding is "
        "turned off. Set pad_variable_length_inputs to true, or ensure that all tensors with the "
        "same name have equal dimensions starting with the first dim."
    )
    assert [(call.code().name, call.details()) for call in calls] == [
        ("FAILED_PRECONDITION", text)
    ] * 2


def test_another_dim_is_another_queue(served: Served) -> None:
    calls = at_once(served, rows([[1, 2]], "total"), rows([[1, 2, 3]], "total", "count"))
    assert [call.code().name for call in calls] == ["OK", "OK"]
