"""Servers that fail under a client, over real sockets: retries, deadlines, deaths, forks, loops."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.client import Client
from keras_mrl_serving.errors import (
    NO_SERVER_REMEDY,
    AccessDeniedError,
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    ModelNotFoundError,
    ServerError,
    ServerUnavailableError,
    error_class,
)
from keras_mrl_serving.options import Options, Tls
from tests.helpers.faulty_server import (
    ROOT,
    Before,
    FaultyServer,
    Request,
    ServerProcess,
    connect_to_all,
    open_client,
    rows,
)
from tests.helpers.waiting import wait_until

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def facts(error: KerasMrlError) -> dict[str, object]:
    """What an error knows of the call that failed, without what every test here has in common."""
    assert not isinstance(error, grpc.RpcError)
    assert error.model == "default"
    names = ("target", "version", "signature", "timeout_s", "attempts")
    return {name: getattr(error, name) for name in names}


# Retries and deadlines: UNAVAILABLE is tried again, CANCELLED by the server too, and nothing else.


def refuse_first(times: int, signature: str = "describe") -> Before:
    """Refuse the first so many requests as UNAVAILABLE."""
    numbers = iter(range(times))

    def before(request: Request, context: grpc.ServicerContext) -> None:
        if request.signature == signature and next(numbers, None) is not None:
            context.abort(UNAVAILABLE, "busy")

    return before


def abort(code: grpc.StatusCode, text: str) -> Before:
    return lambda _, context: context.abort(code, text)


@pytest.mark.parametrize(
    ("failures", "max_attempts"), [(0, 1), (1, 1), (2, 3), (3, 3), (4, 5), (5, 5), (9, 5)]
)
@BOTH
def test_unavailable_is_tried_again_so_often(
    kind: type[Any], failures: int, max_attempts: int
) -> None:
    quick = Options(max_attempts=max_attempts, first_backoff_s=0.02, max_backoff_s=0.05)
    with (
        FaultyServer(before=refuse_first(failures)) as server,
        open_client(kind, server.target, quick) as client,
    ):
        if failures < max_attempts:
            assert client.describe().dims == (2, 4)
            assert len(server.requests) == failures + 1
            return
        with pytest.raises(ServerUnavailableError) as caught:
            client.describe()
    assert len(server.requests) == max_attempts
    assert facts(caught.value) == {
        "target": server.target,
        "version": None,
        "signature": "describe",
        "timeout_s": 10.0,
        "attempts": max_attempts,
    }
    text = str(caught.value)
    assert (f"UNAVAILABLE after {max_attempts} attempts from" in text) == (max_attempts > 1)
    assert f": busy. {NO_SERVER_REMEDY}" in text


def refuse_with(codes: list[grpc.StatusCode]) -> Before:
    """Refuse the first requests, each with its status."""
    left = iter(codes)

    def before(_: Request, context: grpc.ServicerContext) -> None:
        if (code := next(left, None)) is not None:
            context.abort(code, "Servable not found for request: Latest(default)")

    return before


@BOTH
def test_a_server_that_starts_and_a_model_that_loads_are_waited_for(kind: type[Any]) -> None:
    starting = [UNAVAILABLE] * 5 + [grpc.StatusCode.NOT_FOUND] * 3
    quick = Options(max_attempts=2, first_backoff_s=0.01, max_backoff_s=0.02)
    with (
        FaultyServer(before=refuse_with(starting)) as server,
        open_client(kind, server.target, quick) as client,
    ):
        client.wait_until_ready(600)
        assert len(server.requests) == len(starting) + 1
        assert client.embed(rows(3), 2).shape == (3, 2)


@BOTH
def test_waiting_ends_with_the_last_error(kind: type[Any]) -> None:
    quick = Options(max_attempts=2, first_backoff_s=0.01, max_backoff_s=0.02)
    with (
        FaultyServer(before=abort(UNAVAILABLE, "busy")) as server,
        open_client(kind, server.target, quick) as client,
    ):
        with pytest.raises(ServerUnavailableError, match="wait_until_ready"):
            client.wait_until_ready(0)
        assert len(server.requests) == 2


@BOTH
def test_nothing_else_is_waited_for(kind: type[Any]) -> None:
    for code, error in (("PERMISSION_DENIED", AccessDeniedError), ("INTERNAL", ServerError)):
        before = abort(grpc.StatusCode[code], "no")
        with FaultyServer(before=before) as server, open_client(kind, server.target) as client:
            with pytest.raises(error):
                client.wait_until_ready(600)
            assert len(server.requests) == 1
    tls = Options(tls=Tls())
    with FaultyServer() as clear, open_client(kind, clear.target, tls) as client:
        with pytest.raises(ServerUnavailableError, match="No TLS is spoken at this port"):
            client.wait_until_ready(600)


@BOTH
def test_a_model_of_another_exporter_is_ready_without_a_manifest(kind: type[Any]) -> None:
    before = abort(grpc.StatusCode.FAILED_PRECONDITION, 'Serving signature key "describe"')
    with FaultyServer(before=before) as server, open_client(kind, server.target) as client:
        client.wait_until_ready(0)


@BOTH
def test_a_call_that_a_stopping_server_cancels_is_tried_again(kind: type[Any]) -> None:
    numbers = iter(range(2))

    def before(_: Request, context: grpc.ServicerContext) -> None:
        if next(numbers, None) is not None:
            context.abort(grpc.StatusCode.CANCELLED, "")

    quick = Options(first_backoff_s=0.02)
    with FaultyServer(before=before) as server, open_client(kind, server.target, quick) as client:
        assert client.describe().dims == (2, 4)
        assert len(server.requests) == 3
    once = Options(max_attempts=1)
    cancel = abort(grpc.StatusCode.CANCELLED, "by the server")
    with FaultyServer(before=cancel) as server, open_client(kind, server.target, once) as client:
        with pytest.raises(ServerUnavailableError) as caught:
            client.describe()
    assert str(caught.value) == (
        "A TensorFlow Serving server must answer at the target. Received: CANCELLED from "
        f"{server.target} for model 'default', signature 'describe', timeout 10 s: by the server. "
        "Once a server runs there again, calling again goes on."
    )


@pytest.mark.parametrize(
    "code",
    [
        code
        for code in grpc.StatusCode
        if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, UNAVAILABLE)
    ],
)
@BOTH
def test_any_other_status_is_its_own_error_at_once(kind: type[Any], code: grpc.StatusCode) -> None:
    with (
        FaultyServer(before=abort(code, "no, not now.")) as server,
        open_client(kind, server.target, Options(timeout_s=20.0)) as client,
    ):
        with pytest.raises(KerasMrlError) as caught:
            client.describe()
        assert len(server.requests) == 1
    assert type(caught.value) is error_class(code.name, "")
    call = f"{code.name} from {server.target} for model 'default', signature 'describe'"
    assert f" Received: {call}, timeout 20 s: no, not now. " in str(caught.value)
    assert facts(caught.value) == {
        "target": server.target,
        "version": None,
        "signature": "describe",
        "timeout_s": 20.0,
        "attempts": 1,
    }


@BOTH
def test_waits_grow_and_are_no_shorter_than_promised(kind: type[Any]) -> None:
    options = Options(first_backoff_s=0.2, max_backoff_s=0.5)
    with (
        FaultyServer(before=refuse_first(3)) as server,
        open_client(kind, server.target, options) as client,
    ):
        client.describe()
    waits_s = [after.at - before.at for before, after in pairwise(server.requests)]
    for wait_s, promised_s in zip(waits_s, (0.2, 0.4, 0.5), strict=True):
        assert wait_s + 0.01 >= 0.8 * promised_s


@BOTH
def test_attempts_share_one_deadline(kind: type[Any]) -> None:
    options = Options(timeout_s=0.5, first_backoff_s=0.3)  # five attempts would take 1.7 s or more
    with (
        FaultyServer(before=refuse_first(100)) as server,
        open_client(kind, server.target, options) as client,
        pytest.raises(ServerUnavailableError) as caught,  # at once: no time is left to wait
    ):
        client.describe()
    assert 1 <= len(server.requests) < 5
    assert caught.value.attempts == len(server.requests)


@contextmanager
def silent_port() -> Iterator[str]:
    """A port that takes connections, and neither reads nor writes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def accept() -> None:
            try:
                while True:
                    connections.append(listener.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in connections:
                connection.close()


@contextmanager
def full_port() -> Iterator[str]:
    """A port whose queue of connections is full: it does not even answer TCP's handshake."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for each in waiting:
                each.close()


@pytest.mark.parametrize("hole", [silent_port, full_port])
@BOTH
def test_a_black_hole_is_left_at_the_deadline(kind: type[Any], hole: Callable[[], Any]) -> None:
    with hole() as target, open_client(kind, target, Options(timeout_s=0.5)) as client:
        with pytest.raises(DeadlineError) as caught:
            client.embed(rows(3), 2)
    assert isinstance(caught.value, TimeoutError)
    assert facts(caught.value) == {
        "target": target,
        "version": None,
        "signature": "describe",
        "timeout_s": 0.5,
        "attempts": 1,
    }


@BOTH
def test_its_remedy_cures_a_batch_too_large(kind: type[Any]) -> None:
    def batching(request: Request, context: grpc.ServicerContext) -> None:
        if request.count > 32:
            text = f"Task size {request.count} is larger than maximum input batch size 32"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)

    with FaultyServer(before=batching) as server:
        with open_client(kind, server.target) as client:
            remedy = r" Set Options\(max_batch_size=32\)\.$"
            with pytest.raises(InvalidInputError, match=remedy):
                client.embed(rows(33), 2)
        with open_client(kind, server.target, Options(max_batch_size=32)) as client:
            assert client.embed(rows(100), 2)[:, 0].tolist() == list(range(1, 101))


def test_a_model_that_the_server_lacks() -> None:
    with FaultyServer() as server, Client(server.target, "owl") as client:
        with pytest.raises(ModelNotFoundError, match=r"Latest\(owl\)") as caught:
            client.embed(rows(1), 2)
    assert type(caught.value) is ModelNotFoundError
    assert caught.value.model == "owl"


# Servers that die.


@contextmanager
def embedding(client: Any) -> Iterator[Callable[[], Any]]:
    """A call under way in a thread of its own; the function waits for its answer."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(client.embed, rows(3), 2).result


@BOTH
def test_a_call_outlives_its_server(kind: type[Any]) -> None:
    patient = Options(first_backoff_s=2.0, max_backoff_s=16.0, timeout_s=60.0)
    with ServerProcess(stuck=1) as first, open_client(kind, first.target, patient) as client:
        with embedding(client) as answer:
            assert first.next_line() == "embed_2"
            first.kill()
            with ServerProcess(first.port):
                np.testing.assert_array_equal(answer()[:, 0], [1, 2, 3])
                np.testing.assert_array_equal(client.embed(rows(3), 2)[:, 0], [1, 2, 3])


@BOTH
def test_a_call_that_is_sent_once_says_that_its_server_died(kind: type[Any]) -> None:
    once = Options(max_attempts=1, timeout_s=60.0)

    def works() -> bool:
        try:
            return bool((client.embed(rows(3), 2)[:, 0] == [1, 2, 3]).all())
        except ServerUnavailableError:
            return False

    with ServerProcess(stuck=1) as first, open_client(kind, first.target, once) as client:
        with embedding(client) as answer:
            assert first.next_line() == "embed_2"
            first.kill()
            with pytest.raises(ServerUnavailableError) as caught:
                answer()
        assert facts(caught.value) == {
            "target": first.target,
            "version": None,
            "signature": "embed_2",
            "timeout_s": 60.0,
            "attempts": 1,
        }
        assert not works()  # nobody is there
        with ServerProcess(first.port):
            wait_until(works)


def ask_while_one_is_killed(options: Options) -> None:
    """Ask two replicas by eight threads; kill one that has a call, then wait for 50 answers."""
    done = threading.Event()
    answered = [0] * 8

    def ask(client: Client, number: int) -> None:
        x = rows(3, start=10 * number + 1)
        while not done.is_set():
            np.testing.assert_array_equal(client.embed(x, 2)[:, 0], x[:, 0])
            answered[number] += 1

    with (
        ServerProcess() as one,
        ServerProcess(stuck=1) as other,
        Client([one.target, other.target], options=options) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        threads = [pool.submit(ask, client, number) for number in range(8)]
        try:
            assert other.next_line() == "embed_2"
            other.kill()
            due = sum(answered) + 50
            wait_until(lambda: sum(answered) >= due or any(thread.done() for thread in threads))
        finally:
            done.set()
        for thread in threads:
            thread.result()


def test_no_call_fails_when_one_of_two_replicas_is_killed() -> None:
    ask_while_one_is_killed(Options(timeout_s=60.0))


def test_a_client_that_sends_each_call_once_would_have_failed() -> None:
    """The test above can fail: without retries, killing a replica is seen."""
    with pytest.raises(ServerUnavailableError):
        ask_while_one_is_killed(Options(timeout_s=60.0, max_attempts=1))


def test_calls_under_way_outlive_the_replica_that_is_drained() -> None:
    release = threading.Event()
    with FaultyServer() as one, FaultyServer() as other:

        def arrived() -> list[int]:
            return [len(server.requests_of("embed_2")) for server in (one, other)]

        with Client([one.target, other.target]) as client, ThreadPoolExecutor(8) as pool:
            connect_to_all(client, one, other)
            one.before = other.before = lambda *_: release.wait()
            answers = [pool.submit(client.embed, rows(2, start=n), 2) for n in range(8)]
            try:
                wait_until(lambda: sum(arrived()) == 8)
                stopped = other.stop(60.0)
            finally:
                release.set()
            for n, answer in enumerate(answers):
                assert answer.result()[:, 0].tolist() == [n, n + 1]
            assert stopped.wait(60)
            for _ in range(5):
                assert client.embed(rows(2), 2).shape == (2, 2)
        assert arrived() == [9, 4]


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
        with open_client(kind, f"127.0.0.1:{port}", patient) as client:
            while not done.is_set():
                answers.append(client.embed(rows(3), 2))

    try:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask)
            try:
                wait_until(lambda: len(answers) >= 20 or asking.done())
                process.kill()
                process.communicate()
                before = len(answers)
                process, _ = start(port)
                wait_until(lambda: len(answers) >= before + 20 or asking.done())
            finally:
                done.set()
            asking.result()
    finally:
        process.kill()
        process.communicate()
    assert len(answers) >= before + 20
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


# Clients that are closed, forked, or used from two loops.


@BOTH
def test_a_client_closes_twice_and_then_asks_no_more(kind: type[Any], refuses: Refuses) -> None:
    with FaultyServer() as server:
        text = (
            "A client asks until it is closed. "
            f"Received: a call to {server.target} after close(). Make another Client."
        )
        for calls_before in (1, 0):
            with open_client(kind, server.target) as client:
                for _ in range(calls_before):
                    assert client.embed(rows(3), 2).shape == (3, 2)
                client.close()
                client.close()
                with refuses(KerasMrlError, text):
                    client.embed(rows(3), 2)


def test_a_client_closed_in_mid_call_says_so() -> None:
    release = threading.Event()
    with FaultyServer(before=lambda *_: release.wait()) as server:
        try:
            client = Client(server.target)
            with embedding(client) as answer:
                wait_until(lambda: server.requests)
                client.close()
                with pytest.raises(KerasMrlError, match=f"a call to {server.target} after close"):
                    answer()

            async def main() -> None:
                client = AsyncClient(server.target)
                task = asyncio.create_task(client.embed(rows(3), 2))
                await asyncio.to_thread(wait_until, lambda: len(server.requests) == 2)
                await client.close()
                with pytest.raises(KerasMrlError, match=f"a call to {server.target} after close"):
                    await task

            asyncio.run(main())
        finally:
            release.set()


def test_an_async_client_of_another_loop_says_so() -> None:
    with FaultyServer() as server:
        client = AsyncClient(server.target)

        async def ask() -> Any:
            return await client.embed(rows(3), 2)

        assert asyncio.run(ask()).shape == (3, 2)
        with pytest.raises(KerasMrlError, match="Make one client per loop"):
            asyncio.run(ask())
        asyncio.run(client.close())


FORK = """
import asyncio, multiprocessing, os, sys
import numpy as np
from keras_mrl_serving import AsyncClient, Client, KerasMrlError, Options
from tests.helpers.faulty_server import rows

client = Client(sys.argv[1], options=Options(timeout_s=30.0))
waiting = AsyncClient(sys.argv[1])
x = rows(3)
expected = client.embed(x, 2)

def ask(_):
    return sum(np.array_equal(client.embed(x, 2), expected) for _ in range(20))

def lone_fork():
    child = os.fork()
    right = ask(0)
    if not child:
        try:
            asyncio.run(waiting.describe())
        except KerasMrlError as error:
            right += "a process forked from it" in str(error)
        os._exit(right)
    return right, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if __name__ == "__main__":
    for _ in range(int(sys.argv[2])):
        assert lone_fork() == (20, 21)
        with multiprocessing.get_context("fork").Pool(4) as pool:
            children = pool.map_async(ask, range(4), chunksize=1)
            assert ask(0) == 20  # while they do
            assert children.get(60) == [20] * 4
"""


def run_script(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        check=False,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.soak
def test_a_client_works_on_both_sides_of_a_fork() -> None:
    times = 50 if SOAK else 2
    with FaultyServer(workers=8) as server:
        run_script(FORK, server.target, str(times))
    connections = {request.peer for request in server.requests}
    assert len(connections) > times  # each child has its own, and garbles nobody's


# Many calls on one event loop.

ASK_A_THOUSAND = """
import asyncio, os, sys, threading
import numpy as np
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.options import Options
from tests.helpers.faulty_server import rows

def threads():
    return threading.active_count(), len(os.listdir("/proc/self/task"))

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
        tasks = [client.classify_adaptive(rows(2, start=n)) for n in range(1, 1001)]
        answers = await asyncio.gather(*tasks)
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
    with FaultyServer() as server:  # asked from a process that has no other thread
        output = run_script(ASK_A_THOUSAND, server.target)
        assert len(server.requests_of("classify_adaptive")) == 1001
    python_before, all_before, python_most, all_most = map(int, output.split())
    assert python_most == python_before
    # gRPC's own pool, as large as the machine has cores, may grow to its size; never per call.
    assert all_most <= all_before + 2 * (os.cpu_count() or 1)


def test_calls_of_one_loop_wait_side_by_side() -> None:
    """The test above can fail: its calls are under way at once, not one after another."""
    with FaultyServer(workers=64) as server:

        async def main() -> None:
            async with AsyncClient(server.target) as client:
                await client.describe()
                server.before = lambda *_: wait_until(lambda: server.most_at_once > 32)
                await asyncio.gather(*(client.classify_adaptive(rows(1)) for _ in range(200)))

        asyncio.run(main())


def test_the_channels_of_one_loop_do_not_wait_for_each_other() -> None:
    release = threading.Event()
    with FaultyServer(before=lambda *_: release.wait()) as one, FaultyServer() as other:

        async def main() -> None:
            async with AsyncClient(one.target) as slow, AsyncClient(other.target) as quick:
                waiting = asyncio.create_task(slow.describe())
                for _ in range(5):
                    await quick.describe()
                assert not waiting.done()
                release.set()
                await waiting

        try:
            asyncio.run(main())
        finally:
            release.set()
