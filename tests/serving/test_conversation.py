"""Conversations: the order of calls, their version and their time, and what errors change."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import count
from pathlib import Path
from shutil import copytree
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest

from keras_mrl_serving import questions
from keras_mrl_serving._transport import GrpcTransport
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Envelope, Reply
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.conversation import Conversation, Rounds, Talk
from keras_mrl_serving.errors import (
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    ModelNotFoundError,
    NoCascadeError,
    ServerError,
    ServerUnavailableError,
    SignatureNotFoundError,
    UnknownDimError,
    VersionChangedError,
    VersionNotFoundError,
)
from keras_mrl_serving.flows import Arrays, Call
from keras_mrl_serving.options import Options
from tests.helpers.faulty_server import (
    POLICY,
    Before,
    FaultyServer,
    Request,
    connect_to_all,
    echo,
    identified,
    open_client,
    rows,
)
from tests.helpers.waiting import wait_until

Model = Callable[[Call], Arrays]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]
T = TypeVar("T")

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
ROWS = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
TWO_DIMS = CascadePolicy((Stage(2, 0.7), Stage(4, None)))  # dims that every version here serves


@pytest.fixture
def old(toys: Mapping[str, Model]) -> Model:
    return toys["classifier"]


@pytest.fixture
def new(toys: Mapping[str, Model]) -> Model:
    """Serves 2, 4 and 16 in place of 2, 4 and 8, other classes, no labels, no policy."""
    return toys["successor"]


# Versions that change meanwhile.


def swap_after(server: FaultyServer, versions_by_count: dict[int, dict[int, Model]]) -> Before:
    """Change the versions once so many requests are answered."""

    def before(*_: object) -> None:
        versions = versions_by_count.get(len(server.requests) - 1)
        if versions is not None:
            server.versions = versions

    return before


def calls_of(server: FaultyServer) -> list[tuple[str, int | None]]:
    return [(request.signature, request.version) for request in server.requests]


def assert_answered_by(model: Model, answer: Any) -> None:
    features = model(Call("features", {"x": ROWS}))["features"]
    logits = [model(Call(f"head_{dim}", {"features": features[:, :dim]})) for dim in (2, 4)]
    class_ids, stage = TWO_DIMS.route(np.stack([head["logits"] for head in logits], axis=1))
    assert answer.class_ids[:, 0].tolist() == class_ids.tolist()
    assert answer.dim.tolist() == [(2, 4)[index] for index in stage]


def test_an_answer_stays_with_the_version_that_began_it(old: Model, new: Model) -> None:
    with FaultyServer({1: old}) as server, Client(server.target) as client:
        server.before = swap_after(server, {2: {1: old, 2: new}})  # both are there for a while
        assert_answered_by(old, client.classify_adaptive(ROWS, TWO_DIMS))
        assert calls_of(server) == [
            *[("describe", None), ("features", None)],
            *[("head_2", 1), ("head_4", 1)],
        ]
        assert_answered_by(new, client.classify_adaptive(ROWS, TWO_DIMS))
        assert calls_of(server)[4:] == [
            *[("features", None), ("describe", 2)],  # the new one is wider: ask it by its manifest
            *[("features", 2), ("head_2", 2), ("head_4", 2)],
        ]


def test_an_answer_whose_version_is_gone_starts_over_on_the_new_one(old: Model, new: Model) -> None:
    with FaultyServer({1: old}) as server, Client(server.target) as client:
        server.before = swap_after(server, {2: {2: new}})
        answer = client.classify_adaptive(ROWS, TWO_DIMS)
        assert_answered_by(new, answer)
        assert answer.labels is None  # the new version has none, the old one has
        assert calls_of(server) == [
            *[("describe", None), ("features", None), ("head_2", 1)],
            *[("describe", None), ("features", None), ("head_2", 2), ("head_4", 2)],
        ]


@BOTH
@pytest.mark.parametrize("versions", [(1, 2), (1, 1)], ids=["a new version", "under its number"])
def test_both_answers_about_an_audited_row_are_of_one_model(
    kind: type[Any], versions: tuple[int, int]
) -> None:
    """The model changes between the cascade and the audit: both are asked anew."""
    models = [identified(echo(number), number) for number in (1, 2)]
    with FaultyServer({versions[0]: models[0]}) as server:
        server.before = swap_after(server, {2: {versions[1]: models[1]}})
        with open_client(kind, server.target) as client:
            answer = client.classify_adaptive(rows(4), audit_rate=1.0)
        assert answer.class_ids[:, 0].tolist() == answer.full_class_ids.tolist() == [22] * 4
        assert len(answer.audited) == 4
        asked = [request.signature for request in server.requests]
        assert asked[1:3] == ["classify_adaptive", "classify_4"]
        assert asked[-2:] == ["classify_adaptive", "classify_4"]
        assert server.requests[-1].version == versions[1]
        assert [request.count for request in server.requests_of("classify_4")] == [2, 2]


@BOTH
def test_an_answer_whose_version_is_gone_twice_says_so(
    kind: type[Any], old: Model, new: Model
) -> None:
    with FaultyServer({1: old}) as server, open_client(kind, server.target) as client:
        server.before = swap_after(server, {2: {2: new}, 5: {3: old}})
        with pytest.raises(VersionChangedError) as caught:
            client.classify_adaptive(ROWS, TWO_DIMS)
        assert str(caught.value) == (
            "All calls of one answer must reach one version. Received: the version that began the "
            f"answer was gone before its end, twice, from {server.target} for model 'default' "
            "version 2, signature 'head_2', timeout 10 s. Let the server keep the version before "
            "the newest (model_version_policy latest {num_versions: 2}), or swap less often."
        )
        assert vars(caught.value) == {
            "target": server.target,
            "model": "default",
            "version": 2,
            "signature": "head_2",
            "timeout_s": 10.0,
        }
        calls = calls_of(server)
        assert (calls[2], calls[5], len(calls)) == (("head_2", 1), ("head_2", 2), 6)
        assert_answered_by(old, client.classify_adaptive(ROWS, TWO_DIMS))


def test_a_model_that_is_gone_for_good_is_not_found(old: Model) -> None:
    with FaultyServer({1: old}) as server, Client(server.target) as client:
        server.before = swap_after(server, {2: {}})
        with pytest.raises(ModelNotFoundError, match=r"Latest\(default\)") as caught:
            client.classify_adaptive(ROWS, TWO_DIMS)
    assert type(caught.value) is ModelNotFoundError


def test_the_manifest_is_read_once_and_again_when_the_version_changes(
    old: Model, new: Model
) -> None:
    with FaultyServer({1: old}) as server, Client(server.target) as client:
        for _ in range(3):
            client.embed(ROWS, 2)
        assert len(server.requests_of("describe")) == 1
        server.versions = {2: new}
        client.embed(ROWS, 2)  # whose answer names another version
        client.embed(ROWS, 16)
        client.embed(ROWS, 16)
        assert len(server.requests_of("describe")) == 2


def test_an_answer_is_read_by_the_manifest_of_the_version_that_gave_it(
    old: Model, manifests: Mapping[str, Manifest]
) -> None:
    """The remembered manifest has no labels: an answer after a swap would lack them."""
    silent = replace(manifests["classifier"], labels=False)

    def without_labels(call: Call) -> Arrays:
        if call.signature == "describe":
            return {"manifest": np.array([silent.to_json().encode()], object)}
        return {name: array for name, array in old(call).items() if name != "labels"}

    with FaultyServer() as server, Client(server.target) as client:
        for policy in (TWO_DIMS, None):
            server.versions = {1: without_labels}
            assert client.classify_adaptive(ROWS, policy).labels is None
            server.versions = {2: old}
            assert client.classify_adaptive(ROWS, policy).labels is not None


def test_a_version_that_one_replica_lacks_is_asked_of_the_other(old: Model, new: Model) -> None:
    """A rolling update: round robin sends every second call to the other version's server."""
    with FaultyServer({1: old}) as behind, FaultyServer({2: new}) as ahead:
        with Client([behind.target, ahead.target]) as client:
            connect_to_all(client, behind, ahead)
            for _ in range(10):
                dims = client.classify_adaptive(ROWS, TWO_DIMS).dim
                assert set(dims.tolist()) == {2, 4}
        pinned = [version for _, version in calls_of(behind) + calls_of(ahead)]
    assert {1, 2} <= set(pinned)
    assert pinned.count(1) + pinned.count(2) > 20  # so some were asked of both


def test_describe_always_asks(old: Model, new: Model) -> None:
    with FaultyServer({1: old}) as server, Client(server.target) as client:
        assert client.describe().dims == (2, 4, 8)
        server.versions = {2: new}
        assert client.describe().dims == (2, 4, 16)
        client.embed(ROWS, 16)
        assert [signature for signature, _ in calls_of(server)] == [
            *("describe", "describe", "embed_16"),
        ]


def test_a_dim_that_came_with_the_new_version_is_served(old: Model, new: Model) -> None:
    with FaultyServer({1: old}) as server, Client(server.target) as client:
        client.describe()
        server.versions = {2: new}
        assert client.embed(ROWS, 16).shape == (9, 16)
        assert calls_of(server) == [("describe", None), ("describe", None), ("embed_16", None)]


def test_the_new_version_s_manifest_refuses_what_went_with_the_old_one(
    old: Model, new: Model, refuses: Refuses
) -> None:
    text = (
        "dim must be one of the dims the model serves. Received: dim=8 for model 'toy'. "
        "Choose one of 2, 4, 16."
    )
    with FaultyServer({1: old}) as server:
        with Client(server.target) as client, Client(server.target) as other:
            client.describe()
            other.describe()
            server.versions = {2: new}
            with refuses(UnknownDimError, text):
                client.embed(ROWS, 8)
            with pytest.raises(NoCascadeError):
                other.classify_adaptive(ROWS)


def test_a_caller_s_mistake_costs_one_more_look_at_the_manifest(old: Model) -> None:
    with FaultyServer({1: old}) as server, Client(server.target) as client:
        client.embed(ROWS, 2)
        for mistakes in (1, 2):
            with pytest.raises(InvalidInputError):
                client.embed(ROWS[0], 2)
            assert calls_of(server) == [
                *[("describe", None), ("embed_2", None)],
                *[("describe", None)] * mistakes,
            ]


@BOTH
def test_a_signature_that_the_manifest_promises_and_the_model_lacks(kind: type[Any]) -> None:
    def without(call: Any) -> Any:
        if call.signature == "embed_4":
            raise KeyError(call.signature)
        return echo(1)(call)

    with FaultyServer({1: without}) as server, open_client(kind, server.target) as client:
        with pytest.raises(SignatureNotFoundError, match='key "embed_4" not found') as caught:
            client.embed(rows(1), 4)
    assert (caught.value.signature, caught.value.version) == ("embed_4", None)


SWAP_S = 0.1


def swap(server: FaultyServer, stop: threading.Event, num_versions: int, seed: int) -> None:
    """Load one version after another, as TensorFlow Serving does; the last ones stay.

    Versions come at fixed times, and each replica finds them a little later.
    """
    delay, start = random.Random(seed), time.monotonic()
    for newest in count(2):
        due = start + (newest - 1 + delay.uniform(0.0, 0.9)) * SWAP_S
        if stop.wait(max(0.0, due - time.monotonic())):
            return
        server.versions = {**server.versions, newest: echo(newest)}
        stop.wait(0.002)
        server.versions = dict(sorted(server.versions.items())[-num_versions:])


def is_mixed(answer: Any) -> bool:
    """Whether an answer was made by more than one version: see `echo`."""
    features_by, classes_by = np.divmod(answer.class_ids[:, 0], 10)
    return len({*features_by.tolist(), *classes_by.tolist()}) > 1


@pytest.mark.soak
@pytest.mark.parametrize("num_versions", [1, 2])
def test_no_answer_mixes_versions_while_replicas_swap_them(num_versions: int) -> None:
    swaps = 300 if SOAK else 10
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
    with FaultyServer(workers=8) as one, FaultyServer(workers=8) as other:
        targets = [one.target, other.target]
        with (
            Client(targets) as whole,
            Client(targets, options=small) as split,
            ThreadPoolExecutor(10) as pool,
        ):
            threads = [
                *(pool.submit(swap, s, stop, num_versions, n) for n, s in enumerate((one, other))),
                *(pool.submit(ask, whole, split, number) for number in range(8)),
            ]
            try:
                wait_until(
                    lambda: (
                        (counts["answers"] >= 50 and min(*one.versions, *other.versions) > swaps)
                        or any(thread.done() for thread in threads)
                    )
                )
            finally:
                stop.set()
            for thread in threads:
                thread.result()
    assert counts["mixes"] == 0


def test_a_mix_would_have_been_seen() -> None:
    """The test above can fail: a client that pins no version would be answered by a mix."""
    features = echo(1)(Call("features", {"x": rows(2)}))["features"]
    answer = echo(2)(Call("head_4", {"features": features}))
    assert np.asarray(answer["class_ids"])[:, 0].tolist() == [12, 12]


# Time.


def run(rounds: Rounds[T], send: Callable[[Envelope], Reply[Any]]) -> T:
    """Run a conversation's rounds over a function in place of a transport."""
    try:
        while True:
            round = next(rounds)
            for number, talk in round.talks.items():
                round.receive(number, outcome(talk, send))
    except StopIteration as done:
        answer: T = done.value
        return answer


def outcome(talk: Talk[Any], send: Callable[[Envelope], Reply[Any]]) -> Any:
    try:
        envelope = next(talk)
        while True:
            envelope = talk.send(send(envelope))
    except StopIteration as done:
        return done.value
    except KerasMrlError as error:
        return error


class SlowModel:
    """Version 1 of `echo`, whose calls take so many seconds of a clock of its own."""

    def __init__(self, **seconds: float) -> None:
        self.now_s = 0.0
        self.seconds = seconds
        self.sent: list[tuple[str, float]] = []

    def send(self, envelope: Envelope) -> Reply[Any]:
        assert isinstance(envelope.request, Call)
        self.sent.append((envelope.signature, round(envelope.remaining_s, 3)))
        self.now_s += self.seconds.get(envelope.signature, 0.0)
        return Reply(echo(1)(envelope.request), 1)


def test_an_answer_decoded_after_the_deadline_is_none() -> None:
    model = SlowModel(embed_2=2.0)
    conversation = Conversation("host:8500", "m", Options(), clock=lambda: model.now_s)
    run(conversation.ask(questions.embed(rows(2), 2)), model.send)
    model.seconds["embed_2"] = 10.5
    with pytest.raises(DeadlineError, match="an answer that was decoded too late from host:8500"):
        run(conversation.ask(questions.embed(rows(2), 2)), model.send)


def test_all_calls_of_an_answer_share_one_timeout() -> None:
    model = SlowModel(describe=0.2, features=0.8, head_2=1.5)  # each by itself in time
    options = Options(timeout_s=2.0)
    conversation = Conversation("host:8500", "m", options, clock=lambda: model.now_s)
    with pytest.raises(DeadlineError) as caught:
        run(conversation.ask(questions.classify_adaptive(rows(2), POLICY)), model.send)
    assert model.sent == [("describe", 2.0), ("features", 1.8), ("head_2", 1.0)]
    assert str(caught.value) == (
        "An answer must come within the timeout. Received: an answer that was decoded too late "
        "from host:8500 for model 'm' version 1, signature 'head_2', timeout 2 s. "
        "Send fewer rows at once, or raise Options(timeout_s=...)."
    )
    assert caught.value.version == 1


def test_each_part_after_the_first_has_the_whole_timeout() -> None:
    model = SlowModel(describe=0.5, embed_2=1.2)
    options = Options(timeout_s=2.0, max_batch_size=1)
    conversation = Conversation("host:8500", "m", options, clock=lambda: model.now_s)
    assert len(run(conversation.ask(questions.embed(rows(3), 2)), model.send)) == 3
    assert model.sent == [("describe", 2.0), ("embed_2", 1.5), ("embed_2", 2.0), ("embed_2", 2.0)]


# Rows split into parts, some of which fail.

PARTS = Options(max_batch_size=5, max_in_flight=3, max_attempts=1)  # 4 parts of 20 rows, 1 of 3


def first_rows(server: FaultyServer) -> set[float]:
    return {part.first for part in server.requests_of("embed_2")}


def fail_part(
    server: FaultyServer,
    first_row: int,
    code: grpc.StatusCode,
    times: int = 2**31,
) -> Before:
    """Abort the part that begins with a row, once all the others have arrived."""
    numbers = iter(range(times))

    def before(request: Request, context: grpc.ServicerContext) -> None:
        if request.first == first_row and next(numbers, None) is not None:
            wait_until(lambda: {1, 6, 11, 16, 21} <= first_rows(server))
            context.abort(code, "busy")

    return before


@BOTH
def test_only_the_part_that_failed_is_sent_again(kind: type[Any]) -> None:
    with FaultyServer() as server, open_client(kind, server.target, PARTS) as client:
        server.before = fail_part(server, 21, grpc.StatusCode.UNAVAILABLE, times=1)
        assert client.embed(rows(23), 2)[:, 0].tolist() == list(range(1, 24))
        parts = server.requests_of("embed_2")
        assert sorted(part.first for part in parts) == [1, 6, 11, 16, 21, 21]
        assert {part.first: part.version for part in parts} == {1: None, 6: 1, 11: 1, 16: 1, 21: 1}


@pytest.mark.parametrize(
    ("code", "error", "times_sent"),
    [
        (grpc.StatusCode.UNAVAILABLE, ServerUnavailableError, 2),
        (grpc.StatusCode.INTERNAL, ServerError, 1),
    ],
)
@BOTH
def test_the_answered_rows_come_with_the_error(
    kind: type[Any], code: grpc.StatusCode, error: type[KerasMrlError], times_sent: int
) -> None:
    with FaultyServer() as server, open_client(kind, server.target, PARTS) as client:
        server.before = fail_part(server, 11, code)
        with pytest.raises(error) as caught:
            client.embed(rows(23), 2)
        firsts = [part.first for part in server.requests_of("embed_2")]
        assert sorted(firsts) == [1, 6, *[11] * times_sent, 16, 21]
    partial = caught.value.partial
    assert partial is not None
    answered = [*range(10), *range(15, 23)]
    assert partial.rows.tolist() == answered
    np.testing.assert_array_equal(np.asarray(partial.answer), [[row + 1, 1] for row in answered])
    assert (caught.value.version, caught.value.signature) == (1, "embed_2")


@pytest.mark.parametrize("most", [1, 2, 4])
@BOTH
def test_no_more_calls_are_under_way_than_the_options_allow(kind: type[Any], most: int) -> None:
    options = Options(max_batch_size=2, max_in_flight=most)
    with FaultyServer() as server, open_client(kind, server.target, options) as client:

        def before(request: Request, _: grpc.ServicerContext) -> None:
            if request.version is not None:  # a part after the first
                wait_until(lambda: server.most_at_once == most)
                time.sleep(0.002 * (request.first % 3))  # answered in another order than asked

        server.before = before
        assert client.embed(rows(31), 2)[:, 0].tolist() == list(range(1, 32))
        assert server.most_at_once == most
        assert len(server.requests_of("embed_2")) == 16


# Labels.


@pytest.fixture(scope="module")
def labelled(saved: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose newest version is not the one it calls stable."""
    from keras_mrl_serving.server import DevServer

    base = tmp_path_factory.mktemp("labelled")
    copytree(saved["classifier"] / "1", base / "1")
    copytree(saved["successor"] / "1", base / "2")
    file = base / "models.config"
    file.write_text(
        f"""model_config_list {{ config {{
            name: "m" base_path: "{base}" model_platform: "tensorflow"
            model_version_policy {{ all {{}} }}
            version_labels {{ key: "stable" value: 1 }} version_labels {{ key: "canary" value: 2 }}
        }} }}"""
    )
    server = DevServer(model_config_file=file, allow_version_labels_for_unavailable_models=True)
    with server as target:
        yield target


class Recorder:
    """A transport that records the versions and labels of its envelopes."""

    def __init__(self, target: str) -> None:
        self._transport = GrpcTransport(target, Options())
        self.target = target
        self.sent: list[tuple[int | None, str | None]] = []

    def send(self, envelope: Envelope) -> Reply[Any]:
        self.sent.append((envelope.version, envelope.label))
        return self._transport.send(envelope)

    def close(self) -> None:
        self._transport.close()


@pytest.mark.parametrize(
    ("label", "which"), [("stable", "classifier"), ("canary", "successor"), (None, "successor")]
)
def test_a_label_is_asked_in_every_call(
    label: str | None, which: str, labelled: str, manifests: Mapping[str, Manifest]
) -> None:
    recorder = Recorder(labelled)
    many = Options(max_batch_size=2)
    with Client(recorder, "m", label=label, options=many) as client:
        assert client.label == label
        assert client.describe() == manifests[which]
        width = manifests[which].width
        assert client.embed(ROWS, width).shape == (9, width)
        assert (client.classify_adaptive(ROWS, TWO_DIMS).labels is None) is (which == "successor")
        assert client.predict(ROWS, f"embed_{width}")["embedding"].shape == (9, width)
        assert f"embed_{width}" in client.signatures()
        assert [version.version for version in client.status()] == [2, 1]
    number = 1 if which == "classifier" else 2
    assert set(recorder.sent) == {(None, label), (number, label)}


def test_a_label_is_asked_from_an_event_loop_too(
    labelled: str, manifests: Mapping[str, Manifest]
) -> None:
    async def ask() -> tuple[Manifest, Any]:
        async with AsyncClient(labelled, "m", label="stable") as client:
            assert client.label == "stable"
            return await client.describe(), await client.classify_adaptive(ROWS, TWO_DIMS)

    manifest, answer = asyncio.run(ask())
    assert manifest == manifests["classifier"]
    assert answer.labels is not None


def test_a_label_that_no_version_has_is_named(labelled: str, refuses: Refuses) -> None:
    with Client(labelled, "m", label="beta") as client:
        for call, signature in (
            (client.describe, ", signature 'describe'"),
            (lambda: client.embed(ROWS, 2), ", signature 'describe'"),
            (client.signatures, ""),
        ):
            with refuses(
                VersionNotFoundError,
                "The server must have the version. Received: INVALID_ARGUMENT from "
                f"{labelled} for model 'm' label 'beta'{signature}, timeout 10 s: Unrecognized "
                "servable version label: beta. Give a label that the server's model config sets, "
                "or none for the newest version.",
            ):
                call()


@pytest.mark.parametrize("label", ["", 3, b"stable"])
def test_other_labels_are_refused(label: Any, refuses: Refuses) -> None:
    text = (
        "label must be the name that a model config gives a version. "
        f"Received: label={label!r}. Leave it out for the newest version."
    )
    for kind in (Client, AsyncClient):
        with refuses(ValueError, text):
            kind("127.0.0.1:1", label=label)


def test_a_swap_under_the_development_server(
    saved: Mapping[str, Path],
    manifests: Mapping[str, Manifest],
    new: Model,
    tmp_path: Path,
) -> None:
    from keras_mrl_serving.server import DevServer

    copytree(saved["classifier"] / "1", tmp_path / "1")
    server = DevServer(tmp_path, file_system_poll_wait_seconds=0.02)
    with server as target, Client(target) as client:
        assert client.describe() == manifests["classifier"]
        copytree(saved["successor"] / "1", tmp_path / "copying").rename(tmp_path / "2")
        for _ in range(500):
            answer = client.classify_adaptive(ROWS, TWO_DIMS)
            if client.describe() == manifests["successor"]:
                break
            assert answer.labels is not None  # all of it from the old version
        answer = client.classify_adaptive(ROWS, TWO_DIMS)
        assert answer.labels is None
        assert_answered_by(new, answer)
        assert client.embed(ROWS, 16).shape == (9, 16)
