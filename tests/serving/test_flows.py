"""Flows driven by models that are functions: which calls are made, and what becomes of answers."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import flows
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import (
    InvalidInputError,
    KerasMrlError,
    ManifestError,
    ServerError,
    UnknownDimError,
    UnknownExitError,
)
from keras_mrl_serving.flows import Arrays, Call, Flow
from tests.helpers.driven_flows import ROWS, Model, drive, refused_unasked, with_value
from tests.helpers.manifests import DEPTHS, REGRESSOR

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]


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


def test_embeddings_of_an_exit_are_asked_by_its_signature(refuses: Refuses) -> None:
    manifest = replace(DEPTHS, inputs={"x": {"dtype": "float32", "shape": [None, 4]}})
    embedding, [call] = drive(
        flows.embed(manifest, ROWS, 8, exit="conv3_out"), lambda _: {"embedding": np.ones((40, 8))}
    )
    assert (call.signature, embedding.shape) == ("embed_conv3_out_8", (40, 8))
    assert next(flows.embed(manifest, ROWS, 8, exit="last")).signature == "embed_8"  # type: ignore[union-attr]
    with pytest.raises(UnknownExitError):
        next(flows.embed(manifest, ROWS, 8, exit="conv4_out"))
    text = (
        "Exits are of the tower of queries. Received: exit='conv3_out' and other_tower=True. "
        "Leave one of them out."
    )
    with refuses(InvalidInputError, text):
        next(flows.embed(manifest, ROWS, 8, other_tower=True, exit="conv3_out"))


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


@pytest.mark.parametrize(
    ("start", "error"),
    [
        (lambda m: flows.embed(m["encoder"], ROWS, 3), UnknownDimError),
        (lambda m: flows.embed(m["encoder"], ROWS[0], 2), InvalidInputError),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_asked(
    start: Callable[[Mapping[str, Manifest]], Flow[Any]],
    error: type[KerasMrlError],
    manifests: Mapping[str, Manifest],
) -> None:
    refused_unasked(start(manifests), error)


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
