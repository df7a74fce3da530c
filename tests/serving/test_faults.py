"""What breaks between a client and its servers, over real sockets."""

import asyncio
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.client import Client
from keras_mrl_serving.errors import (
    AccessDeniedError,
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    MessageTooLargeError,
    ModelNotFoundError,
    ServerError,
    ServerUnavailableError,
    SignatureNotFoundError,
    VersionChangedError,
)
from keras_mrl_serving.options import Options
from tests.helpers.faulty_server import (
    POLICY,
    ROOT,
    Asked,
    Before,
    Faulty,
    Process,
    echo,
    opened,
    rows,
)

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
FACTS = ("target", "model", "version", "signature", "timeout_s", "attempts")


def facts(error: KerasMrlError) -> dict[str, object]:
    assert not isinstance(error, grpc.RpcError)
    return {name: getattr(error, name) for name in FACTS}


def fails(times: int, signature: str = "describe", slow_s: float = 0.0) -> Before:
    """Refuse the first so many requests, as a server that is not there yet does."""
    left = iter(range(times))

    def before(asked: Asked, context: grpc.ServicerContext) -> None:
        if asked.signature == signature and next(left, None) is not None:
            time.sleep(slow_s)
            context.abort(UNAVAILABLE, "busy")

    return before


def aborts(code: grpc.StatusCode, text: str, signature: str = "embed_2") -> Before:
    def before(asked: Asked, context: grpc.ServicerContext) -> None:
        if asked.signature == signature:
            context.abort(code, text)

    return before


# 1. A server that dies in the middle of a call, and one in its place.


@contextmanager
def asking(client: Any) -> Iterator[Callable[[], Any]]:
    """One call for embeddings under way in a thread of its own; called, it gives the answer."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(client.embed, rows(3), 2).result


@BOTH
def test_a_call_outlives_its_server(kind: type[Any]) -> None:
    patient = Options(first_backoff_s=0.4, timeout_s=20.0)
    with Process(slow=1) as first, opened(kind, first.target, patient) as client:
        with asking(client) as answer:
            assert first.said() == "embed_2"
            first.kill()
            with Process(first.port):
                np.testing.assert_array_equal(answer()[:, 0], [1, 2, 3])
                np.testing.assert_array_equal(client.embed(rows(3), 2)[:, 0], [1, 2, 3])


@BOTH
def test_a_call_that_is_sent_once_says_that_its_server_died(kind: type[Any]) -> None:
    once = Options(max_attempts=1, timeout_s=15.0)
    with Process(slow=1) as first, opened(kind, first.target, once) as client:
        with asking(client) as answer:
            assert first.said() == "embed_2"
            first.kill()
            with pytest.raises(ServerUnavailableError) as caught:
                answer()
        assert facts(caught.value) == {
            "target": first.target,
            "model": "default",
            "version": None,
            "signature": "embed_2",
            "timeout_s": 15.0,
            "attempts": 1,
        }
        with pytest.raises(ServerUnavailableError):
            client.embed(rows(3), 2)  # nobody is there
        with Process(first.port):
            assert_works_again(client, within_s=6.0)


def assert_works_again(client: Any, within_s: float) -> None:
    """gRPC looks for a server again after 5 s at the latest."""
    start = time.monotonic()
    while True:
        try:
            np.testing.assert_array_equal(client.embed(rows(3), 2)[:, 0], [1, 2, 3])
            return
        except ServerUnavailableError:
            assert time.monotonic() - start < within_s
            time.sleep(0.05)


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="TensorFlow starts twice; `make soak` runs it")
@BOTH
def test_a_development_server_is_killed_and_started_again(
    kind: type[Any], saved: Mapping[str, Path]
) -> None:
    def start(port: int) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "keras_mrl_cli", "serve", "--dev", f"--port={port}"]
        process = subprocess.Popen(
            [*command, f"--model_base_path={saved['classifier']}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        return process, int(line.partition("127.0.0.1:")[2].partition(".")[0])

    patient = Options(first_backoff_s=2.0, max_backoff_s=8.0, timeout_s=60.0)
    process, port = start(0)
    answers = []
    done = threading.Event()

    def ask() -> None:
        with opened(kind, f"127.0.0.1:{port}", patient) as client:
            while not done.is_set():
                answers.append(client.embed(rows(3), 2))

    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask)
            try:
                while len(answers) < 20 and not asked.done():
                    time.sleep(0.01)
                process.kill()
                process.communicate()
                before = len(answers)
                process, _ = start(port)
                deadline = time.monotonic() + 40
                while len(answers) < before + 20 and time.monotonic() < deadline:
                    time.sleep(0.01)
            finally:
                done.set()
            asked.result()
    finally:
        process.kill()
        process.communicate()
    assert len(answers) >= before + 20
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


# 2. Two replicas, one of which goes away under load.


def load(targets: list[str], options: Options, meanwhile: Callable[[], object]) -> int:
    """Ask by eight threads while something happens; return how many calls were answered."""
    done = threading.Event()
    answered = [0] * 8

    def ask(client: Client, number: int) -> None:
        x = rows(3, start=10 * number + 1)
        while not done.is_set():
            np.testing.assert_array_equal(client.embed(x, 2)[:, 0], x[:, 0])
            answered[number] += 1

    with Client(targets, options=options) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, client, number) for number in range(8)]
        try:
            meanwhile()
        finally:
            done.set()
        for future in asked:
            future.result()
    return sum(answered)


def test_no_call_fails_when_one_of_two_replicas_is_killed() -> None:
    with Process() as one, Process() as other:
        after = [0]

        def kill_one() -> None:
            time.sleep(0.5)
            other.kill()
            time.sleep(1.0)
            after[0] = 1

        assert load([one.target, other.target], Options(), kill_one) > 100
    assert after == [1]


def test_calls_under_way_outlive_the_replica_that_is_drained() -> None:
    def work(*_: object) -> None:
        time.sleep(0.3)

    with Faulty() as one, Faulty() as other, Client([one.target, other.target]) as client:
        deadline = time.monotonic() + 5
        while not (one.asked and other.asked):  # until both are connected
            client.describe()
            assert time.monotonic() < deadline
        one.before = other.before = work
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(client.embed, rows(2, start=n), 2) for n in range(8)]
            time.sleep(0.1)
            under_way = len(other.sent("embed_2"))
            other.stop(5.0)
            for n, future in enumerate(asked):
                assert future.result()[:, 0].tolist() == [n, n + 1]
        assert under_way == 4
        for _ in range(5):
            assert client.embed(rows(2), 2).shape == (2, 2)
        assert len(one.sent("embed_2")) == 9
        assert len(other.sent("embed_2")) == 4


def test_a_client_that_is_sent_once_would_have_failed() -> None:
    """The test of a killed replica can fail: without retries, killing a replica is seen."""
    with Process() as one, Process() as other:

        def kill_one() -> None:
            time.sleep(0.3)
            other.kill()
            time.sleep(0.3)

        with pytest.raises(ServerUnavailableError):
            load([one.target, other.target], Options(max_attempts=1), kill_one)


# 3. Two replicas that swap versions, each when it likes.


SWAP_S = 0.1


def swap(server: Faulty, stop: threading.Event, keep: int, seed: int) -> None:
    """Load one version after another, as TensorFlow Serving does; `keep` of them stay.

    Versions come every so often, and each replica finds them when it looks.
    """
    clock, start = random.Random(seed), time.monotonic()
    for newest in count(2):
        found = start + (newest - 1 + clock.uniform(0.0, 0.9)) * SWAP_S
        if stop.wait(max(0.0, found - time.monotonic())):
            return
        server.versions = {**server.versions, newest: echo(newest)}
        stop.wait(0.002)
        server.versions = dict(sorted(server.versions.items())[-keep:])


def is_mixed(answer: Any) -> bool:
    """Whether an answer was made by more than one version: see `echo`."""
    by, made = np.divmod(answer.class_ids[:, 0], 10)
    return len({*by.tolist(), *made.tolist()}) > 1


@pytest.mark.soak
@pytest.mark.parametrize("keep", [1, 2])
def test_no_answer_mixes_versions_while_replicas_swap_them(keep: int) -> None:
    seconds = 30.0 if SOAK else 2.0
    stop = threading.Event()
    counts: dict[str, int] = dict.fromkeys(("answers", "changed", "mixes"), 0)
    counting = threading.Lock()

    def tally(name: str) -> None:
        with counting:
            counts[name] += 1

    def ask(whole: Client, split: Client, number: int) -> None:
        x = rows(9, start=100 * number + 1)
        while not stop.is_set():
            try:
                if number % 3 == 0:
                    answer = whole.classify_adaptive(x, POLICY)
                    mixed = is_mixed(answer)
                    assert answer.dim.tolist() == [2, 4, 2, 4, 2, 4, 2, 4, 2]
                elif number % 3 == 1:
                    mixed = is_mixed(split.classify_adaptive(x, POLICY))
                else:
                    embedding = split.embed(x, 2)
                    np.testing.assert_array_equal(embedding[:, 0], x[:, 0])
                    mixed = len(set(embedding[:, 1].tolist())) > 1
                tally("mixes" if mixed else "answers")
            except VersionChangedError:
                tally("changed")

    small = Options(max_batch_size=2, max_in_flight=2)
    with Faulty(workers=8) as one, Faulty(workers=8) as other:
        targets = [one.target, other.target]
        with (
            Client(targets) as whole,
            Client(targets, options=small) as split,
            ThreadPoolExecutor(10) as pool,
        ):
            swapping = [
                pool.submit(swap, server, stop, keep, seed)
                for seed, server in enumerate((one, other))
            ]
            asked = [pool.submit(ask, whole, split, number) for number in range(8)]
            try:
                stop.wait(seconds)
            finally:
                stop.set()
            for future in (*swapping, *asked):
                future.result()
        swaps = max(one.versions) + max(other.versions) - 2  # both began with version 1
    print(f"keep {keep}: {counts} in {swaps} swaps of versions")
    assert counts["mixes"] == 0
    assert counts["answers"] > 20
    assert swaps > 10


def test_a_mix_would_have_been_seen() -> None:
    """The test above can fail: what a client that pins no version would be answered is a mix."""
    from keras_mrl_serving.calls import Call

    features = echo(1)(Call("features", {"x": rows(2)}))["features"]
    answer = echo(2)(Call("head_4", {"features": features}))
    assert np.asarray(answer["class_ids"])[:, 0].tolist() == [12, 12]


# 4. Targets that swallow what they are sent.


@contextmanager
def silent() -> Iterator[str]:
    """A port that takes connections, and reads and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = []

        def take() -> None:
            try:
                while True:
                    taken.append(listener.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()


@contextmanager
def full() -> Iterator[str]:
    """A port whose queue of connections is full: even the handshake of TCP is not answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        time.sleep(0.05)
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for each in waiting:
                each.close()


@pytest.mark.parametrize("timeout_s", [0.5, 2.0])
@pytest.mark.parametrize("hole", [silent, full])
@BOTH
def test_a_black_hole_is_left_in_time(
    kind: type[Any], hole: Callable[[], Any], timeout_s: float
) -> None:
    with hole() as target, opened(kind, target, Options(timeout_s=timeout_s)) as client:
        start = time.monotonic()
        with pytest.raises(DeadlineError) as caught:
            client.embed(rows(3), 2)
        took_s = time.monotonic() - start
        print(f"{kind.__name__} {hole.__name__}: {took_s:.3f} of {timeout_s} s")
        assert 0.9 * timeout_s < took_s < 1.1 * timeout_s
        assert facts(caught.value) == {
            "target": target,
            "model": "default",
            "version": None,
            "signature": "describe",
            "timeout_s": timeout_s,
            "attempts": None,
        }


# 5. UNAVAILABLE is tried again; nothing else is.


@pytest.mark.parametrize("max_attempts", [1, 3, 5])
@pytest.mark.parametrize("failures", range(7))
@BOTH
def test_unavailable_is_tried_again_so_often(
    kind: type[Any], failures: int, max_attempts: int
) -> None:
    quick = Options(max_attempts=max_attempts, first_backoff_s=0.02, max_backoff_s=0.05)
    with Faulty(before=fails(failures)) as server, opened(kind, server.target, quick) as client:
        if failures < max_attempts:
            assert client.describe().fingerprint == "v1"
            assert len(server.asked) == failures + 1
            return
        with pytest.raises(ServerUnavailableError) as caught:
            client.describe()
    assert len(server.asked) == max_attempts
    assert facts(caught.value) == {
        "target": server.target,
        "model": "default",
        "version": None,
        "signature": "describe",
        "timeout_s": 10.0,
        "attempts": max_attempts,
    }
    text = str(caught.value)
    assert (f"UNAVAILABLE after {max_attempts} attempts from" in text) == (max_attempts > 1)
    assert ": busy. Start one with" in text


@pytest.mark.parametrize(
    "code", [c for c in grpc.StatusCode if c not in (grpc.StatusCode.OK, UNAVAILABLE)]
)
@BOTH
def test_nothing_else_is_tried_again(kind: type[Any], code: grpc.StatusCode) -> None:
    broken = aborts(code, "no.", signature="describe")
    with Faulty(before=broken) as server, opened(kind, server.target) as client:
        with pytest.raises(KerasMrlError) as caught:
            client.describe()
        time.sleep(0.15)  # the first wait is 0.12 s at most
        assert len(server.asked) == 1
    assert caught.value.attempts is None


@BOTH
def test_the_waits_are_those_promised(kind: type[Any]) -> None:
    waiting = Options(first_backoff_s=0.2, max_backoff_s=0.9)
    with Faulty(before=fails(4)) as server, opened(kind, server.target, waiting) as client:
        client.describe()
        waits = [after.at - before.at for before, after in pairwise(server.asked)]
    print([round(wait, 3) for wait in waits])
    for wait, promised_s in zip(waits, (0.2, 0.4, 0.8, 0.9), strict=True):
        assert 0.8 * promised_s <= wait + 0.01  # what the network took of the wait before it
        assert wait < 1.2 * promised_s + 0.06  # a machine busy elsewhere


@BOTH
def test_attempts_share_one_timeout(kind: type[Any]) -> None:
    slow = fails(100, slow_s=0.3)
    short = Options(timeout_s=1.0, first_backoff_s=0.01)
    with Faulty(before=slow) as server, opened(kind, server.target, short) as client:
        start = time.monotonic()
        with pytest.raises((DeadlineError, ServerUnavailableError)):
            client.describe()
        took_s = time.monotonic() - start
        assert 0.9 < took_s < 1.1
        assert 2 <= len(server.asked) <= 4


@BOTH
def test_all_calls_of_an_answer_share_one_timeout(kind: type[Any]) -> None:
    """What the first calls took, the last has no more."""
    takes_s = {"features": 0.8, "head_4": 1.5}  # each by itself in time
    with (
        Faulty(before=lambda asked, _: time.sleep(takes_s.get(asked.signature, 0.0))) as server,
        opened(kind, server.target, Options(timeout_s=2.0)) as client,
    ):
        start = time.monotonic()
        with pytest.raises(DeadlineError) as caught:
            client.classify_adaptive(rows(2), POLICY)
        assert 1.9 < time.monotonic() - start < 2.1
        asked = [asked.signature for asked in server.asked]
        assert asked == ["describe", "features", "head_2", "head_4"]
    assert facts(caught.value) == {
        "target": server.target,
        "model": "default",
        "version": 1,
        "signature": "head_4",
        "timeout_s": 2.0,
        "attempts": None,
    }


# 6. Every refusal becomes its own error, which knows the call.


REFUSALS = [
    (grpc.StatusCode.DEADLINE_EXCEEDED, "Timed out waiting for notification", DeadlineError),
    (grpc.StatusCode.UNAUTHENTICATED, "no token", AccessDeniedError),
    (grpc.StatusCode.PERMISSION_DENIED, "not yours", AccessDeniedError),
    (grpc.StatusCode.INTERNAL, "broken", ServerError),
    (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "Run() timeout exceeded while waiting in batching queue",
        ServerError,
    ),
    (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "SERVER: Received message larger than max (5000000 vs. 4194304)",
        MessageTooLargeError,
    ),
    (
        grpc.StatusCode.INVALID_ARGUMENT,
        "Task size 33 is larger than maximum input batch size 32",
        InvalidInputError,
    ),
]


@pytest.mark.parametrize(("code", "text", "leaf"), REFUSALS)
@BOTH
def test_a_refusal_is_its_own_error(
    kind: type[Any], code: grpc.StatusCode, text: str, leaf: type[KerasMrlError]
) -> None:
    with (
        Faulty(before=aborts(code, text)) as server,
        opened(kind, server.target, Options(timeout_s=8.0)) as client,
        pytest.raises(KerasMrlError) as caught,
    ):
        client.embed(rows(33), 2)
    assert type(caught.value) is leaf
    assert f"{code.name} from {server.target} " in str(caught.value)
    assert f": {text}. " in str(caught.value)
    assert facts(caught.value) == {
        "target": server.target,
        "model": "default",
        "version": None,
        "signature": "embed_2",
        "timeout_s": 8.0,
        "attempts": None,
    }
    if leaf is InvalidInputError:
        assert str(caught.value).endswith(" Set Options(max_batch_size=32).")


@BOTH
def test_its_remedy_cures_a_batch_too_large(kind: type[Any]) -> None:
    def batching(asked: Asked, context: grpc.ServicerContext) -> None:
        if asked.count > 32:
            text = f"Task size {asked.count} is larger than maximum input batch size 32"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)

    with Faulty(before=batching) as server:
        with opened(kind, server.target, Options(max_batch_size=32)) as client:
            assert client.embed(rows(100), 2)[:, 0].tolist() == list(range(1, 101))
        with opened(kind, server.target) as client, pytest.raises(InvalidInputError):
            client.embed(rows(33), 2)


@BOTH
def test_an_answer_larger_than_the_limit_is_refused(kind: type[Any]) -> None:
    def verbose(call: Any) -> Any:
        answer = echo(1)(call)
        if call.signature == "embed_2":
            return {**answer, "surplus": np.zeros((len(call.inputs["x"]), 1000), np.float32)}
        return answer

    limit = Options(max_message_bytes=2048)
    with Faulty({1: verbose}) as server, opened(kind, server.target, limit) as client:
        with pytest.raises(MessageTooLargeError) as caught:
            client.embed(rows(1), 2)
        assert len(server.sent("embed_2")) == 1
    assert " RESOURCE_EXHAUSTED from " in str(caught.value)
    assert "larger than max (" in str(caught.value)
    assert "vs. 2048)" in str(caught.value)
    assert facts(caught.value) == {
        "target": server.target,
        "model": "default",
        "version": None,
        "signature": "embed_2",
        "timeout_s": 10.0,
        "attempts": None,
    }


def test_a_model_that_nobody_has() -> None:
    with Faulty() as server, Client(server.target, "owl") as client:
        with pytest.raises(ModelNotFoundError) as caught:
            client.embed(rows(1), 2)
    assert type(caught.value) is ModelNotFoundError
    assert caught.value.model == "owl"
    assert "Latest(owl)" in str(caught.value)


@BOTH
def test_a_version_that_went_twice(kind: type[Any]) -> None:
    """Each answer's second call finds its version gone."""
    with Faulty() as server, opened(kind, server.target) as client:

        def swap(asked: Asked, _: grpc.ServicerContext) -> None:
            if asked.signature == "head_2":
                server.versions = {(asked.version or 0) + 1: echo((asked.version or 0) + 1)}

        server.before = swap
        with pytest.raises(VersionChangedError) as caught:
            client.classify_adaptive(rows(2), POLICY)
        assert [a.version for a in server.sent("head_2")] == [1, 2]
        assert facts(caught.value) == {
            "target": server.target,
            "model": "default",
            "version": 2,
            "signature": "head_2",
            "timeout_s": 10.0,
            "attempts": None,
        }
        server.before = lambda *_: None
        assert client.classify_adaptive(rows(2), POLICY).class_ids.tolist() == [[33], [33]]


@BOTH
def test_a_signature_the_model_says_it_has_and_has_not(kind: type[Any]) -> None:
    def without(call: Any) -> Any:
        if call.signature == "embed_4":
            raise KeyError(call.signature)
        return echo(1)(call)

    with Faulty({1: without}) as server, opened(kind, server.target) as client:
        with pytest.raises(SignatureNotFoundError) as caught:
            client.embed(rows(1), 4)
    assert facts(caught.value) == {
        "target": server.target,
        "model": "default",
        "version": None,
        "signature": "embed_4",
        "timeout_s": 10.0,
        "attempts": None,
    }
    assert 'Serving signature key "embed_4" not found' in str(caught.value)


# 7. Rows split into parts, some of which fail.

PARTS = Options(max_batch_size=5, max_in_flight=3, max_attempts=1)  # 4 parts of 20 rows, 1 of 3


@BOTH
def test_only_the_part_that_failed_is_sent_again(kind: type[Any]) -> None:
    lost = threading.Event()

    def lose_one(asked: Asked, context: grpc.ServicerContext) -> None:
        if asked.first == 21 and not lost.is_set():
            time.sleep(0.2)  # the others are under way or answered by now
            lost.set()
            context.abort(UNAVAILABLE, "busy")

    with Faulty(before=lose_one) as server, opened(kind, server.target, PARTS) as client:
        embedding = client.embed(rows(23), 2)
        assert embedding[:, 0].tolist() == list(range(1, 24))
        sent = [asked.first for asked in server.sent("embed_2")]
        assert sorted(sent) == [1, 6, 11, 16, 21, 21]
        versions = {asked.first: asked.version for asked in server.sent("embed_2")}
        assert versions == {1: None, 6: 1, 11: 1, 16: 1, 21: 1}


@BOTH
def test_what_was_answered_comes_with_the_error(kind: type[Any]) -> None:
    def lose_one(asked: Asked, context: grpc.ServicerContext) -> None:
        if asked.first == 11:
            time.sleep(0.2)
            context.abort(UNAVAILABLE, "busy")

    with Faulty(before=lose_one) as server, opened(kind, server.target, PARTS) as client:
        with pytest.raises(ServerUnavailableError) as caught:
            client.embed(rows(23), 2)
        sent = [asked.first for asked in server.sent("embed_2")]
        assert sorted(sent) == [1, 6, 11, 11, 16, 21]
    partial = caught.value.partial
    assert partial is not None
    answered = [*range(10), *range(15, 23)]
    assert partial.rows.tolist() == answered
    np.testing.assert_array_equal(np.asarray(partial.answer), [[row + 1, 1] for row in answered])
    assert facts(caught.value) | {"attempts": None} == {
        "target": server.target,
        "model": "default",
        "version": 1,
        "signature": "embed_2",
        "timeout_s": 10.0,
        "attempts": None,
    }


@BOTH
def test_a_part_refused_for_what_it_is_is_not_sent_again(kind: type[Any]) -> None:
    def refuse_one(asked: Asked, context: grpc.ServicerContext) -> None:
        if asked.first == 11:
            time.sleep(0.2)
            context.abort(grpc.StatusCode.INTERNAL, "broken")

    with Faulty(before=refuse_one) as server, opened(kind, server.target, PARTS) as client:
        with pytest.raises(ServerError) as caught:
            client.embed(rows(23), 2)
        assert [asked.first for asked in server.sent("embed_2")].count(11) == 1
    assert caught.value.partial is not None
    assert caught.value.partial.rows.tolist() == [*range(10), *range(15, 23)]


@pytest.mark.parametrize("most", [1, 2, 4])
@BOTH
def test_no_more_calls_are_under_way_than_may_be(kind: type[Any], most: int) -> None:
    def work(asked: Asked, _: grpc.ServicerContext) -> None:
        time.sleep(0.03 * (1 + asked.first % 3))  # answered in another order than asked

    options = Options(max_batch_size=2, max_in_flight=most)
    with Faulty(before=work) as server, opened(kind, server.target, options) as client:
        assert client.embed(rows(31), 2)[:, 0].tolist() == list(range(1, 32))
        assert server.most_at_once == most
        assert len(server.sent("embed_2")) == 16


# 9. Forks.

FORK = """
import multiprocessing, os, sys
import numpy as np
from keras_mrl_serving import Client, Options
from tests.helpers.faulty_server import rows

client = Client(sys.argv[1], options=Options(timeout_s=5.0))
x = rows(3)
expected = client.embed(x, 2)

def ask(_):
    return sum(np.array_equal(client.embed(x, 2), expected) for _ in range(20))

def lone_fork():
    child = os.fork()
    right = ask(0)
    if not child:
        os._exit(right)
    return right, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if __name__ == "__main__":
    for _ in range(int(sys.argv[2])):
        assert lone_fork() == (20, 20)
        with multiprocessing.get_context("fork").Pool(4) as pool:
            children = pool.map_async(ask, range(4), chunksize=1)
            assert ask(0) == 20  # while they do
            assert children.get(30) == [20] * 4
"""


@pytest.mark.soak
def test_a_client_works_on_both_sides_of_a_fork() -> None:
    times = "50" if SOAK else "5"
    with Process() as server:
        done = subprocess.run(
            [sys.executable, "-c", FORK, server.target, times],
            cwd=ROOT,
            check=False,
            timeout=120,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr


# 10. A thousand calls on one event loop.


def threads() -> tuple[int, int]:
    """Threads of Python, and all of this process, gRPC's own with them."""
    return threading.active_count(), len(os.listdir("/proc/self/task"))


ASK_A_THOUSAND = """
import asyncio, sys
import numpy as np
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.options import Options
from tests.helpers.faulty_server import rows
from tests.serving.test_faults import threads

async def main(target):
    async with AsyncClient(target, options=Options(timeout_s=60.0)) as client:
        await client.classify_adaptive(rows(1))
        before = most = threads()
        done = asyncio.Event()
        async def watch():
            nonlocal most
            while not done.is_set():
                most = tuple(map(max, most, threads()))
                await asyncio.sleep(0.002)
        watching = asyncio.create_task(watch())
        asked = [client.classify_adaptive(rows(2, start=n)) for n in range(1, 1001)]
        answers = await asyncio.gather(*asked)
        done.set()
        await watching
    for n, answer in enumerate(answers, start=1):
        assert answer.confidence.tolist() == [n, n + 1], (n, answer.confidence)
        assert answer.class_ids.tolist() == [[11], [11]]
        assert answer.dim.tolist() == ([2, 4] if n % 2 else [4, 2])
    print(*before, *most)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_thousand_calls_on_one_loop_add_no_thread() -> None:
    with Faulty() as server:  # asked from a process that has no other thread
        done = subprocess.run(
            [sys.executable, "-c", ASK_A_THOUSAND, server.target],
            cwd=ROOT,
            check=False,
            timeout=120,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert len(server.sent("classify_adaptive")) == 1001
    python_before, all_before, python_most, all_most = map(int, done.stdout.split())
    print(f"threads of Python {python_before} -> {python_most}, all {all_before} -> {all_most}")
    assert python_most == python_before
    # gRPC's own pool, as large as the machine has cores, may grow to its size; never per call.
    assert all_most <= all_before + 2 * (os.cpu_count() or 1)


def test_a_thousand_calls_wait_side_by_side() -> None:
    """The one above can fail: they are under way at once, not one after another."""
    with Faulty(before=lambda *_: time.sleep(0.1), workers=64) as server:

        async def main() -> None:
            async with AsyncClient(server.target) as client:
                await client.describe()
                await asyncio.gather(*(client.classify_adaptive(rows(1)) for _ in range(200)))

        asyncio.run(main())
        assert server.most_at_once > 32
