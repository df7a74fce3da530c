"""Flows driven by models that are functions: which calls are made, and what becomes of answers."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving import flows
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import (
    InvalidInputError,
    KerasMrlError,
    ManifestError,
    NoCascadeError,
    NoHeadError,
    ServerError,
    UnknownDimError,
)
from keras_mrl_serving.flows import Arrays, Call, Flow
from keras_mrl_serving.results import Classification
from tests.helpers.manifests import REGRESSOR, TAGS

Array = npt.NDArray[Any]
Model = Callable[[Call], Arrays]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]
T = TypeVar("T")

ROWS = np.random.default_rng(0).normal(size=(40, 4))
TWO = CascadePolicy((Stage(2, 0.5), Stage(8, None)))


def drive(flow: Flow[T], model: Model) -> tuple[T, list[Call]]:
    """Answer every call of a flow; returns its result and the calls."""
    calls = []
    try:
        call = next(flow)
        while True:
            assert isinstance(call, Call)
            calls.append(call)
            call = flow.send(model(call))
    except StopIteration as done:
        return done.value, calls


def columns(answer: Classification) -> dict[str, Array]:
    return {name: column for name, column in vars(answer).items() if column is not None}


@pytest.fixture
def model(toys: Mapping[str, Model]) -> Model:
    return toys["classifier"]


@pytest.fixture
def manifest(manifests: Mapping[str, Manifest]) -> Manifest:
    return manifests["classifier"]


def test_describe_reads_the_manifest(model: Model, manifest: Manifest) -> None:
    described, [call] = drive(flows.describe(), model)
    assert described == manifest
    assert call.signature == "describe"
    assert call.inputs["key"].tolist() == [b""]  # a batch of one: batched servers refuse scalars


def test_describe_refuses_what_is_no_manifest(refuses: Refuses) -> None:
    text = (
        "A manifest is a JSON object with a schema. Received: b'[]' (TypeError: list indices must "
        "be integers or slices, not str). "
        "Export the model again with keras_mrl_export.export_saved_model."
    )
    with refuses(ManifestError, text):
        drive(flows.describe(), lambda _: {"manifest": np.array([b"[]"], object)})


@pytest.mark.parametrize("dim", [4, np.int64(4)])
def test_embed_is_one_call(model: Model, manifest: Manifest, dim: int) -> None:
    embedding, [call] = drive(flows.embed(manifest, ROWS, dim), model)
    assert (call.signature, list(call.inputs), call.outputs) == ("embed_4", ["x"], ())
    assert call.inputs["x"].dtype == np.float32
    assert embedding.shape == (40, 4)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("dim", [4, np.int64(4)])
def test_classify_is_one_call(model: Model, manifest: Manifest, dim: int) -> None:
    answer, [call] = drive(flows.classify(manifest, ROWS, dim), model)
    assert call.signature == "classify_4"
    assert answer.dim.dtype == np.int32
    assert answer.dim.tolist() == [4] * 40
    assert (answer.confidence == answer.probabilities[:, 0]).all()


def test_labels_are_text(model: Model, manifest: Manifest, policy: CascadePolicy) -> None:
    for flow in (
        flows.classify(manifest, ROWS, 4),
        flows.classify_adaptive(manifest, ROWS),
        flows.classify_by(manifest, ROWS, policy),
    ):
        labels = drive(flow, model)[0].labels
        assert labels is not None
        assert labels.shape == (40, 3)
        assert all(isinstance(label, str) for label in labels.flat)
        assert "grüner Specht" in labels


def test_a_model_without_names_gives_none(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest]
) -> None:
    policy = CascadePolicy((Stage(2, 0.7), Stage(16, None)))
    for flow in (
        flows.classify(manifests["successor"], ROWS, 4),
        flows.classify_by(manifests["successor"], ROWS, policy),
    ):
        assert drive(flow, toys["successor"])[0].labels is None


def test_values_are_one_call_of_the_regressor_s_signature() -> None:
    inputs = {"x": {"dtype": "float32", "shape": [None, 4]}}
    manifest = replace(REGRESSOR, inputs=inputs)
    values = np.arange(80.0).reshape(40, 2)
    answer, [call] = drive(flows.regress(manifest, ROWS, 16), lambda _: {"values": values})
    assert call.signature == "regress_16"
    np.testing.assert_array_equal(answer, values.astype(np.float32), strict=True)
    with pytest.raises(ServerError, match=r"\AValues must be finite. Received: NaN or infinity in"):
        drive(flows.regress(manifest, ROWS, 16), lambda _: {"values": values * np.nan})
    with pytest.raises(UnknownDimError):
        drive(flows.regress(manifest, ROWS, 17), lambda _: {"values": values})


def test_no_policy_of_the_caller_s_decides_rows_of_several_classes(policy: CascadePolicy) -> None:
    with pytest.raises(NoCascadeError, match=r"\AA cascade decides which one class a row has"):
        next(flows.classify_by(TAGS, ROWS, policy))
    with pytest.raises(NoHeadError, match=r"\AOnly a model with classes can classify"):
        next(flows.classify_by(REGRESSOR, ROWS, policy))


def test_classify_adaptive_is_one_call(model: Model, manifest: Manifest) -> None:
    answer, [call] = drive(flows.classify_adaptive(manifest, ROWS), model)
    assert call.signature == "classify_adaptive"
    assert set(answer.dim.tolist()) == {2, 4, 8}


def test_the_caller_s_policy_answers_as_the_same_policy_in_the_model(
    model: Model, manifest: Manifest, policy: CascadePolicy
) -> None:
    in_model = columns(drive(flows.classify_adaptive(manifest, ROWS), model)[0])
    by_caller = columns(drive(flows.classify_by(manifest, ROWS, policy), model)[0])
    assert in_model.keys() == by_caller.keys()
    for name, column in in_model.items():
        if column.dtype == np.float32:
            np.testing.assert_allclose(by_caller[name], column, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(by_caller[name], column)
            assert by_caller[name].dtype == column.dtype


def test_classify_by_asks_the_wider_heads_for_the_rows_still_undecided(
    model: Model, manifest: Manifest, policy: CascadePolicy
) -> None:
    answer, calls = drive(flows.classify_by(manifest, ROWS, policy), model)
    assert [call.signature for call in calls] == ["features", "head_2", "head_4", "head_8"]
    features = model(calls[0])["features"]
    undecided = np.ones(40, bool)
    for call, stage in zip(calls[1:], policy.stages, strict=True):
        np.testing.assert_array_equal(call.inputs["features"], features[undecided, : stage.dim])
        assert call.outputs == ("class_ids", "labels", "logits")
        undecided &= answer.dim != stage.dim
    assert not undecided.any()


@given(
    st.lists(st.integers(0, 39), max_size=12),
    st.tuples(*[st.floats(-0.1, 1.1)] * 2),
    st.sampled_from([(2, 4, 8), (2, 8), (4,)]),
)
def test_every_row_is_answered_in_its_place_by_the_dim_that_is_sure(
    toys: Mapping[str, Model],
    manifests: Mapping[str, Manifest],
    rows: list[int],
    thresholds: tuple[float, float],
    dims: tuple[int, ...],
) -> None:
    model, manifest = toys["classifier"], manifests["classifier"]
    stages = [*thresholds[: len(dims) - 1], None]
    policy = CascadePolicy(tuple(map(Stage, dims, stages)))
    answer, calls = drive(flows.classify_by(manifest, ROWS[rows].reshape(-1, 4), policy), model)
    features = model(calls[0])["features"]
    logits = [model(Call(f"head_{dim}", {"features": features[:, :dim]}))["logits"] for dim in dims]
    if rows:
        class_ids, stage_of = policy.route(np.stack(logits, axis=1))
        assert answer.class_ids[:, 0].tolist() == class_ids.tolist()
        assert answer.dim.tolist() == [dims[stage] for stage in stage_of]
        num_rows = [len(call.inputs["features"]) for call in calls[1:]]
        assert num_rows == [int((stage_of >= s).sum()) for s in range(len(num_rows))]
        assert 0 not in num_rows
    assert [len(column) for column in columns(answer).values()] == [len(rows)] * 5


@pytest.mark.parametrize(
    ("threshold", "signatures", "dim"),
    [
        (-1.0, ["features", "head_2"], 2),
        (0.0, ["features", "head_2"], 2),
        (1.0, ["features", "head_2", "head_4", "head_8"], 8),
        (2.0, ["features", "head_2", "head_4", "head_8"], 8),
    ],
)
def test_thresholds_below_and_above_every_confidence(
    model: Model, manifest: Manifest, threshold: float, signatures: list[str], dim: int
) -> None:
    policy = CascadePolicy((Stage(2, threshold), Stage(4, threshold), Stage(8, None)))
    answer, calls = drive(flows.classify_by(manifest, ROWS, policy), model)
    assert [call.signature for call in calls] == signatures
    assert answer.dim.tolist() == [dim] * 40
    direct, _ = drive(flows.classify(replace(manifest, cascade=None), ROWS, dim), model)
    np.testing.assert_array_equal(answer.class_ids, direct.class_ids)
    np.testing.assert_array_equal(answer.labels, direct.labels)


def test_no_rows_are_no_answers(model: Model, manifest: Manifest, policy: CascadePolicy) -> None:
    answer, calls = drive(flows.classify_by(manifest, ROWS[:0], policy), model)
    assert [call.signature for call in calls] == ["features", "head_2"]
    assert (len(answer), answer.class_ids.shape) == (0, (0, 3))
    assert answer.dim.dtype == np.int32


@pytest.mark.parametrize(
    ("start", "error"),
    [
        (lambda m: flows.embed(m["encoder"], ROWS, 3), UnknownDimError),
        (lambda m: flows.embed(m["encoder"], ROWS[0], 2), InvalidInputError),
        (lambda m: flows.classify(m["encoder"], ROWS, 2), NoHeadError),
        (lambda m: flows.classify(m["classifier"], ROWS, 3), UnknownDimError),
        (lambda m: flows.classify(m["classifier"], ROWS[0], 2), InvalidInputError),
        (lambda m: flows.classify_adaptive(m["encoder"], ROWS), NoHeadError),
        (lambda m: flows.classify_adaptive(m["successor"], ROWS), NoCascadeError),
        (lambda m: flows.classify_adaptive(m["classifier"], ROWS[0]), InvalidInputError),
        (lambda m: flows.classify_by(m["encoder"], ROWS, TWO), NoHeadError),
        (lambda m: flows.classify_by(m["successor"], ROWS, TWO), UnknownDimError),
        (lambda m: flows.classify_by(m["classifier"], ROWS[0], TWO), InvalidInputError),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_asked(
    start: Callable[[Mapping[str, Manifest]], Flow[Any]],
    error: type[KerasMrlError],
    manifests: Mapping[str, Manifest],
) -> None:
    flow = start(manifests)
    with pytest.raises(error) as caught:
        next(flow)
    assert type(caught.value) is error


def test_a_describe_of_another_kind_is_refused() -> None:
    flow = flows.describe()
    next(flow)
    with pytest.raises(ManifestError) as caught:
        flow.send({"text": np.array([b"hello"], dtype=object)})
    assert str(caught.value) == (
        "A signature must answer manifest object (rows,), with a row for each row sent. Received: "
        "text object (1,) for 1 rows of signature 'describe'. "
        "Export the model again with keras_mrl_export.export_saved_model."
    )


@pytest.mark.parametrize(
    ("outputs", "received"),
    [
        ({"embedding": np.zeros((3, 4))}, "embedding float64 (3, 4)"),
        ({"embedding": np.zeros((40, 8))}, "embedding float64 (40, 8)"),
        ({"embedding": np.zeros((40, 4), int)}, "embedding int64 (40, 4)"),
        ({"embeddings": np.zeros((40, 4))}, "embeddings float64 (40, 4)"),
        ({"embedding": np.zeros(())}, "embedding float64 ()"),
        ({}, "nothing"),
    ],
)
def test_an_answer_unlike_the_contract_is_no_answer(
    manifest: Manifest, outputs: Arrays, received: str, refuses: Refuses
) -> None:
    text = (
        "A signature must answer embedding float32 (rows, 4), with a row for each row sent. "
        f"Received: {received} for 40 rows of signature 'embed_4'. "
        "Export the model again with keras_mrl_export.export_saved_model."
    )
    with refuses(ManifestError, text):
        drive(flows.embed(manifest, ROWS, 4), lambda _: outputs)


@pytest.mark.parametrize("name", ["labels", "class_ids", "probabilities", "confidence", "dim"])
def test_every_column_of_a_classification_is_looked_at(
    manifest: Manifest, model: Model, name: str
) -> None:
    def shorter(call: Call) -> Arrays:
        return {n: a[:-1] if n == name else a for n, a in model(call).items()}

    with pytest.raises(ManifestError, match=f"{name} "):
        drive(flows.classify_adaptive(manifest, ROWS), shorter)


CLASSIFY: dict[str, Callable[[Manifest], Flow[Any]]] = {
    "classify_4": lambda m: flows.classify(m, ROWS, 4),
    "classify_adaptive": lambda m: flows.classify_adaptive(m, ROWS),
    "head_2": lambda m: flows.classify_by(m, ROWS, TWO),
}
INDEX = Manifest(
    name="birds",
    kind="index",
    fingerprint="c0de",
    dims=(2, 4),
    width=4,
    inputs={"x": {"dtype": "float32", "shape": [None, 4]}},
    made_with={},
)
SEARCH: dict[str, Callable[[], Flow[Any]]] = {
    "search": lambda: flows.search(INDEX, ROWS),
    "search_2": lambda: flows.search(INDEX, ROWS[:, :2], 2),
    "retrieve": lambda: flows.retrieve(INDEX, ROWS),
}
LOOK = "Look for NaN in the inputs, or train the model to a finite loss."
EXPORT = "Export the model again with keras_mrl_export.export_saved_model."


def with_value(model: Model, name: str, value: object) -> Model:
    """The model, of whose answers row 3 holds another value."""

    def changed(call: Call) -> Arrays:
        answer = {n: np.array(a) for n, a in model(call).items()}
        if name in answer:
            answer[name][3] = value
        return answer

    return changed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["probabilities", "confidence", "logits"])
@pytest.mark.parametrize("signature", CLASSIFY)
def test_classes_are_never_decided_by_nan(
    manifest: Manifest, model: Model, signature: str, name: str, value: float, refuses: Refuses
) -> None:
    if (name == "logits") != (signature == "head_2"):
        return  # a head is asked for logits alone, and nothing else is
    text = (
        f"Classes are decided by finite numbers. Received: NaN or infinity in {name} of signature "
        f"{signature!r}, in 1 of 40 rows, first in row 3. {LOOK}"
    )
    with refuses(ServerError, text):
        drive(CLASSIFY[signature](manifest), with_value(model, name, value))


def test_logits_of_any_finite_size_decide(manifest: Manifest, model: Model) -> None:
    policy = CascadePolicy((Stage(2, -1.0, temperature=1e-30), Stage(8, None)))
    huge = with_value(model, "logits", [3e38, -3e38, 0, 1, 2])
    answer, _ = drive(flows.classify_by(manifest, ROWS, policy), huge)
    assert answer.confidence[3] == 1


@pytest.mark.parametrize("value", [-1, 5, 2**40])
@pytest.mark.parametrize("signature", CLASSIFY)
def test_a_class_is_one_of_the_model_s(
    manifest: Manifest, model: Model, signature: str, value: int
) -> None:
    rule = rf"A row is of at least one class, each in 0\.\.4\. Received: .* signature '{signature}'"
    with pytest.raises(ManifestError, match=rule):
        drive(CLASSIFY[signature](manifest), with_value(model, "class_ids", value))


def test_a_row_is_decided_by_a_dim_of_the_model(
    manifest: Manifest, model: Model, refuses: Refuses
) -> None:
    text = (
        "A row is decided by one of the dims that the model serves, 2, 4, 8. Received: dim 3. "
        f"{EXPORT}"
    )
    with refuses(ManifestError, text):
        drive(flows.classify_adaptive(manifest, ROWS), with_value(model, "dim", 3))


def test_a_manifest_without_top_k_takes_lists_of_one_length(
    manifest: Manifest, model: Model
) -> None:
    def shorter(call: Call) -> Arrays:
        return {n: a[:, :2] if n == "labels" else a for n, a in model(call).items()}

    whole = replace(manifest, top_k=None)
    assert drive(flows.classify(whole, ROWS, 4), model)[0].class_ids.shape == (40, 3)
    with pytest.raises(ManifestError, match=r"^The lists of a row must be of one length\. "):
        drive(flows.classify(whole, ROWS, 4), shorter)


def neighbors(_: Call) -> Arrays:
    return {
        "ids": np.tile(np.array([7, 2]), (40, 1)),
        "scores": np.tile(np.array([0.9, 0.4], np.float32), (40, 1)),
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("signature", SEARCH)
def test_neighbours_are_never_ranked_by_nan(signature: str, value: float, refuses: Refuses) -> None:
    text = (
        "Neighbours are ranked by finite scores. Received: NaN or infinity in scores of signature "
        f"{signature!r}, in 1 of 40 rows, first in row 3. {LOOK}"
    )
    assert len(drive(SEARCH[signature](), neighbors)[0]) == 40
    with refuses(ServerError, text):
        drive(SEARCH[signature](), with_value(neighbors, "scores", value))


@pytest.mark.parametrize("ids", [[7, 7], [7, -1]])
@pytest.mark.parametrize("signature", SEARCH)
def test_neighbours_are_different_rows(signature: str, ids: list[int], refuses: Refuses) -> None:
    text = (
        "The neighbours of a query are different rows, with ids of 0 or more. Received: negative "
        f"or repeated ids from signature {signature!r}. "
        "Export the index again with keras_mrl_export.export_index."
    )
    with refuses(ManifestError, text):
        drive(SEARCH[signature](), with_value(neighbors, "ids", ids))


def test_an_embedding_is_as_the_server_computed_it(manifest: Manifest, model: Model) -> None:
    strange = with_value(model, "embedding", [np.nan, np.inf, -0.0, 1e-45])
    embedding, _ = drive(flows.embed(manifest, ROWS, 4), strange)
    assert embedding[3].tobytes() == np.array([np.nan, np.inf, -0.0, 1e-45], "f4").tobytes()


def test_a_policy_is_a_policy(manifest: Manifest, model: Model, refuses: Refuses) -> None:
    stages: Any = TWO.to_json()
    text = (
        "policy must be a CascadePolicy. Received: dict. Learn one with CascadePolicy.learn, or "
        "read a manifest's with CascadePolicy.from_json."
    )
    with refuses(InvalidInputError, text):
        drive(flows.classify_by(manifest, ROWS, stages), model)
