"""What an observer is told of calls and answers, and the OpenTelemetry metrics made of it."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Call, Envelope
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import KerasMrlError, ServerError
from keras_mrl_serving.observer import OpenTelemetryMetrics
from keras_mrl_serving.options import Options
from keras_mrl_serving.results import Classification
from keras_mrl_serving.testing import InMemoryServer
from tests.helpers.programs import last_error

ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
Toys = Mapping[str, Callable[[Call], Any]]


class Notes:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, KerasMrlError | None]] = []
        self.answers: list[tuple[str, Manifest, Classification]] = []

    def called(self, envelope: Envelope, seconds: float, error: KerasMrlError | None) -> None:
        self.calls.append((envelope.signature, seconds, error))

    def classified(self, model: str, manifest: Manifest, answer: Classification) -> None:
        self.answers.append((model, manifest, answer))


@pytest.fixture
def server(manifests: Mapping[str, Manifest], toys: Toys) -> InMemoryServer:
    return InMemoryServer(manifests["classifier"], toys["classifier"])


def test_every_call_and_every_adaptive_answer_is_told(
    server: InMemoryServer, policy: CascadePolicy
) -> None:
    notes = Notes()
    client = Client(server, options=Options(observer=notes, max_batch_size=16))
    answer = client.classify_adaptive(ROWS)
    client.embed(ROWS, dim=4)
    client.classify_adaptive(ROWS, policy)  # the caller's policy has no holdout in the manifest
    assert sorted(s for s, *_ in notes.calls) == sorted(call.signature for call in server.calls)
    assert all(seconds >= 0 and error is None for _, seconds, error in notes.calls)
    ((model, manifest, told),) = notes.answers
    assert (model, manifest) == ("default", server.manifest)
    np.testing.assert_array_equal(told.dim, answer.dim)  # all rows, of all three calls


def test_an_asynchronous_client_tells_the_same(server: InMemoryServer) -> None:
    notes = Notes()

    async def ask() -> Classification:
        async with AsyncClient(server, options=Options(observer=notes)) as client:
            return await client.classify_adaptive(ROWS)

    answer = asyncio.run(ask())
    assert [signature for signature, *_ in notes.calls] == ["describe", "classify_adaptive"]
    assert [told for *_, told in notes.answers] == [answer]


def test_a_call_that_fails_is_told_with_its_error(server: InMemoryServer) -> None:
    failure = ServerError("The server is on fire. Received: smoke. Put it out.")

    def fail(_: Call) -> Any:
        raise failure

    server.answer = fail
    notes = Notes()
    with pytest.raises(ServerError):
        Client(server, options=Options(observer=notes)).classify_adaptive(ROWS)
    assert notes.calls[-1][0] == "classify_adaptive"
    assert notes.calls[-1][2] is failure
    assert notes.answers == []


Points = dict[str, dict[tuple[Any, ...], Any]]


def points_of(reader: Any) -> Points:
    """Every metric's points by the values of their attributes; counts of calls, not seconds."""
    data = reader.get_metrics_data()
    return {
        metric.name: {
            tuple(point.attributes.values()): getattr(point, "count", None) or point.value
            for point in metric.data.data_points
        }
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


@pytest.fixture
def reader() -> Any:
    return pytest.importorskip("opentelemetry.sdk.metrics.export").InMemoryMetricReader()


@pytest.fixture
def metrics(reader: Any) -> OpenTelemetryMetrics:
    from opentelemetry.sdk.metrics import MeterProvider

    return OpenTelemetryMetrics(MeterProvider([reader]))


def serve_a_measured_cascade(server: InMemoryServer, policy: CascadePolicy) -> CascadePolicy:
    logits = np.random.default_rng(1).normal(size=(50, 3, 5))
    measured = replace(policy, holdout=policy.evaluate(logits, np.zeros(50, int)))
    server.manifest = replace(server.manifest, cascade=measured.to_json())
    return measured


def test_metrics_count_calls_exits_and_audits(
    server: InMemoryServer, policy: CascadePolicy, metrics: OpenTelemetryMetrics, reader: Any
) -> None:
    measured = serve_a_measured_cascade(server, policy)
    client = Client(server, options=Options(observer=metrics))
    answer = client.classify_adaptive(ROWS, audit_rate=0.5, audit_seed=1)
    points = points_of(reader)
    assert points["keras_mrl.call.duration"] == {
        ("default", name): number
        for name, number in Counter(call.signature for call in server.calls).items()
    }
    assert points["keras_mrl.rows"] == {
        ("default", "last", dim): (answer.dim == dim).sum() for dim in policy.dims
    }
    assert measured.holdout is not None
    assert points["keras_mrl.holdout.share"] == {
        ("default", "last", dim): share
        for dim, share in zip(policy.dims, measured.holdout.exit_fractions, strict=True)
    }
    assert answer.full_class_ids is not None
    audited = answer.audited
    agrees = answer.full_class_ids[audited] == answer.class_ids[audited, 0]
    assert 0 < agrees.sum() < len(agrees)
    assert points["keras_mrl.audited_rows"] == {
        ("default", "yes"): agrees.sum(),
        ("default", "no"): len(agrees) - agrees.sum(),
    }


def test_the_dashboard_asks_for_what_the_metrics_give(
    server: InMemoryServer, policy: CascadePolicy, metrics: OpenTelemetryMetrics, reader: Any
) -> None:
    serve_a_measured_cascade(server, policy)
    client = Client(server, options=Options(observer=metrics))
    client.classify_adaptive(ROWS, audit_rate=0.5, audit_seed=1)
    with pytest.raises(KerasMrlError):
        Client(server, model="birds", options=Options(observer=metrics)).describe()
    given = labels_by_prometheus_name(reader)
    board = json.loads(files("keras_mrl_serving").joinpath("deploy/grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    own = [query for query in asked if "keras_mrl_" in query]
    names = {name for query in own for name in re.findall(r"keras_mrl_\w+", query)}
    # Nothing it asks for is missing, and nothing that is counted goes unseen.
    assert names <= set(given)
    assert {name for name in given if not name.endswith(("_sum", "_count"))} <= names
    for query in own:
        series = re.findall(r"(keras_mrl_\w+)\{([^}]*)\}", query)
        for name, selector in series:
            assert set(re.findall(r"(\w+)!?=", selector)) <= given[name], query
        grouped = re.findall(r"(?:by|on|ignoring) \(([^)]*)\)", query)
        labels = {label for words in grouped for label in words.split(", ")}
        assert labels <= set.intersection(*(given[name] for name, _ in series)), query


def labels_by_prometheus_name(reader: Any) -> dict[str, set[str]]:
    """The labels of every series, under the name that an exporter for Prometheus gives it.

    Dots become underscores, a unit is written out at the end, a counter ends in `_total`, and a
    histogram is three series.
    """
    named: dict[str, set[str]] = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            unit = {"": "", "s": "_seconds"}[metric.unit]
            name = metric.name.replace(".", "_") + unit
            labels = {label for point in metric.data.data_points for label in point.attributes}
            if hasattr(metric.data.data_points[0], "bucket_counts"):
                named |= {f"{name}_sum": labels, f"{name}_count": labels}
                named[f"{name}_bucket"] = labels | {"le"}
            elif getattr(metric.data, "is_monotonic", False):
                named[f"{name}_total"] = labels
            else:
                named[name] = labels
    return named


def test_metrics_name_the_class_of_an_error(
    server: InMemoryServer, metrics: OpenTelemetryMetrics, reader: Any
) -> None:
    with pytest.raises(KerasMrlError):
        Client(server, model="birds", options=Options(observer=metrics)).describe()
    calls = points_of(reader)["keras_mrl.call.duration"]
    assert calls == {("birds", "describe", "ModelNotFoundError"): 1}


def test_without_opentelemetry_the_client_works_and_metrics_say_what_to_install() -> None:
    program = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from keras_mrl_serving import Client, OpenTelemetryMetrics, Options\n"
        "Client('localhost:1', options=Options())\n"
        "OpenTelemetryMetrics()"
    )
    assert last_error(program) == (
        "ImportError: OpenTelemetryMetrics needs opentelemetry-api. Received: it is not installed. "
        "Install it: pip install 'keras-mrl[opentelemetry]'."
    )
