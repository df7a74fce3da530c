"""Sync = async = in memory = the development server, on everything a client can be asked."""

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Call
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import (
    InvalidInputError,
    KerasMrlError,
    NoIndexError,
    NoOtherTowerError,
    SignatureNotFoundError,
    UnknownDimError,
)
from keras_mrl_serving.flows import Arrays
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.options import Options
from keras_mrl_serving.testing import InMemoryServer
from tests.helpers.waiting import wait_until

Model = Callable[[Call], Arrays]

ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
POLICY = CascadePolicy((Stage(2, 0.6), Stage(4, 0.5, temperature=0.5), Stage(8, None)))
GALLERY = ExactIndex.build(
    np.random.default_rng(1).normal(size=(9, 8)), FunnelSchedule((2, 8), (5,), 3)
)
SPLIT = Options(max_batch_size=7, max_in_flight=3)

# Asked of both clients; the answer of an AsyncClient is a coroutine.
FLOWS: dict[str, Callable[[Any], Any]] = {
    "describe": lambda client: client.describe(),
    "status": lambda client: client.status(),
    "embed": lambda client: client.embed(ROWS, 4),
    "embed one row": lambda client: client.embed(ROWS[:1], dim=8),
    "embed nothing": lambda client: client.embed(ROWS[:0], 2),
    "classify": lambda client: client.classify(ROWS, 2),
    "adaptive": lambda client: client.classify_adaptive(ROWS),
    "adaptive by a policy": lambda client: client.classify_adaptive(ROWS, POLICY),
    "audited": lambda client: client.classify_adaptive(ROWS, audit_rate=0.5, audit_seed=1),
    "audited by a policy": lambda client: client.classify_adaptive(
        ROWS, POLICY, audit_rate=0.5, audit_seed=1
    ),
    "retrieve": lambda client: client.retrieve(ROWS, GALLERY),
}
SERVED_FLOWS = FLOWS | {  # a function has no signatures
    "signatures": lambda client: client.signatures(),
    "predict": lambda client: client.predict(ROWS, "features"),
    "predict some outputs": lambda client: client.predict(
        {"x": ROWS}, "classify_4", outputs=["confidence"]
    ),
}
REFUSED: dict[str, tuple[type[KerasMrlError], Callable[[Any], Any]]] = {
    "a dim": (UnknownDimError, lambda client: client.embed(ROWS, 3)),
    "rows": (InvalidInputError, lambda client: client.classify(ROWS[0], 2)),
    "no index": (NoIndexError, lambda client: client.search(ROWS)),
    "no gallery": (NoIndexError, lambda client: client.retrieve(ROWS)),
    "no other tower": (NoOtherTowerError, lambda client: client.embed(ROWS, 4, other_tower=True)),
}


@pytest.fixture(scope="module")
def target(saved: Mapping[str, Path]) -> Iterator[str]:
    from keras_mrl_serving.server import DevServer

    with DevServer(saved["classifier"], file_system_poll_wait_seconds=0) as target:
        yield target


@pytest.fixture(scope="module")
def server(toys: Mapping[str, Model], manifests: Mapping[str, Manifest]) -> InMemoryServer:
    return InMemoryServer(manifests["classifier"], toys["classifier"])


def awaited(target: Any, ask: Callable[[Any], Awaitable[Any]], options: Options) -> Any:
    async def main() -> Any:
        async with AsyncClient(target, options=options) as client:
            return await ask(client)

    return asyncio.run(main())


def assert_same(one: Any, other: Any, atol: float = 0.0) -> None:
    assert type(one) is type(other)
    if isinstance(one, np.ndarray) and one.dtype != object:
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)
    elif isinstance(one, np.ndarray):
        assert one.tolist() == other.tolist()
    elif isinstance(one, Mapping):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name], atol)
    elif is_dataclass(one) and not isinstance(one, Manifest):
        assert_same(vars(one), vars(other), atol)
    else:
        assert one == other


@pytest.mark.parametrize("options", [Options(), SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("name", SERVED_FLOWS)
def test_sync_is_async(target: str, name: str, options: Options) -> None:
    ask = SERVED_FLOWS[name]
    with Client(target, options=options) as client:
        assert_same(ask(client), awaited(target, ask, options))


@pytest.mark.parametrize("options", [Options(), SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_server_in_memory_is_the_development_server(
    target: str,
    toys: Mapping[str, Model],
    manifests: Mapping[str, Manifest],
    name: str,
    options: Options,
) -> None:
    memory = InMemoryServer(manifests["classifier"], toys["classifier"])
    answer = FLOWS[name](Client(memory, options=options))
    with Client(target, options=options) as client:
        assert_same(answer, FLOWS[name](client), atol=1e-5)
    assert_same(answer, awaited(memory, FLOWS[name], options))


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse_alike(server: InMemoryServer, name: str) -> None:
    kind, ask = REFUSED[name]
    with pytest.raises(kind) as sync:
        ask(Client(server))
    with pytest.raises(kind) as waited:
        ask_in_a_loop(server, ask)
    assert str(sync.value) == str(waited.value)


def ask_in_a_loop(server: InMemoryServer, ask: Callable[[Any], Any]) -> Any:
    async def main() -> Any:
        return await ask(AsyncClient(server))

    return asyncio.run(main())


def test_an_unknown_signature_is_refused_by_naming_the_others(target: str) -> None:
    with Client(target) as client, pytest.raises(SignatureNotFoundError) as caught:
        client.predict(ROWS, "embed_3")
    assert str(caught.value) == (
        "The model must have the signature. Received: signature='embed_3'. Choose one of "
        "classify_2, classify_4, classify_8, classify_adaptive, describe, embed_2, embed_4, "
        "embed_8, features, head_2, head_4, head_8."
    )


def embed_two(progress: Callable[[int, int], None], client: AsyncClient) -> Any:
    return client.embed(ROWS, 2, progress=progress)


def test_progress_counts_rows_in_both(server: InMemoryServer) -> None:
    def append_to(into: list[tuple[int, int]]) -> Callable[[int, int], None]:
        return lambda done, rows: into.append((done, rows))

    for options, calls in ((Options(), 1), (SPLIT, 6)):
        blocking: list[tuple[int, int]] = []
        Client(server, options=options).embed(ROWS, 2, progress=append_to(blocking))
        waited: list[tuple[int, int]] = []
        awaited(server, partial(embed_two, append_to(waited)), options)
        for seen in (blocking, waited):  # parts side by side end in any order
            assert {rows for _, rows in seen} == {40}
            done = [count for count, _ in seen]
            assert len(done) == calls
            assert done == sorted(done)
            assert done[-1] == 40


def test_a_client_of_another_batch_size_shares_what_the_first_knows(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest], tmp_path: Path
) -> None:
    server = InMemoryServer(manifests["classifier"], toys["classifier"])

    def calls() -> list[tuple[str, int]]:
        sizes = [(c.signature, len(next(iter(c.inputs.values())))) for c in server.calls]
        server.calls.clear()
        return sorted(sizes)

    client = Client(server)
    manifest = client.describe()
    other = client.with_batch_size(15)
    assert (other.options.max_batch_size, client.options.max_batch_size) == (15, 1000)
    embeddings = other.embed(ROWS, 2)
    written = other.embed_dataset(ROWS, 2, tmp_path / "E.npy", manifest=manifest)
    np.testing.assert_array_equal(embeddings, written)
    parts = [("embed_2", 10), ("embed_2", 15), ("embed_2", 15)]
    assert calls() == [("describe", 1), *sorted(2 * parts)]
    np.testing.assert_array_equal(client.embed(ROWS, 2), embeddings)
    assert calls() == [("embed_2", 40)]

    async def ask() -> Any:
        waited = AsyncClient(server)
        await waited.describe()
        return await waited.with_batch_size(15).embed(ROWS, 2)

    np.testing.assert_array_equal(asyncio.run(ask()), embeddings)
    assert calls() == [("describe", 1), *parts]


def test_a_progress_function_that_raises_is_heard(server: InMemoryServer) -> None:
    def refuse(done: int, rows: int) -> None:
        if done > 7:
            raise ZeroDivisionError(rows)

    with pytest.raises(ZeroDivisionError):
        Client(server, options=SPLIT).embed(ROWS, 2, progress=refuse)
    with pytest.raises(ZeroDivisionError):
        awaited(server, partial(embed_two, refuse), SPLIT)


class Blocking(InMemoryServer):
    """Holds every part after the first until it is released."""

    def __init__(self, manifest: Manifest, model: Model) -> None:
        super().__init__(manifest, model)
        self.begun = threading.Event()
        self.release = threading.Event()

    def send(self, envelope: Any) -> Any:
        if envelope.signature == "embed_2" and envelope.version is not None:
            self.begun.set()
            self.release.wait()
        return super().send(envelope)

    async def send_async(self, envelope: Any) -> Any:
        if envelope.signature == "embed_2" and envelope.version is not None:
            self.begun.set()
            await asyncio.Event().wait()
        return super().send(envelope)


@pytest.fixture
def blocking(toys: Mapping[str, Model], manifests: Mapping[str, Manifest]) -> Iterator[Blocking]:
    server = Blocking(manifests["classifier"], toys["classifier"])
    yield server
    server.release.set()


def test_an_interrupt_waits_for_no_call_under_way(blocking: Blocking) -> None:
    def interrupt() -> None:
        blocking.begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threads = set(threading.enumerate())
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        Client(blocking, options=SPLIT).embed(ROWS, 2)
    before = len(blocking.calls)
    assert not blocking.release.is_set()  # so nothing was waited for
    blocking.release.set()
    # Not joined: the interrupt may come before a thread has started, which then cannot be.
    wait_until(lambda: set(threading.enumerate()) <= threads)
    assert len(blocking.calls) - before <= SPLIT.max_in_flight  # those under way, and no other


def test_a_task_that_is_cancelled_stops_asking(blocking: Blocking) -> None:
    async def main() -> None:
        task = asyncio.create_task(AsyncClient(blocking, options=SPLIT).embed(ROWS, 2))
        await asyncio.to_thread(blocking.begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}  # nobody is left to ask
        assert [call.signature for call in blocking.calls] == ["describe", "embed_2"]

    asyncio.run(main())
