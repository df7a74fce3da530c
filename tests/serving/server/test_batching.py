"""Requests that are run together: the same answers as alone, and errors for all of a batch.

test_conformance_batching.py has the refusals that a client sees.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from google.protobuf import text_format

from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.server.batch_scheduler import BatchQueue, BatchScheduler, Task
from keras_mrl_serving.server.batching import BatchingSession, merge
from keras_mrl_serving.server.batching_config import batching_options, batching_parameters
from keras_mrl_serving.server.loading import LoadOptions, load
from keras_mrl_serving.server.run import ServingSession
from keras_mrl_serving.server.status import StatusError
from tests.helpers.batchable_models import save
from tests.helpers.disk import Clock
from tests.helpers.waiting import wait_until

Answers = list[Any]
TOGETHER = "batch_timeout_micros {value: 10000000} num_batch_threads {value: 2}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tmp_path_factory.mktemp("batching") / "1"))


def parameters(text: str) -> Any:
    empty: Any = batching_parameters(True, None)
    return text_format.Parse(text, empty)


@contextmanager
def loaded(path: str, text: str) -> Iterator[ServingSession]:
    session = load(path, LoadOptions(batching_parameters=parameters(text)))
    try:
        yield session
    finally:
        session.close()


class Gated(SavedModelSession):
    """Computes nothing until its gate is open."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.entered, self.gate = threading.Event(), threading.Event()
        self.timeouts: list[float | None] = []

    def run_tensors(
        self, feeds: Any, fetches: Sequence[str], *, timeout_s: float | None = None
    ) -> list[np.ndarray]:
        self.timeouts.append(timeout_s)
        self.entered.set()
        assert self.gate.wait(60)
        return super().run_tensors(feeds, fetches, timeout_s=timeout_s)


class CountingScheduler(BatchScheduler):
    """Counts the tasks that were queued, at a time that a test sets."""

    def __init__(self) -> None:
        self.time = Clock()
        super().__init__(self.time)
        self.num_queued = 0

    def put(self, queue: BatchQueue, task: Task) -> list[Task]:
        parts = super().put(queue, task)
        self.num_queued += 1
        return parts


class Setting(NamedTuple):
    gated: Gated
    scheduler: CountingScheduler
    session: BatchingSession


@contextmanager
def setting(path: str, text: str) -> Iterator[Setting]:
    gated, scheduler = Gated(path), CountingScheduler()
    session = BatchingSession(gated, batching_options(parameters(text)), scheduler)
    try:
        yield Setting(gated, scheduler, session)
    finally:
        gated.gate.set()
        session.close()


def at_once(*calls: Callable[[], Any]) -> Answers:
    """What each call returns, or the code and text it is refused with."""

    def answer(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except StatusError as error:
            return error.code.name, error.message

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(answer, calls))


def rows(session: ServingSession, x: Any, outputs: Sequence[str] = ("count",), **more: Any) -> Any:
    return session.run("rows", {"x": np.asarray(x, np.float32)}, outputs, **more)


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    ((code, text),) = at_once(call)
    return code, text


def test_requests_are_run_together_and_each_gets_its_own_rows(path: str) -> None:
    with loaded(path, f"max_batch_size {{value: 6}} {TOGETHER}") as session:
        first, second = at_once(
            lambda: rows(session, [[1, 2], [3, 4]], ("count", "total")),
            lambda: rows(session, [[5, 6]] * 4, ("total", "count")),
        )
    assert first["count"].tolist() == [6, 6]
    assert first["total"].tolist() == [3, 7]
    assert list(second) == ["total", "count"]
    assert second["count"].tolist() == [6] * 4
    assert second["total"].tolist() == [11] * 4


def test_strings_and_several_inputs(path: str) -> None:
    texts = np.array([b"a\0", b"", "grün".encode(), b"b"], object)
    numbers = np.arange(4, dtype=np.float32)
    with loaded(path, f"max_batch_size {{value: 4}} {TOGETHER}") as session:
        answers = at_once(
            *(
                lambda part=part: session.run("pair", {"a": numbers[part], "b": texts[part]})
                for part in (slice(0, 1), slice(1, 3), slice(3, 4))
            )
        )
    assert [answer["text"].tolist() for answer in answers] == [
        [b"a\0"],
        [b"", "grün".encode()],
        [b"b"],
    ]
    assert [answer["twice"].tolist() for answer in answers] == [[0], [2, 4], [6]]


def test_a_batch_is_padded_to_an_allowed_size(path: str) -> None:
    text = "max_batch_size {value: 8} allowed_batch_sizes: [2, 4, 8]"
    with loaded(path, text) as session:
        for size, padded in ((0, 0), (1, 2), (2, 2), (3, 4), (5, 8)):
            answer = rows(session, np.ones((size, 3)), ("count", "total"))
            assert answer["count"].tolist() == [padded] * size
            assert answer["total"].tolist() == [3] * size


def test_the_padding_is_the_first_row_of_the_last_request() -> None:
    requests = [{"x": np.array(rows)} for rows in ([[1], [2]], [[3], [4]], np.ones((0, 1), int))]
    assert merge(requests[:2], 3, False)["x"].ravel().tolist() == [1, 2, 3, 4, 3, 3, 3]
    assert merge(requests, 1, False)["x"].ravel().tolist() == [1, 2, 3, 4, 3]


def test_35_a_deadline_that_passes_in_the_queue(path: str) -> None:
    text = "max_batch_size {value: 1} num_batch_threads {value: 1}"
    with setting(path, text) as (gated, scheduler, session), ThreadPoolExecutor(2) as pool:
        first = pool.submit(rows, session, [[1]], timeout_s=60.0)
        assert gated.entered.wait(60)
        late = pool.submit(refused, lambda: rows(session, [[1]], timeout_s=10.0))
        wait_until(lambda: scheduler.num_queued == 2)
        scheduler.time.now = 10.0
        gated.gate.set()
        assert late.result() == (
            "RESOURCE_EXHAUSTED",
            "Run() timeout exceeded while waiting in batching queue",
        )
        assert first.result()["count"].tolist() == [1]


def test_the_latest_deadline_holds_for_all(path: str) -> None:
    with setting(path, f"max_batch_size {{value: 2}} {TOGETHER}") as (gated, _, session):
        gated.gate.set()
        at_once(
            lambda: rows(session, [[1]], timeout_s=20), lambda: rows(session, [[1]], timeout_s=50)
        )
        at_once(lambda: rows(session, [[1]], timeout_s=20), lambda: rows(session, [[1]]))
    assert gated.timeouts == [50, None]


def test_a_session_that_is_closed_answers_the_requests_that_wait(path: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        with setting(path, f"max_batch_size {{value: 2}} {TOGETHER}") as (_, scheduler, session):
            waiting = pool.submit(rows, session, [[1]])
            wait_until(lambda: scheduler.num_queued == 1)
            assert not waiting.done()
        assert waiting.result()["count"].tolist() == [1]


def test_36_no_input_at_all(path: str) -> None:
    with loaded(path, "") as session:
        assert refused(lambda: session.run("pair", {})) == (
            "INVALID_ARGUMENT",
            "Batching Run() must have at least one input tensor",
        )


def test_dtypes_that_differ_fail_every_task(path: str) -> None:
    with loaded(path, f"max_batch_size {{value: 2}} {TOGETHER}") as session:
        first, second = at_once(
            lambda: session.run("rows", {"x": np.ones((1, 2), np.float32)}),
            lambda: session.run("rows", {"x": np.array([[b"", b""]], object)}),
        )
    assert first == second
    assert first[0] == "INTERNAL"
    text = (
        "Tensor concat operation failed: INVALID_ARGUMENT: Cannot concatenate tensors that have "
        "different data types. Got "
    )
    assert first[1] in (f"{text}float and string.", f"{text}string and float.")


def test_an_error_of_the_runtime_goes_to_every_task(path: str) -> None:
    with loaded(path, f"max_batch_size {{value: 2}} {TOGETHER}") as session:
        x = np.ones((1, 5), np.float32)
        first, second = at_once(*[lambda: session.run("project", {"x": x})] * 2)
    assert first == second
    assert first[0] == "INVALID_ARGUMENT"
    assert first[1].startswith("Matrix size-incompatible: In[0]: [2,5], In[1]: [4,3]")


def test_shorter_inputs_are_filled_with_their_own_first_element(path: str) -> None:
    text = f"max_batch_size {{value: 3}} pad_variable_length_inputs: true {TOGETHER}"
    with loaded(path, text) as session:
        outputs = ("count", "width", "total")
        short, long = at_once(
            lambda: rows(session, [[5, 1], [1, 1]], outputs),
            lambda: rows(session, [[2, 2, 2, 2]], outputs),
        )
    assert short["width"].tolist() == [4, 4]
    assert short["total"].tolist() == [5 + 1 + 5 + 5, 1 + 1 + 5 + 5]  # 5 is the tensor's first
    assert long["total"].tolist() == [8]


def test_a_large_task_is_split_over_batches(path: str) -> None:
    text = """max_batch_size {value: 10} enable_large_batch_splitting {value: true}
              max_execution_batch_size {value: 4} num_batch_threads {value: 1}"""
    x = np.arange(20.0).reshape(10, 2)
    with loaded(path, text) as session:
        answer = rows(session, x, ("count", "total"))
        assert answer["count"].tolist() == [4] * 8 + [2] * 2
        assert answer["total"].tolist() == x.sum(1).tolist()
        assert refused(lambda: rows(session, np.ones((11, 1)))) == (
            "INVALID_ARGUMENT",
            "Task size 11 is larger than maximum input batch size 10",
        )
        code, error = refused(lambda: session.run("project", {"x": np.ones((9, 5), np.float32)}))
        assert code == "INVALID_ARGUMENT"
        assert error.startswith("Matrix size-incompatible: In[0]: [4,5], In[1]: [4,3]")


def test_32_threads_get_what_they_would_alone(path: str) -> None:
    rng = np.random.default_rng(0)
    requests = [rng.normal(size=(int(n), 4)).astype(np.float32) for n in rng.integers(1, 9, 320)]
    text = (
        "max_batch_size {value: 64} batch_timeout_micros {value: 2000} allowed_batch_sizes: [8, 64]"
    )
    with loaded(path, text) as session, loaded(path, "") as other, SavedModelSession(path) as alone:
        with ThreadPoolExecutor(32) as pool:
            projected = list(pool.map(lambda x: session.run("project", {"x": x}), requests))
            counted = list(pool.map(lambda x: rows(session, x), requests))
            unpadded = list(pool.map(lambda x: other.run("project", {"x": x}), requests))
        for x, padded, answer in zip(requests, projected, unpadded, strict=True):
            expected = alone.run("project", {"x": x})["y"]
            np.testing.assert_allclose(padded["y"], expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(answer["y"], expected, rtol=1e-5, atol=1e-5)
        assert [len(answer["count"]) for answer in counted] == [len(x) for x in requests]
        counts = {count for answer in counted for count in answer["count"]}
        assert 64 in counts
        assert counts <= {8, 64}


def test_an_unknown_name_is_a_key_error(path: str) -> None:
    with loaded(path, "") as session:
        arguments: Any
        for arguments in (("none", {}), ("rows", {"y": np.ones(1)}), ("rows", {}, ("z",))):
            with pytest.raises(KeyError):
                session.run(*arguments)
