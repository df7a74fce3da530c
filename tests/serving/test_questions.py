"""Rows split into calls: every row once, in order, no call larger than it may be."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving import questions
from keras_mrl_serving.calls import Call
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import InvalidInputError, UnreadableImageError
from keras_mrl_serving.flows import Arrays
from keras_mrl_serving.options import Options
from keras_mrl_serving.testing import InMemoryServer
from tests.helpers.image_files import files
from tests.helpers.manifests import DEPTHS, TEXTS

Model = Callable[[Call], Arrays]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]


def manifest(**inputs: list[int | None]) -> Manifest:
    specs = {name: {"dtype": "float32", "shape": shape} for name, shape in inputs.items()}
    return Manifest(
        name="toy",
        kind="encoder",
        fingerprint="5e1f",
        dims=(2, 8),
        width=8,
        inputs=specs,
        made_with={},
    )


@given(
    rows=st.integers(0, 50),
    batch=st.none() | st.integers(1, 20),
    megabytes=st.none() | st.integers(1, 2000),
)
def test_parts_are_the_rows_in_order_and_each_fits(
    rows: int, batch: int | None, megabytes: int | None
) -> None:
    x = np.arange(rows * 6, dtype=np.float32).reshape(rows, 6)
    y = -x[:, :2]
    options = Options(max_batch_size=batch, max_message_bytes=megabytes)
    question = questions.embed({"x": x, "y": y}, dim=2)
    parts: list[Any] = question.parts(manifest(x=[None, 6], y=[None, 2]), options)
    np.testing.assert_array_equal(np.concatenate([part["x"] for part in parts]), x)
    np.testing.assert_array_equal(np.concatenate([part["y"] for part in parts]), y)
    assert all(len(part["x"]) for part in parts) or rows == 0
    for part in parts:
        assert batch is None or len(part["x"]) <= batch
        sent = sum(array.nbytes for array in part.values())
        assert megabytes is None or sent <= megabytes or len(part["x"]) == 1


def test_by_default_answers_stay_below_256_mebibytes() -> None:
    rows, dim = np.zeros((100, 1), np.float32), 2**20
    facts = replace(manifest(x=[None, 1]), dims=(dim,), width=dim)
    parts: list[Any] = questions.embed(rows, dim).parts(facts, Options())
    assert [len(part["x"]) for part in parts] == [63, 37]  # of 4 MiB a row


def test_answers_larger_than_the_rows_are_counted() -> None:
    question = questions.embed(np.zeros((10, 1), np.float32), dim=8)
    parts = question.parts(manifest(x=[None, 1]), Options(max_message_bytes=1024 + 64))
    assert len(parts) == 5  # two embeddings of 32 bytes


def test_strings_are_as_large_as_the_longest() -> None:
    texts = Manifest(
        name="toy",
        kind="encoder",
        fingerprint="5e1f",
        dims=(2,),
        width=2,
        made_with={},
        inputs={"jpeg": {"dtype": "string", "shape": [None]}},
    )
    question = questions.embed([b"x" * 100, b"", b"x"], dim=2)
    assert len(question.parts(texts, Options(max_message_bytes=1024 + 215))) == 2
    assert len(question.parts(texts, Options(max_message_bytes=1024 + 315))) == 1


@pytest.mark.parametrize("batch", [1, 7, 39, 40, 41])
def test_whole_and_split_answers_are_one(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest], batch: int
) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 4))
    server = InMemoryServer(manifests["classifier"], toys["classifier"])
    whole = Client(server).classify_adaptive(rows)
    server.calls.clear()
    split = Client(server, options=Options(max_batch_size=batch)).classify_adaptive(rows)
    np.testing.assert_array_equal(split.class_ids, whole.class_ids)
    np.testing.assert_array_equal(split.dim, whole.dim)
    np.testing.assert_allclose(split.probabilities, whole.probabilities, rtol=0, atol=1e-6)
    assert split.labels is not None
    assert whole.labels is not None
    assert split.labels.tolist() == whole.labels.tolist()
    sizes = [len(call.inputs["x"]) for call in server.calls if call.signature != "describe"]
    assert sorted(sizes, reverse=True)[:-1] == [batch] * (len(sizes) - 1)
    assert sum(sizes) == 40


@pytest.mark.parametrize("policy", [None, CascadePolicy((Stage(2, 0.5), Stage(8, None)))])
def test_the_same_rows_are_audited_however_they_are_split(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest], policy: CascadePolicy | None
) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 4))
    server = InMemoryServer(manifests["classifier"], toys["classifier"])
    answers = [
        Client(server, options=Options(max_batch_size=batch)).classify_adaptive(
            rows, policy, audit_rate=0.5, audit_seed=3
        )
        for batch in (None, 1, 7)
    ]
    assert 5 < len(answers[0].audited) < 35
    for answer in answers[1:]:
        np.testing.assert_array_equal(answer.full_class_ids, answers[0].full_class_ids)


@pytest.mark.parametrize("seed", [None, 3, np.random.default_rng(3)])
def test_the_same_rows_are_audited_where_an_answer_starts_over(seed: Any) -> None:
    question = questions.classify_adaptive(np.zeros((40, 4)), rate=0.5, seed=seed)
    [first], [again] = (question.columns(40).values() for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_what_is_predicted_is_never_split() -> None:
    question = questions.predict(np.zeros((5, 4)), "serving_default")
    assert question.parts({}, Options(max_batch_size=2)) == [question.inputs]


def test_rows_of_a_model_that_decodes_images_are_whole_image_files() -> None:
    model = replace(
        manifest(), inputs={"image": {"dtype": "string", "shape": [None]}}, decoder={"size": [8, 8]}
    )
    whole = files()["baseline-0.jpg"]
    truncated = "An image file must be a whole JPEG, PNG, GIF, BMP or WebP. Received: row 1 (image "
    cases: list[tuple[Any, str]] = [
        ([whole, whole[:-60]], truncated),
        ([whole, "up.jpg"], "An image file is given as its bytes. Received: row 1, a str. Read "),
        (np.array(["up.jpg"]), "An image file is given as its bytes. Received: row 0, a str. "),
    ]
    for images, sentence in cases:
        with pytest.raises(UnreadableImageError) as caught:
            questions.embed(images, 8).parts(model, Options())
        assert str(caught.value).startswith(sentence)


def test_images_of_the_other_tower_are_those_that_it_decodes() -> None:
    text = {"inputs": {"caption": {"dtype": "string", "shape": [None]}}}
    photos = replace(
        manifest(),
        inputs={"inputs": {"dtype": "string", "shape": [None]}},
        decoder={"height": 8},
        other_tower=text,
    )
    captions = questions.embed(["a bird"], 8, other_tower=True)
    parts: list[Any] = captions.parts(photos, Options())
    assert parts[0]["caption"].tolist() == ["a bird"]
    with pytest.raises(UnreadableImageError):
        questions.embed([b"a bird"], 8).parts(photos, Options())
    texts = replace(
        photos,
        inputs=text["inputs"],
        decoder=None,
        other_tower={"inputs": photos.inputs, "decoder": {"height": 8}},
    )
    assert questions.embed(["a bird"], 8).parts(texts, Options())
    with pytest.raises(UnreadableImageError):
        questions.embed([b"a bird"], 8, other_tower=True).parts(texts, Options())


@pytest.mark.parametrize("given", [{"caption": ["a"]}, {"image": np.zeros((1, 3))}])
def test_rows_of_the_other_side_are_named(given: Any, refuses: Refuses) -> None:
    """Whichever question gets them."""
    two = replace(
        manifest(image=[None, 3]),
        other_tower={"inputs": {"caption": {"dtype": "string", "shape": [None]}}},
    )
    of_gallery = "caption" in given
    refusal = (
        "Each tower of a model takes the rows of its own side. Received: rows that the other "
        f"tower takes, as {'caption' if of_gallery else 'image'}. Embed rows of galleries with "
        "other_tower=True, and rows of queries without."
    )
    asked: list[Any] = [questions.embed(given, 8, not of_gallery)]
    if of_gallery:
        asked += [questions.retrieve(given), questions.embed_with_fingerprint(given, 8)]
    for question in asked:
        with refuses(InvalidInputError, refusal):
            question.parts(two, Options())
    with pytest.raises(InvalidInputError, match="must be named"):
        questions.embed({"neither": [0]}, 8).parts(two, Options())


def test_models_whose_other_towers_differ_take_other_calls() -> None:
    one = replace(manifest(x=[None, 1]), other_tower={"inputs": manifest(y=[None, 1]).inputs})
    assert questions.same_interface(one, replace(one, fingerprint="c0de"))
    other = replace(one, other_tower={"inputs": manifest(z=[None, 1]).inputs})
    assert not questions.same_interface(one, other)


def test_models_whose_stages_or_costs_differ_are_asked_by_their_own_manifest() -> None:
    """Their thresholds alone may differ: an answer is read without them."""

    def changed(**values: Any) -> Manifest:
        cascade = DEPTHS.exit_cascade or {}
        first, *rest = cascade["exit_stages"]
        return replace(
            DEPTHS, exit_cascade={**cascade, "exit_stages": [{**first, **values}, *rest]}
        )

    assert questions.same_interface(DEPTHS, changed(threshold=0.875, temperature=2.0))
    assert not questions.same_interface(DEPTHS, changed(relative_cost=0.875))
    assert not questions.same_interface(DEPTHS, changed(dim=16))
    assert not questions.same_interface(DEPTHS, replace(DEPTHS, exit_cascade=None))
    exits = tuple({**own, "multiply_adds": 7} for own in DEPTHS.exits or ())
    assert not questions.same_interface(DEPTHS, replace(DEPTHS, exits=exits))


def test_the_interface_of_a_model_of_texts_has_its_prompts() -> None:
    """A client puts them before the texts that it sends."""
    assert TEXTS.preprocessor is not None

    def changed(**values: Any) -> Manifest:
        return replace(TEXTS, preprocessor={**(TEXTS.preprocessor or {}), **values})

    assert questions.same_interface(TEXTS, changed(sequence_length=128))
    assert not questions.same_interface(TEXTS, changed(prompts={"query": "search: "}))
