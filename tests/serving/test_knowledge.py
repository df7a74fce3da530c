"""An answer is of one model, even where two models bear one version number."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import AskManifest, AskSignatures, Call, Envelope, Reply
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import DESCRIBE, MODEL_ID
from keras_mrl_serving.errors import (
    EncoderMismatchError,
    InvalidInputError,
    ModelChangedError,
    ServerUnavailableError,
    VersionChangedError,
    call_error,
)
from keras_mrl_serving.flows import Arrays
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.knowledge import Identity, Knowledge
from keras_mrl_serving.options import Options
from keras_mrl_serving.testing import InMemoryServer
from tests.helpers.faulty_server import (
    POLICY,
    FaultyServer,
    Model,
    connect_to_all,
    echo,
    identified,
    manifest,
    open_client,
    rows,
)
from tests.helpers.waiting import wait_until

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
FUNNEL = FunnelSchedule((2, 4), (5,), k=3)
PARTS = Options(max_batch_size=2, max_in_flight=2)
# Models that are told apart by their answers, to be served under one number: see `echo`.
OLD, NEW, THIRD = (identified(echo(number), 100 + number) for number in (1, 2, 3))


def replace_after(server: FaultyServer, models_by_count: dict[int, Model]) -> None:
    """Serve another model as version 1 once so many requests have arrived."""

    def before(*_: object) -> None:
        model = models_by_count.get(len(server.requests) - 1)
        if model is not None:
            server.versions = {1: model}

    server.before = before


def makers(answer: Any) -> set[int]:
    """The models that made an answer: of the embeddings, or of the features and the classes."""
    if isinstance(answer, np.ndarray):
        return {int(number) for number in answer[:, 1]}
    return {int(digit) for class_id in answer.class_ids[:, 0] for digit in divmod(class_id, 10)}


def signatures_of(server: FaultyServer) -> list[str]:
    return [request.signature for request in server.requests]


# A server that is replaced.


@BOTH
def test_a_new_model_under_the_old_number_is_known_by_its_answer(kind: type[Any]) -> None:
    with FaultyServer({1: OLD}) as server, open_client(kind, server.target) as client:
        assert makers(client.embed(rows(3), 2)) == {1}
        server.versions = {1: NEW}
        for _ in range(2):
            assert makers(client.embed(rows(3), 2)) == {2}
        assert client.describe().fingerprint == "v2"
        assert signatures_of(server) == [
            *("describe", "embed_2"),
            *("embed_2", "describe", "embed_2", "describe"),
        ]


@BOTH
def test_an_index_of_the_old_model_refuses_the_new_one(kind: type[Any]) -> None:
    with FaultyServer({1: OLD}) as server, open_client(kind, server.target) as client:
        index = ExactIndex.build(rows(9), FUNNEL, encoder_fingerprint="v1")
        assert client.retrieve(rows(2), index).ids.shape == (2, 3)
        server.versions = {1: NEW}
        for _ in range(2):
            with pytest.raises(EncoderMismatchError, match=r"fingerprint 'v2', for an index built"):
                client.retrieve(rows(2), index)


@BOTH
def test_a_cascade_that_meets_a_new_model_starts_over(kind: type[Any]) -> None:
    with FaultyServer({1: OLD}) as server, open_client(kind, server.target) as client:
        replace_after(server, {2: NEW})
        answer = client.classify_adaptive(rows(4), POLICY)
        assert makers(answer) == {2}
        assert answer.dim.tolist() == [2, 4, 2, 4]
        assert signatures_of(server) == [
            *("describe", "features", "head_2"),  # which carries another id
            *("describe", "features", "head_2", "head_4"),
        ]


@BOTH
def test_a_cascade_that_meets_two_new_models_says_so(kind: type[Any]) -> None:
    with FaultyServer({1: OLD}) as server, open_client(kind, server.target) as client:
        replace_after(server, {2: NEW, 5: THIRD})
        with pytest.raises(VersionChangedError) as caught:
            client.classify_adaptive(rows(4), POLICY)
        assert type(caught.value) is ModelChangedError
        assert str(caught.value) == (
            "One version number must stand for one model. Received: an answer of version 1 with "
            "model_id 103 after one of version 1 with model_id 102 from "
            f"{server.target} for model 'default' version 1, signature 'head_2', timeout 10 s. "
            "Give every export a number of its own (leave version out), and every replica the "
            "same versions."
        )
        assert makers(client.classify_adaptive(rows(4), POLICY)) == {3}


@BOTH
@pytest.mark.parametrize("after", [1, 2, 7, 10])
def test_rows_in_parts_are_all_of_the_new_model(kind: type[Any], after: int) -> None:
    with FaultyServer({1: OLD}) as server, open_client(kind, server.target, PARTS) as client:
        replace_after(server, {after: NEW})
        embedding = client.embed(rows(20), 2)
        assert makers(embedding) == {2}
        assert embedding[:, 0].tolist() == list(range(1, 21))


def test_the_rows_that_were_answered_before_another_model_are_of_one() -> None:
    with FaultyServer({1: OLD}) as server, open_client(Client, server.target, PARTS) as client:
        replace_after(server, {4: NEW, 13: THIRD})
        with pytest.raises(ModelChangedError) as caught:
            client.embed(rows(20), 2)
    partial = caught.value.partial
    assert partial is not None
    assert makers(np.asarray(partial.answer)) == {2}
    np.testing.assert_array_equal(np.asarray(partial.answer)[:, 0], partial.rows + 1)


@BOTH
@pytest.mark.parametrize("same_weights", [True, False])
def test_a_corpus_goes_on_with_the_same_weights_alone(
    kind: type[Any], same_weights: bool, tmp_path: Path
) -> None:
    other = identified(echo(2), 102, fingerprint="v1" if same_weights else "v2")
    path = tmp_path / "rows.npy"
    with FaultyServer({1: OLD}) as server, open_client(kind, server.target, PARTS) as client:

        def progress(done: int, _: int | None) -> None:
            server.versions = {1: other if done >= 16 else OLD}

        if same_weights:
            embedding = client.embed_dataset(rows(40), 2, path, progress=progress)
            assert embedding[:, 0].tolist() == list(range(1, 41))
            assert [makers(embedding[:16]), makers(embedding[16:])] == [{1}, {2}]
            return
        with pytest.raises(EncoderMismatchError, match="All rows of a file are embedded by one"):
            client.embed_dataset(rows(40), 2, path, progress=progress)
        server.versions = {1: OLD}
        embedding = client.embed_dataset(rows(40), 2, path)
        assert makers(embedding) == {1}
        assert len(embedding) == 40


def test_an_index_that_was_replaced_is_asked_for_its_encoder_anew() -> None:
    def index(encoder: str, model_id: int) -> Model:
        changes: dict[str, Any] = {"kind": "index", "encoder_fingerprint": encoder, "cascade": None}
        changes |= {"num_classes": None, "top_k": None, "funnel": FUNNEL.to_json()}

        def answer(call: Call) -> Arrays:
            if call.signature == DESCRIBE:
                return echo(1)(call)
            rows = len(call.inputs["embedding"])
            found = np.tile(model_id + np.arange(FUNNEL.k), (rows, 1))
            return {"ids": found.astype(np.int64), "scores": -found.astype(np.float32)}

        return identified(answer, model_id, **changes)

    with FaultyServer({1: index("v1", 1)}) as server, Client(server.target) as client:
        assert client.search(rows(2), encoder="v1").ids.min() == 1
        server.versions = {1: index("v2", 2)}
        assert client.search(rows(2), encoder="v2").ids.min() == 2
        server.versions = {1: index("v1", 3)}
        with pytest.raises(EncoderMismatchError):
            client.search(rows(2), encoder="v2")


# Replicas that differ.


@BOTH
@pytest.mark.parametrize("models", [(OLD, NEW), (OLD, echo(2)), (echo(1), NEW)])
def test_replicas_that_differ_never_answer_together(
    kind: type[Any], models: tuple[Model, Model]
) -> None:
    """Whether both carry an id or one of them does."""
    index = ExactIndex.build(rows(9), FUNNEL, encoder_fingerprint="v1")
    with FaultyServer({1: models[0]}) as one, FaultyServer({1: models[1]}) as other:
        targets = [one.target, other.target]
        with (
            open_client(kind, targets) as client,
            open_client(kind, targets, PARTS) as split,
        ):
            connect_to_all(client, one, other)
            refused = 0
            asks: list[Callable[[], Any]] = [
                lambda: client.classify_adaptive(rows(4), POLICY),
                lambda: split.embed(rows(9), 2),
            ]
            for ask in asks * 20:
                try:
                    assert len(makers(ask())) == 1
                except ModelChangedError:
                    refused += 1
            assert refused
            by = [makers(client.embed(rows(4), 2)) for _ in range(20)]
            assert by.count({1}) + by.count({2}) == 20  # one call is of one model
            for _ in range(10):
                with suppress(ModelChangedError, EncoderMismatchError):
                    before = {id(server): len(server.requests) for server in (one, other)}
                    client.retrieve(rows(2), index)
                    embedded = one.requests[before[id(one)] :]
                    assert "embed_4" in {request.signature for request in embedded}


@pytest.mark.soak
def test_no_answer_is_mixed_while_servers_are_replaced() -> None:
    """Two replicas, whose model changes under the number 1 again and again."""
    least, replacements = (10_000, 200) if SOAK else (60, 6)
    stop, counting = threading.Event(), threading.Lock()
    names = ("answers", "refused", "wrong", "mixed", "replaced")
    counts: dict[str, int] = dict.fromkeys(names, 0)

    def tally(name: str) -> None:
        with counting:
            counts[name] += 1

    def ask(whole: Client, split: Client, number: int) -> None:
        x = rows(9, start=100 * number + 1)
        while not stop.is_set():
            try:
                if number % 2:
                    answer: Any = (whole, split)[number % 4 // 2].classify_adaptive(x, POLICY)
                    is_right = answer.dim.tolist() == [2, 4, 2, 4, 2, 4, 2, 4, 2]
                else:
                    answer = split.embed(x, 2)
                    is_right = bool((answer[:, 0] == x[:, 0]).all())
                tally("answers" if is_right else "wrong")
                if len(makers(answer)) > 1:
                    tally("mixed")
            except (ModelChangedError, ServerUnavailableError):
                tally("refused")

    def replace_both(one: FaultyServer, other: FaultyServer) -> None:
        while not stop.wait(0.05):
            tally("replaced")
            number = 1 + counts["replaced"] % 9
            for server in (one, other):
                server.versions = {1: identified(echo(number), 1000 + counts["replaced"])}
                stop.wait(0.005)

    with FaultyServer({1: OLD}, workers=8) as one, FaultyServer({1: OLD}, workers=8) as other:
        targets = [one.target, other.target]
        with (
            Client(targets) as whole,
            Client(targets, options=PARTS) as split,
            ThreadPoolExecutor(9) as pool,
        ):
            threads = [pool.submit(ask, whole, split, number) for number in range(8)]
            threads.append(pool.submit(replace_both, one, other))
            try:
                wait_until(
                    lambda: (
                        (counts["answers"] >= least and counts["replaced"] >= replacements)
                        or any(thread.done() for thread in threads)
                    ),
                    timeout_s=1200 if SOAK else 120,
                )
            finally:
                stop.set()
            for thread in threads:
                thread.result()
        requests = len(one.requests) + len(other.requests)
    print(f"\n{requests} requests, {counts}")
    assert (counts["wrong"], counts["mixed"]) == (0, 0)


# Models that carry no id, and models that lie.


def test_a_model_without_an_id_is_asked_for_none() -> None:
    with FaultyServer() as server, Client(server.target) as client:
        # The server refuses an output that the model lacks.
        assert makers(client.classify_adaptive(rows(4), POLICY)) == {1}
        server.versions = {1: OLD}
        assert makers(client.embed(rows(4), 2)) == {1}


@pytest.mark.parametrize("versions", [({1: echo(1)}, {2: NEW}), ({1: OLD}, {2: echo(2)})])
def test_models_with_an_id_and_without_follow_each_other(versions: Any) -> None:
    before, after = versions
    with FaultyServer(before) as server, Client(server.target) as client:
        assert makers(client.embed(rows(4), 2)) == {1}
        server.versions = after
        for _ in range(2):
            assert makers(client.embed(rows(4), 2)) == {2}
            assert makers(client.classify_adaptive(rows(4), POLICY)) == {2}
        described = len(server.requests_of("describe"))
        client.embed(rows(4), 2)
        assert len(server.requests_of("describe")) == described


@pytest.mark.parametrize(("before", "after"), [(echo(1), NEW), (OLD, echo(2))])
def test_a_model_with_an_id_and_one_without_follow_each_other_under_one_number(
    before: Model, after: Model
) -> None:
    """The connection tells, or the answer."""
    server = Counted(before)
    client = Client(server)
    assert makers(client.embed(rows(4), 2)) == {1}
    server.model = after
    server.connections += 1
    assert makers(client.classify_adaptive(rows(4), POLICY)) == {2}
    index = ExactIndex.build(rows(9), FUNNEL, encoder_fingerprint="v1")
    with pytest.raises(EncoderMismatchError):
        client.retrieve(rows(2), index)


class Counted:
    """A transport that counts its connections: a function in place of a server."""

    target = "counted"

    def __init__(self, model: Model) -> None:
        self.model = model
        self.connections = 1
        self.signatures: list[str] = []

    def send(self, envelope: Envelope) -> Reply[Any]:
        assert isinstance(envelope.request, Call)
        self.signatures.append(envelope.signature)
        arrays = self.model(envelope.request)
        if missing := set(envelope.request.outputs) - set(arrays):
            raise call_error(InvalidInputError, envelope, self.target, f"no output {missing}")
        return Reply({n: np.asarray(arrays[n]) for n in envelope.request.outputs or arrays}, 1)

    def close(self) -> None:
        """Do nothing."""


def test_after_a_reconnect_a_manifest_without_an_id_is_read_anew() -> None:
    server = Counted(echo(1))
    client = Client(server)
    index = ExactIndex.build(rows(9), FUNNEL, encoder_fingerprint="v1")
    for _ in range(2):
        client.retrieve(rows(2), index)
    assert server.signatures == ["describe", "embed_4", "embed_4"]
    server.model = echo(2)
    server.connections += 1
    with pytest.raises(EncoderMismatchError):
        client.retrieve(rows(2), index)
    assert server.signatures[3:] == ["describe", "embed_4"]


def test_a_manifest_whose_connection_was_lost_before_it_was_remembered_is_read_anew() -> None:
    server = Counted(echo(1))
    index = ExactIndex.build(rows(9), FUNNEL, encoder_fingerprint="v1")

    def replaced(call: Call) -> Arrays:
        server.model = echo(2)
        server.connections += 1
        return echo(1)(call)

    server.model = replaced
    client = Client(server)
    assert client.describe().fingerprint == "v1"
    with pytest.raises(EncoderMismatchError):
        client.retrieve(rows(2), index)


def test_after_a_reconnect_a_manifest_with_an_id_is_as_good_as_before() -> None:
    server = Counted(OLD)
    client = Client(server)
    for _ in range(3):
        client.embed(rows(2), 2)
        server.connections += 1
    assert server.signatures == ["describe", *["embed_2"] * 3]


def changed(model: Model, change: Callable[[Any], Any]) -> Model:
    """A model that answers other ids than its manifest names."""

    def answer(call: Call) -> Arrays:
        arrays = dict(model(call))
        if MODEL_ID in arrays:
            arrays[MODEL_ID] = change(arrays[MODEL_ID])
        return arrays

    return answer


def of_two(ids: Any) -> Any:
    return np.append(ids[:-1], 102).astype(np.int32)


@pytest.mark.parametrize(
    ("change", "which"),
    [(lambda ids: ids + 1, "with model_id 102"), (of_two, "with several model_ids")],
)
def test_a_manifest_that_names_another_id_than_the_answers(
    change: Callable[[Any], Any], which: str, refuses: Refuses
) -> None:
    with FaultyServer({1: changed(OLD, change)}) as server, Client(server.target) as client:
        text = (
            f"One version number must stand for one model. Received: an answer of version 1 "
            f"{which} and the manifest of version 1 with model_id 101 from {server.target} for "
            "model 'default' version 1, signature 'describe', timeout 10 s. Give every export a "
            "number of its own (leave version out), and every replica the same versions."
        )
        for ask in (
            lambda: client.embed(rows(4), 2),
            lambda: client.classify_adaptive(rows(4), POLICY),
        ):
            with pytest.raises(ModelChangedError) as caught:
                ask()
            assert type(caught.value) is ModelChangedError
        with refuses(ModelChangedError, text):
            client.embed(rows(4), 2)


def test_a_manifest_that_names_an_id_and_answers_that_carry_none() -> None:
    def without(call: Call) -> Arrays:
        return {name: array for name, array in OLD(call).items() if name != MODEL_ID}

    with FaultyServer({1: without}) as server, Client(server.target) as client:
        with pytest.raises(ModelChangedError, match="without a model_id"):
            client.embed(rows(4), 2)


def test_no_rows_carry_no_id_and_are_of_the_model_that_is_known() -> None:
    with FaultyServer({1: OLD}) as server, Client(server.target) as client:
        assert client.embed(rows(0), 2).shape == (0, 2)
        index = ExactIndex.build(rows(9), FUNNEL, encoder_fingerprint="v1")
        assert client.retrieve(rows(0), index).ids.shape == (0, 3)


def test_a_server_in_memory_carries_the_id_of_its_manifest() -> None:
    described = manifest(1)
    described = type(described).from_json(
        described.to_json().replace('"model_id": null', '"model_id": 7')
    )
    server = InMemoryServer(described, echo(1))
    with Client(server) as client:
        assert makers(client.classify_adaptive(rows(4), POLICY)) == {1}
        assert client.embed(rows(4), 2).shape == (4, 2)
    assert server.calls[-1].outputs == ()
    assert [MODEL_ID in call.outputs for call in server.calls if call.outputs] == [True, True]


# What is remembered.


def test_a_manifest_of_another_id_never_serves() -> None:
    knowledge, asked = Knowledge(), AskManifest()
    knowledge.put(asked, Identity(1, 5), "of 5", connections=0)
    assert knowledge.get(asked) is None  # nothing has answered yet
    knowledge.answered(Identity(1, 5), is_identified=True)
    assert knowledge.get(asked) == knowledge.get(asked, Identity(1, 5)) == "of 5"
    for other in (Identity(1, 6), Identity(2, 5), Identity(1, 0), Identity(1)):
        assert knowledge.get(asked, other) is None
    knowledge.answered(Identity(1, 6), is_identified=True)
    assert knowledge.get(asked) is None
    knowledge.put(asked, Identity(1, 6), "of 6", connections=0)
    assert knowledge.get(asked) == "of 6"
    knowledge.answered(Identity(1), is_identified=False)  # a call that asks for no id
    assert knowledge.get(asked) == "of 6"
    knowledge.answered(Identity(2), is_identified=False)
    assert knowledge.get(asked) is None


def test_signatures_are_of_a_version_and_of_a_connection() -> None:
    connections = 1
    knowledge, asked = Knowledge(lambda: connections), AskSignatures()
    knowledge.put(asked, Identity(1), "signatures", connections)
    assert knowledge.get(asked, Identity(1, 5)) == "signatures"
    connections = 2
    assert knowledge.get(asked, Identity(1)) is None


def test_what_is_remembered_does_not_grow() -> None:
    knowledge, asked = Knowledge(), AskManifest()
    for number in range(100):
        knowledge.put(asked, Identity(number, 5), str(number), connections=0)
        knowledge.answered(Identity(number, 5), is_identified=True)
        assert knowledge.get(asked) == str(number)
    remembered = [n for n in range(100) if knowledge.get(asked, Identity(n, 5)) is not None]
    assert 0 < len(remembered) <= 8
