"""Answers that would be too large: refused before they are computed."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.server.answer_size import one_large_at_a_time, size_of
from keras_mrl_serving.server.run import run_predict
from keras_mrl_serving.server.status import StatusError
from tests.helpers.server_target import predict
from tests.helpers.waiting import wait_until

MANIFEST = "m" * 6600


class Growing(tf.Module):
    """Signatures whose answers go with the rows, with their width, or with neither."""

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="key")])
    def describe(self, key: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"manifest": tf.fill(tf.shape(key), MANIFEST)}

    @tf.function(input_signature=[tf.TensorSpec((None, 2), name="x")])
    def embed(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"embedding": tf.concat([x] * 50, 1), "id": tf.cast(x[:, 0], tf.int8)}

    @tf.function(input_signature=[tf.TensorSpec((None, None), name="x")])
    def same(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"x": tf.identity(x), "first": x[0, 0]}

    @tf.function(input_signature=[tf.TensorSpec((), tf.int32, name="count")])
    def ones(self, count: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"ones": tf.ones([count])}


class Watched:
    """A session that notes how many rows it runs."""

    def __init__(self, session: SavedModelSession) -> None:
        self.signatures = session.signatures
        self.rows: list[int] = []
        self._session = session

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_names: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        (array,) = inputs.values()
        self.rows.append(len(array) if array.ndim else 0)
        return self._session.run(signature_name, inputs, output_names, timeout_s=timeout_s)

    def cancel(self) -> None:
        self._session.cancel()

    def close(self) -> None:
        self._session.close()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SavedModelSession]:
    path, module = tmp_path_factory.mktemp("growing"), Growing()
    signatures = {name: getattr(module, name) for name in ("describe", "embed", "same", "ones")}
    tf.saved_model.save(module, str(path), signatures=signatures)
    with SavedModelSession(path) as session:
        yield session


@pytest.fixture
def session(opened: SavedModelSession) -> Watched:
    return Watched(opened)


def ask(session: Watched, signature: str, most: int, **inputs: Any) -> dict[str, np.ndarray]:
    request = predict(inputs=inputs, signature=signature)
    return run_predict(session, request, None, most)[1]


def refusal(session: Watched, signature: str, most: int, **inputs: Any) -> str:
    with pytest.raises(StatusError) as caught:
        ask(session, signature, most, **inputs)
    return f"{caught.value.code.name}: {caught.value.message}"


def too_large(most: int, size: int) -> str:
    return (
        f"RESOURCE_EXHAUSTED: An answer of the development server must have at most {most} bytes. "
        f"Received: a request whose answer has about {size}. Send fewer rows in a request."
    )


def test_of_many_rows_the_first_tells(session: Watched) -> None:
    keys = np.full(1_000_000, b"", object)
    assert refusal(session, "describe", 10**6, key=keys) == too_large(10**6, 6664 * 10**6)
    assert session.rows == [1]
    assert len(ask(session, "describe", 10**6, key=keys[:100])["manifest"]) == 100
    assert session.rows == [1, 1, 100]


def test_a_few_rows_are_run_at_once(session: Watched) -> None:
    keys = np.full(16, b"", object)
    assert len(ask(session, "describe", 16 * 6664, key=keys)["manifest"]) == 16
    assert session.rows == [16]


def test_declared_shapes_need_no_run(session: Watched) -> None:
    rows = np.ones((1000, 2), np.float32)
    size = 1000 * (400 + 4)
    assert refusal(session, "embed", size - 1, x=rows) == too_large(size - 1, size)
    assert session.rows == []
    assert ask(session, "embed", size, x=rows)["embedding"].shape == (1000, 100)
    assert session.rows == [1000]


def test_rows_of_no_declared_width(session: Watched) -> None:
    rows = np.ones((100, 7), np.float32)
    assert refusal(session, "same", 2000, x=rows) == too_large(2000, 100 * 32)
    assert ask(session, "same", 4000, x=rows)["x"].shape == (100, 7)


def test_an_answer_that_does_not_go_with_rows_is_measured_afterwards(session: Watched) -> None:
    count = np.array(1000, np.int32)
    assert refusal(session, "ones", 3999, count=count) == too_large(3999, 4000)
    assert len(ask(session, "ones", 4000, count=count)["ones"]) == 1000


def test_what_is_wrong_with_a_request_is_said_of_the_whole(session: Watched) -> None:
    wrong = refusal(session, "same", 10**6, x=np.ones(100, np.float32))
    assert wrong.startswith("INVALID_ARGUMENT: ")
    assert session.rows == [1, 100]


def test_sizes() -> None:
    texts = np.array([b"abc", b""], object)
    assert size_of({"a": np.ones(3), "b": np.ones((2, 2), np.int8), "c": texts}) == 24 + 16 + 131


def test_large_answers_wait_for_each_other_but_for_no_small_one() -> None:
    inside = threading.Event()

    def second() -> None:
        with one_large_at_a_time(2**30, None):
            inside.set()

    with one_large_at_a_time(2**30, None):
        with one_large_at_a_time(1000, None):
            pass
        with pytest.raises(StatusError, match="another large answer"):
            with one_large_at_a_time(2**30, 0.01):
                pass
        thread = threading.Thread(target=second)
        thread.start()
        assert not inside.wait(0.05)
    wait_until(inside.is_set)
    thread.join()
