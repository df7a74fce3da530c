"""Versions that change while a client asks: one answer comes from one version, and says which."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import grpc
import numpy as np
import pytest

from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving._transport import GrpcTransport, error_class
from keras_mrl_serving._wire import from_proto, to_proto
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Envelope, Reply
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import (
    InvalidInputError,
    KerasMrlError,
    ModelNotFoundError,
    NoCascadeError,
    UnknownDimError,
    VersionChangedError,
    VersionNotFoundError,
)
from keras_mrl_serving.flows import Arrays, Call
from keras_mrl_serving.options import Options
from keras_mrl_serving.testing import InMemoryServer

Model = Callable[[Call], Arrays]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

ROWS = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
BOTH = CascadePolicy((Stage(2, 0.7), Stage(4, None)))  # dims that every version here serves


@dataclass
class Script:
    """A server whose versions change after so many requests. It notes what it was asked."""

    versions: dict[int, Model]
    then: dict[int, dict[int, Model]] = field(default_factory=dict)
    asked: list[tuple[str, int | None]] = field(default_factory=list)
    refusal: tuple[grpc.StatusCode, str] | None = None
    target: str = ""

    def predict(
        self, request: wire.PredictRequest, context: grpc.ServicerContext
    ) -> wire.PredictResponse:
        if self.refusal:
            context.abort(*self.refusal)
        spec = request.model_spec
        pinned = spec.version.value if spec.HasField("version") else None
        versions = self.versions
        self.asked.append((spec.signature_name, pinned))
        self.versions = self.then.get(len(self.asked), versions)
        if not versions or (pinned is not None and pinned not in versions):
            which = f"Latest({spec.name})" if pinned is None else f"Specific({spec.name}, {pinned})"
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {which}")
        number = max(versions) if pinned is None else pinned
        inputs = {name: from_proto(proto) for name, proto in request.inputs.items()}
        try:
            answer = versions[number](Call(spec.signature_name, inputs))
        except KeyError:
            text = f'Serving signature key "{spec.signature_name}" not found.'
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        for name in set(request.output_filter) - set(answer):
            text = f"output tensor alias not found in signature: {name}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        response = wire.PredictResponse()
        response.model_spec.version.value = number
        for name, array in answer.items():
            response.outputs[name].CopyFrom(to_proto(array))
        return response


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Script]]:
    servers = []

    def serve(script: Script) -> Script:
        method = grpc.unary_unary_rpc_method_handler(
            script.predict,
            request_deserializer=wire.PredictRequest.FromString,
            response_serializer=wire.PredictResponse.SerializeToString,
        )
        name = "tensorflow.serving.PredictionService"
        handler = grpc.method_handlers_generic_handler(name, {"Predict": method})
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((handler,))
        script.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        servers.append(server)
        return script

    yield serve
    for server in servers:
        server.stop(None).wait()


Serve = Callable[[Script], Script]


@pytest.fixture
def old(toys: Mapping[str, Model]) -> Model:
    return toys["classifier"]


@pytest.fixture
def new(toys: Mapping[str, Model]) -> Model:
    """Serves 2, 4 and 16 in place of 2, 4 and 8, other classes, no labels, no policy."""
    return toys["successor"]


def assert_answered_by(model: Model, answer: Any) -> None:
    features = model(Call("features", {"x": ROWS}))["features"]
    logits = [model(Call(f"head_{dim}", {"features": features[:, :dim]})) for dim in (2, 4)]
    class_ids, stage = BOTH.route(np.stack([head["logits"] for head in logits], axis=1))
    assert answer.class_ids[:, 0].tolist() == class_ids.tolist()
    assert answer.dim.tolist() == [(2, 4)[index] for index in stage]


def test_a_flow_stays_with_the_version_that_began_it(serve: Serve, old: Model, new: Model) -> None:
    script = serve(Script({1: old}, then={2: {1: old, 2: new}}))  # both are there for a while
    with Client(script.target, "m") as client:
        assert_answered_by(old, client.classify_adaptive(ROWS, BOTH))
        assert script.asked == [
            ("describe", None),
            ("features", None),
            ("head_2", 1),
            ("head_4", 1),
        ]
        assert_answered_by(new, client.classify_adaptive(ROWS, BOTH))
        assert script.asked[4:] == [
            *[("features", None), ("describe", 2)],  # the new one is wider: look again
            *[("features", 2), ("head_2", 2), ("head_4", 2)],
        ]


def test_a_flow_whose_version_is_gone_starts_over_on_the_new_one(
    serve: Serve, old: Model, new: Model
) -> None:
    script = serve(Script({1: old}, then={2: {2: new}}))
    with Client(script.target, "m") as client:
        answer = client.classify_adaptive(ROWS, BOTH)
        assert_answered_by(new, answer)
        assert answer.labels is None  # the new version has none, the old one has
    assert script.asked == [
        *[("describe", None), ("features", None), ("head_2", 1)],
        *[("describe", None), ("features", None), ("head_2", 2), ("head_4", 2)],
    ]


def test_a_flow_whose_version_is_gone_twice_says_so(
    serve: Serve, old: Model, new: Model, refuses: Refuses
) -> None:
    script = serve(Script({1: old}, then={2: {2: new}, 5: {3: old}}))
    with Client(script.target, "m") as client:
        with refuses(
            VersionChangedError,
            "All calls of one answer must reach one version. Received: the version that began the "
            f"answer was gone before its end, twice, from {script.target} for model 'm' version 2, "
            "signature 'head_2', timeout 10 s. Let the server keep the version before the newest "
            "(model_version_policy latest {num_versions: 2}), or swap less often.",
        ):
            client.classify_adaptive(ROWS, BOTH)
        asked = script.asked
        assert asked[2] == ("head_2", 1)
        assert asked[5] == ("head_2", 2)
        assert len(asked) == 6
        assert_answered_by(old, client.classify_adaptive(ROWS, BOTH))


def test_that_error_knows_the_call_that_failed(serve: Serve, old: Model, new: Model) -> None:
    script = serve(Script({1: old}, then={2: {2: new}, 5: {3: old}}))
    with Client(script.target, "m") as client, pytest.raises(KerasMrlError) as caught:
        client.classify_adaptive(ROWS, BOTH)
    assert vars(caught.value) == {
        "target": script.target,
        "model": "m",
        "version": 2,
        "signature": "head_2",
        "timeout_s": 10.0,
    }


def test_a_model_that_is_gone_for_good_is_not_found(serve: Serve, old: Model) -> None:
    script = serve(Script({1: old}, then={2: {}}))
    with Client(script.target, "m") as client, pytest.raises(ModelNotFoundError) as caught:
        client.classify_adaptive(ROWS, BOTH)
    assert type(caught.value) is ModelNotFoundError
    assert "Latest(m)" in str(caught.value)


def test_the_manifest_is_read_once_and_again_when_the_version_changes(
    serve: Serve, old: Model, new: Model
) -> None:
    script = serve(Script({1: old}))
    with Client(script.target, "m") as client:
        for _ in range(3):
            client.embed(ROWS, 2)
        assert [signature for signature, _ in script.asked].count("describe") == 1
        script.versions = {2: new}
        client.embed(ROWS, 2)  # whose answer names another version
        client.embed(ROWS, 16)
        client.embed(ROWS, 16)
        assert [signature for signature, _ in script.asked].count("describe") == 2


def test_an_answer_is_read_by_the_manifest_of_the_version_that_gave_it(
    serve: Serve, old: Model, manifests: Mapping[str, Manifest]
) -> None:
    """The kept one knew of no labels: they would be missing from one answer after a swap."""
    silent = replace(manifests["classifier"], labels=False)

    def without_labels(call: Call) -> Arrays:
        if call.signature == "describe":
            return {"manifest": np.array([silent.to_json().encode()], object)}
        return {name: array for name, array in old(call).items() if name != "labels"}

    script = serve(Script({1: without_labels}))
    with Client(script.target, "m") as client:
        for policy in (BOTH, None):
            script.versions = {1: without_labels}
            assert client.classify_adaptive(ROWS, policy).labels is None
            script.versions = {2: old}
            assert client.classify_adaptive(ROWS, policy).labels is not None


def test_a_version_that_one_replica_has_not_got_is_asked_of_the_other(
    serve: Serve, old: Model, new: Model
) -> None:
    """A rolling update: round robin sends every second call to the other version's server."""
    behind, ahead = serve(Script({1: old})), serve(Script({2: new}))
    with Client([behind.target, ahead.target], "m") as client:
        for _ in range(10):
            dims = client.classify_adaptive(ROWS, BOTH).dim
            assert set(dims.tolist()) == {2, 4}
    refused = [asked for script in (behind, ahead) for asked in script.asked]
    assert len(refused) > 30


def test_describe_always_asks(serve: Serve, old: Model, new: Model) -> None:
    script = serve(Script({1: old}))
    with Client(script.target, "m") as client:
        assert client.describe().dims == (2, 4, 8)
        script.versions = {2: new}
        assert client.describe().dims == (2, 4, 16)
        client.embed(ROWS, 16)
    assert [signature for signature, _ in script.asked] == ["describe", "describe", "embed_16"]


def test_a_dim_that_came_with_the_new_version_is_found(
    serve: Serve, old: Model, new: Model
) -> None:
    script = serve(Script({1: old}))
    with Client(script.target, "m") as client:
        client.describe()
        script.versions = {2: new}
        assert client.embed(ROWS, 16).shape == (9, 16)
        assert script.asked == [("describe", None), ("describe", None), ("embed_16", None)]


def test_a_dim_that_went_with_the_old_version_is_refused_by_naming_those_of_the_new(
    serve: Serve, old: Model, new: Model, refuses: Refuses
) -> None:
    script = serve(Script({1: old}))
    with Client(script.target, "m") as client:
        client.describe()
        script.versions = {2: new}
        with refuses(
            UnknownDimError,
            "dim must be one of the dims the model serves. Received: dim=8 for model 'toy'. "
            "Choose one of 2, 4, 16.",
        ):
            client.embed(ROWS, 8)
        with pytest.raises(NoCascadeError):
            client.classify_adaptive(ROWS)


def test_a_policy_that_went_with_the_old_version_is_told_so(
    serve: Serve, old: Model, new: Model
) -> None:
    script = serve(Script({1: old}))
    with Client(script.target, "m") as client:
        client.describe()
        script.versions = {2: new}
        with pytest.raises(NoCascadeError):
            client.classify_adaptive(ROWS)


def test_a_caller_s_mistake_costs_one_more_look_at_the_manifest(serve: Serve, old: Model) -> None:
    script = serve(Script({1: old}))
    with Client(script.target, "m") as client:
        client.embed(ROWS, 2)
        for mistakes in (1, 2):
            with pytest.raises(InvalidInputError):
                client.embed(ROWS[0], 2)
            assert script.asked == [
                *[("describe", None), ("embed_2", None)],
                *[("describe", None)] * mistakes,
            ]


@pytest.mark.parametrize("name", [c.name for c in grpc.StatusCode if c.name != "OK"])
def test_every_status_of_a_server_becomes_an_error_of_ours(serve: Serve, name: str) -> None:
    code = grpc.StatusCode[name]
    script = serve(Script({}, refusal=(code, "no, not now.")))
    once = Options(max_attempts=1)
    with Client(script.target, "m", options=once) as client:
        with pytest.raises(KerasMrlError) as caught:
            client.describe()
    assert type(caught.value) is error_class(code, "")
    call = f"{name} from {script.target} for model 'm', signature 'describe', timeout 10 s"
    assert f" Received: {call}: no, not now. " in str(caught.value)


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


class Noting:
    """A transport that notes which versions and labels were asked for."""

    def __init__(self, target: str) -> None:
        self._below = GrpcTransport(target, Options())
        self.target = target
        self.asked: list[tuple[int | None, str | None]] = []

    def send(self, envelope: Envelope) -> Reply[Any]:
        self.asked.append((envelope.version, envelope.label))
        return self._below.send(envelope)

    def close(self) -> None:
        self._below.close()


@pytest.mark.parametrize(
    ("label", "which"), [("stable", "classifier"), ("canary", "successor"), (None, "successor")]
)
def test_a_label_is_asked_in_every_call(
    label: str | None, which: str, labelled: str, manifests: Mapping[str, Manifest]
) -> None:
    noting = Noting(labelled)
    many = Options(max_batch_size=2)
    with Client(noting, "m", label=label, options=many) as client:
        assert client.label == label
        assert client.describe() == manifests[which]
        width = manifests[which].width
        assert client.embed(ROWS, width).shape == (9, width)
        assert (client.classify_adaptive(ROWS, BOTH).labels is None) is (which == "successor")
        assert client.predict(ROWS, f"embed_{width}")["embedding"].shape == (9, width)
        assert f"embed_{width}" in client.signatures()
        assert [version.version for version in client.status()] == [2, 1]
    number = 1 if which == "classifier" else 2
    assert set(noting.asked) == {(None, label), (number, label)}


def test_a_label_is_asked_from_an_event_loop_too(
    labelled: str, manifests: Mapping[str, Manifest]
) -> None:
    async def ask() -> tuple[Manifest, Any]:
        async with AsyncClient(labelled, "m", label="stable") as client:
            assert client.label == "stable"
            return await client.describe(), await client.classify_adaptive(ROWS, BOTH)

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
def test_what_is_no_label(label: Any, refuses: Refuses) -> None:
    text = (
        "label must be the name that a model config gives a version. "
        f"Received: label={label!r}. Leave it out for the newest version."
    )
    for kind in (Client, AsyncClient):
        with refuses(ValueError, text):
            kind("127.0.0.1:1", label=label)


def test_a_server_in_memory_has_one_label_or_none(manifests: Mapping[str, Manifest]) -> None:
    server = InMemoryServer(manifests["classifier"], lambda _: None, label="stable")
    assert Client(server).describe() == Client(server, label="stable").describe()
    with pytest.raises(VersionNotFoundError, match=r"no such label .* label 'beta'"):
        Client(server, label="beta").describe()


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
            answer = client.classify_adaptive(ROWS, BOTH)
            if client.describe() == manifests["successor"]:
                break
            assert answer.labels is not None  # all of it from the old version
        answer = client.classify_adaptive(ROWS, BOTH)
        assert answer.labels is None
        assert_answered_by(new, answer)
        assert client.embed(ROWS, 16).shape == (9, 16)
