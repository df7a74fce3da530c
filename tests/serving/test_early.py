"""Queries that an early exit settles are embedded once; the others are asked of the whole model."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import (
    AsyncClient,
    Client,
    EarlyRetrieval,
    EncoderMismatchError,
    ExactIndex,
    FunnelSchedule,
    InvalidInputError,
    Neighbors,
    UnknownExitError,
)
from keras_mrl_serving.calls import Call
from keras_mrl_serving.testing import InMemoryServer
from tests.helpers.manifests import ENCODER, TEXTS

WIDTH, GALLERY = 4, np.eye(4, dtype=np.float32)
EXITS = tuple(
    {"name": name, "layer": None, "parameters": 1, "multiply_adds": work}
    for name, work in (("early", 1.0), ("last", 4.0))
)
MANIFEST = replace(
    ENCODER,
    dims=(2, WIDTH),
    width=WIDTH,
    inputs={"row": {"dtype": "int32", "shape": [None]}},
    exits=EXITS,
)
# What the early exit makes of row i leans to the row after it, the more the higher i is.
LEANING = (0.0, 0.2, 0.9, 1.1)


def answer(call: Call) -> dict[str, Any]:
    rows = call.inputs["row"]
    embedding = GALLERY[rows]
    if call.signature == f"embed_early_{WIDTH}":
        leaning = np.array(LEANING, np.float32)[rows][:, None]
        embedding = embedding + leaning * np.roll(GALLERY, -1, axis=0)[rows]
    return {"embedding": embedding}


def index(fingerprint: str = MANIFEST.fingerprint) -> ExactIndex:
    schedule = FunnelSchedule((WIDTH,), (), k=3)
    return ExactIndex.build(GALLERY, schedule, encoder_fingerprint=fingerprint)


def retrieve(rule: EarlyRetrieval, rows: Any, kind: type, **more: Any) -> tuple[Any, list[Any]]:
    server = InMemoryServer(MANIFEST, answer)
    if kind is Client:
        found = rule.retrieve(Client(server), rows, index(**more))
    else:
        found = asyncio.run(rule.retrieve_async(AsyncClient(server), rows, index(**more)))
    asked = [(c.signature, c.inputs["row"].tolist()) for c in server.calls if "row" in c.inputs]
    return found, asked


BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
ROWS = np.arange(4, dtype=np.int32)


@BOTH
def test_only_queries_without_a_lead_go_on(kind: type) -> None:
    found, asked = retrieve(EarlyRetrieval("early", 0.3), ROWS, kind)
    assert asked == [("embed_early_4", [0, 1, 2, 3]), ("embed_4", [2, 3])]
    assert found.exit.tolist() == ["early", "early", "last", "last"]
    assert found.neighbors.ids[:, 0].tolist() == [0, 1, 2, 3]  # row 3 alone would be 0
    expected = index().search(GALLERY[2:])
    np.testing.assert_array_equal(found.neighbors.scores[2:], expected.scores)


@BOTH
def test_thresholds_at_the_ends_ask_one_exit_or_both_of_all(kind: type) -> None:
    found, asked = retrieve(EarlyRetrieval("early", -np.inf), ROWS, kind)
    assert [name for name, _ in asked] == ["embed_early_4"]
    assert found.neighbors.ids[:, 0].tolist() == [0, 1, 2, 0]
    found, asked = retrieve(EarlyRetrieval("early", np.inf), ROWS, kind)
    assert asked[1] == ("embed_4", [0, 1, 2, 3])
    assert set(found.exit.tolist()) == {"last"}


@BOTH
def test_no_queries_have_no_neighbours(kind: type) -> None:
    found, asked = retrieve(EarlyRetrieval("early", 0.3), ROWS[:0], kind)
    assert (found.neighbors.ids.shape, found.exit.shape) == ((0, 3), (0,))
    assert [name for name, _ in asked] in ([], ["embed_early_4"])


@BOTH
def test_a_gallery_of_another_encoder_and_an_unknown_exit_are_refused(kind: type) -> None:
    with pytest.raises(EncoderMismatchError, match="with fingerprint '5e1f'"):
        retrieve(EarlyRetrieval("early", 0.3), ROWS, kind, fingerprint="c0de")
    with pytest.raises(UnknownExitError, match="'middle'"):
        retrieve(EarlyRetrieval("middle", 0.3), ROWS, kind)
    client: Any = Client(InMemoryServer(MANIFEST, answer))
    no_index: Any = "index"
    with pytest.raises(InvalidInputError, match="An index must be one in this process"):
        EarlyRetrieval("early", 0.3).retrieve(client, ROWS, no_index)


IDS = np.array([[0, 1, 2], [2, 0, 1], [1, 0, 2]])
FOUND = Neighbors(IDS, np.array([[9, 7, 4], [9, 8, 8], [6, 6, 5]], np.float32))


def test_the_lead_is_before_the_nearest_row_of_another_group() -> None:
    alone = EarlyRetrieval("early", 1.5)
    assert alone.lead(FOUND).tolist() == [2, 1, 0]
    assert alone.settled(FOUND).tolist() == [True, False, False]
    for groups in (["a", "a", "b"], np.array([5, 5, 6]), {0: "a", 1: "a", 2: "b"}):
        rule = EarlyRetrieval("early", 1.5, groups)
        assert rule.lead(FOUND).tolist() == [5, 1, 1]
    of_one_group = EarlyRetrieval("early", 1.5, [0, 0, 0])
    assert of_one_group.lead(FOUND).tolist() == [5, 1, 1]  # before the last of them
    with pytest.raises(ValueError, match=r"Received: 1 neighbours of each query"):
        alone.lead(Neighbors(IDS[:, :1], FOUND.scores[:, :1]))
    with pytest.raises(ValueError, match="A threshold is a number"):
        EarlyRetrieval("early", np.nan)


def holdout(leads: Any, early: Any, last: Any) -> tuple[Neighbors, Neighbors]:
    """Neighbours whose first has the given id, and the given lead before a row of its own."""
    leads = np.array(leads, np.float32)
    scores = np.stack([np.zeros_like(leads), -leads], axis=1)
    others = np.full(len(leads), 99)
    return tuple(  # type: ignore[return-value]
        Neighbors(np.stack([np.array(own), others], axis=1), scores) for own in (early, last)
    )


def test_the_lowest_threshold_that_loses_little_is_learned() -> None:
    early, last = holdout([5, 4, 3, 2, 1], [0, 1, 7, 8, 4], [0, 1, 2, 8, 4])
    # One of five is lost as soon as the third stops early, and nothing is won back.
    for loss, expected in ((0.0, 4.0), (0.19, 4.0), (0.2, 1.0), (1.0, 1.0)):
        assert EarlyRetrieval.learn("early", early, last, loss=loss).threshold == expected
    # With labels the early exit may be right where the last is wrong.
    groups = dict.fromkeys(range(100), "other") | {0: "a", 7: "a"}
    labels = ["a", "x", "a", "x", "x"]
    rule = EarlyRetrieval.learn("early", early, last, labels, groups, loss=0.0)
    assert rule.threshold == 1.0
    assert rule.groups is groups
    worse, best = holdout([1, 1], [7, 7], [0, 1])
    assert EarlyRetrieval.learn("early", worse, best, loss=0.5).threshold == np.inf


def test_queries_of_one_lead_stop_together() -> None:
    early, last = holdout([2, 2, 2, 1], [0, 1, 9, 3], [0, 1, 2, 3])
    assert EarlyRetrieval.learn("early", early, last, loss=0.0).threshold == np.inf


def test_what_no_threshold_can_be_learned_on_is_refused() -> None:
    early, last = holdout([2, 1], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="Received: 2 queries at the early exit and 1 at the last"):
        EarlyRetrieval.learn("early", early, last[:1])
    with pytest.raises(ValueError, match="with 3 labels"):
        EarlyRetrieval.learn("early", early, last, [0, 1, 2], [0] * 100)
    with pytest.raises(ValueError, match="labels without groups"):
        EarlyRetrieval.learn("early", early, last, [0, 1])
    with pytest.raises(ValueError, match="Received: 0 queries"):
        EarlyRetrieval.learn("early", early[:0], last[:0])


@BOTH
def test_texts_are_asked_with_the_prompt_of_queries(kind: type) -> None:
    preprocessor = {**(TEXTS.preprocessor or {}), "prompts": {"query": "query: "}}
    manifest = replace(MANIFEST, inputs=TEXTS.inputs, preprocessor=preprocessor)
    [name] = TEXTS.inputs

    def embedded(call: Call) -> dict[str, Any]:
        return {"embedding": GALLERY[: call.inputs[name].size]}

    server = InMemoryServer(manifest, embedded)
    rule = EarlyRetrieval("early", np.inf)
    if kind is Client:
        rule.retrieve(Client(server), ["owls", "jays"], index())
    else:
        asyncio.run(rule.retrieve_async(AsyncClient(server), ["owls", "jays"], index()))
    asked = [call.inputs[name].tolist() for call in server.calls if name in call.inputs]
    assert asked == [["query: owls", "query: jays"]] * 2
