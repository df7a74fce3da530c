"""What a client puts before texts, and which galleries it searches by them."""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import ExactIndex, Options
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import EncoderMismatchError, InvalidInputError, UnknownPromptError
from keras_mrl_serving.prompts import check_gallery_prompt, put_before, text_of
from keras_mrl_serving.testing import InMemoryServer
from tests.helpers.manifests import INDEX
from tests.helpers.text_servers import (
    PAIR,
    PROMPTS,
    TextServer,
    classifier_of_texts,
    text_index,
    text_manifest,
    vectors_of,
)

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]
Ask = Callable[..., Any]  # a method of the client, by its name, and its arguments

BIRDS = ["owls see at night", "jays bury acorns", "swifts sleep on the wing", "rails run"]
PLAIN: dict[str, str] = {}


def ask(server: InMemoryServer, method: str, *args: Any, **kwargs: Any) -> Any:
    """The answer of both clients, which must be one."""
    answer = getattr(Client(server), method)(*args, **kwargs)

    async def ask_async() -> Any:
        async with AsyncClient(server) as client:
            return await getattr(client, method)(*args, **kwargs)

    again = asyncio.run(ask_async())
    if hasattr(answer, "ids"):
        np.testing.assert_array_equal(again.ids, answer.ids)
    elif hasattr(answer, "class_ids"):
        np.testing.assert_array_equal(again.class_ids, answer.class_ids)
    else:
        np.testing.assert_array_equal(again, answer)
    return answer


# Which texts are sent.


@pytest.mark.parametrize(
    ("prompt", "before"), [("query", "query: "), ("passage", "passage: "), (None, "")]
)
def test_a_named_prompt_is_put_before_each_text(prompt: str | None, before: str) -> None:
    server = TextServer(text_manifest())
    embedding = ask(server, "embed", BIRDS, 8, prompt=prompt)
    assert server.texts == [before + text for text in BIRDS] * 2
    np.testing.assert_array_equal(embedding, vectors_of([before + text for text in BIRDS], 8))


@pytest.mark.parametrize(
    "texts",
    [
        ["äöü", "🦉"],
        ("äöü", "🦉"),
        [b"\xc3\xa4\xc3\xb6\xc3\xbc", "🦉"],
        np.array(["äöü", "🦉"]),
        np.array(["äöü".encode(), "🦉".encode()]),
        np.array(["äöü", "🦉".encode()], object),
        {"text": ["äöü", "🦉"]},
        {"text": np.array(["äöü", "🦉"], object)},
    ],
    ids=repr,
)
def test_texts_are_given_as_any_strings(texts: Any) -> None:
    server = TextServer(text_manifest())
    expected = vectors_of(["query: äöü", "query: 🦉"], 8)
    np.testing.assert_array_equal(ask(server, "embed", texts, 8, prompt="query"), expected)


@pytest.mark.parametrize("text", ["owls", b"owls", "", np.str_("owls")])
def test_one_text_is_a_batch_of_one(text: Any) -> None:
    server = TextServer(classifier_of_texts(), text_index(BIRDS, "passage: "))
    embedding = ask(server, "embed", text, 8, prompt="query")
    assert embedding.shape == (1, 8)
    for method, args in (("classify", (8,)), ("classify_adaptive", ())):
        assert len(ask(server, method, text, *args)) == 1
    plain = InMemoryServer(replace(text_manifest(), preprocessor=None), server.answer)
    with pytest.raises(InvalidInputError, match=r"Give a batch: for one row, \[x\]"):
        Client(plain).embed(text, 8)


ODD: dict[str, str | bytes] = {
    "empty": "",
    "long": "owl " * 2500,
    "zero bytes": "a\0b\0",
    "emoji": "👩🏽‍🚀🏳️‍🌈",
    "right to left": "\u202e\u05d0\u05d1",
    "no UTF-8": b"\xff\xfeowl\xc3",
    "line ends": "a\r\nb\u2028",
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("prompt", ["query", None])
def test_odd_texts_are_sent_whole(name: str, prompt: str | None) -> None:
    server = TextServer(text_manifest())
    before = text_of(prompt, server.manifest)
    ask(server, "embed", [ODD[name], "b"], 8, prompt=prompt)
    (sent, _, again, _) = (t if isinstance(t, bytes) else t.encode() for t in server.texts)
    text = ODD[name]
    assert sent == again == before.encode() + (text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize("prompt", ["query", None])
def test_half_of_a_surrogate_pair_is_no_text(prompt: str | None, refuses: Refuses) -> None:
    server = TextServer(text_manifest())
    text = (
        "Input 'text' must be text that UTF-8 can hold, or bytes. Received: object of shape (2,), "
        "with half of a surrogate pair in 'a\\ud83d'. Read the text with errors='replace', or give "
        "its bytes."
    )
    with refuses(InvalidInputError, text):
        Client(server).embed(["b", "a\ud83d"], 8, prompt=prompt)


@pytest.mark.parametrize("texts", [[None], [3], np.array([1.5]), ["a", float("nan")], None])
def test_what_is_no_text_is_refused(texts: Any) -> None:
    with pytest.raises(InvalidInputError, match="must be"):
        Client(TextServer(text_manifest())).embed(texts, 8, prompt="query")


def test_no_texts_have_no_embeddings() -> None:
    assert ask(TextServer(text_manifest()), "embed", [], 8, prompt="query").shape == (0, 8)


def test_a_prompt_that_the_model_lacks_is_refused_before_anything_is_sent() -> None:
    server = TextServer(text_manifest())
    with pytest.raises(UnknownPromptError, match="Choose one of query, passage"):
        Client(server).embed(BIRDS, 8, prompt="title")
    plain = TextServer(text_manifest(PLAIN))
    with pytest.raises(UnknownPromptError, match=r"has none\. Leave prompt out"):
        Client(plain).embed(BIRDS, 8, prompt="query")
    assert server.texts == plain.texts == []


def test_a_model_that_takes_no_texts_has_no_prompts(
    manifests: Mapping[str, Manifest], toys: Mapping[str, Any]
) -> None:
    server = InMemoryServer(manifests["classifier"], toys["classifier"])
    with pytest.raises(UnknownPromptError, match="Only a model with prompts takes one"):
        Client(server).embed(np.ones((2, 4)), 8, prompt="query")
    assert Client(server).embed(np.ones((2, 4)), 8, prompt=None).shape == (2, 8)


def test_many_texts_are_split_with_their_prompts() -> None:
    """A message has room for the prompts, too."""
    server = TextServer(text_manifest({"query": "q" * 1000}))
    options = Options(max_message_bytes=8192)
    texts = [f"{number}" for number in range(30)]
    embedding = Client(server, options=options).embed(texts, 8, prompt="query")
    np.testing.assert_array_equal(embedding, vectors_of(["q" * 1000 + t for t in texts], 8))
    sizes = [len(call.inputs["text"]) for call in server.calls if "text" in call.inputs]
    assert len(sizes) > 1
    assert 1000 * max(sizes) < 8192


def test_a_new_version_with_other_prompts_is_asked_by_its_own() -> None:
    server = TextServer(text_manifest())
    client = Client(server)
    client.embed(BIRDS, 8, prompt="query")
    server.manifest = text_manifest({"query": "search: "}, fingerprint="c0de")
    server.version = 2
    embedding = client.embed(BIRDS, 8, prompt="query")
    np.testing.assert_array_equal(embedding, vectors_of(["search: " + t for t in BIRDS], 8))
    server.manifest, server.version = text_manifest(PLAIN, fingerprint="dead"), 3
    with pytest.raises(UnknownPromptError, match="which has none"):
        client.embed(BIRDS, 8, prompt="query")


def test_a_prompt_that_a_new_version_has_is_asked_for() -> None:
    server = TextServer(text_manifest(PLAIN))
    client = Client(server)
    client.embed(BIRDS, 8)
    server.manifest, server.version = text_manifest(fingerprint="c0de"), 2
    embedding = client.embed(BIRDS, 8, prompt="query")
    np.testing.assert_array_equal(embedding, vectors_of(["query: " + t for t in BIRDS], 8))


# Which texts are searched for.


@pytest.mark.parametrize(
    ("arguments", "before"),
    [({}, "query: "), ({"prompt": "passage"}, "passage: "), ({"prompt": None}, "")],
)
def test_what_is_searched_for_has_the_prompt_of_queries(
    arguments: dict[str, Any], before: str
) -> None:
    index = text_index(BIRDS, "passage: ")
    server = TextServer(text_manifest(), index)
    server.manifest = replace(
        server.manifest, kind="index", funnel=PAIR.to_json(), size=4, prompt="passage: "
    )
    queries = ["who sees at night?", "who buries acorns?"]
    expected = index.search(vectors_of([before + text for text in queries]))
    one_call = ask(server, "retrieve", queries, **arguments)
    two_calls = ask(server, "retrieve", queries, index, **arguments)
    for neighbors in (one_call, two_calls):
        np.testing.assert_array_equal(neighbors.ids, expected.ids)
    assert set(server.texts) == {before + text for text in queries}


def test_many_texts_are_searched_for_in_parts() -> None:
    index = text_index(BIRDS, "passage: ")
    client = Client(TextServer(text_manifest()), options=Options(max_batch_size=1))
    whole = index.search(vectors_of(["query: " + text for text in BIRDS]))
    np.testing.assert_array_equal(client.retrieve(BIRDS, index).ids, whole.ids)


def test_a_model_without_prompts_searches_for_texts_as_they_are() -> None:
    server = TextServer(text_manifest({"title": "title: "}))
    ask(server, "retrieve", BIRDS[:2], text_index(BIRDS))
    assert server.texts == BIRDS[:2] * 2
    with pytest.raises(UnknownPromptError, match="Choose one of title"):
        Client(server).retrieve(BIRDS[:2], text_index(BIRDS), prompt="query")


# Which galleries are searched.

OTHER = (
    "The gallery of an index is embedded with a prompt that the model of its queries has. "
    "Received: an index whose gallery had 'doc: ', for a model with the prompts: {}. {}"
)
NONE = (
    "The gallery of a model with a prompt for galleries is embedded with that prompt. Received: an "
    "index whose gallery had none, for a model with the prompt {0!r}, '{0}: '. Embed the gallery "
    "with prompt={0!r}, and build the index with prompt=manifest.prompts[{0!r}]."
)
EMBED_WITH = (
    "Embed the gallery with prompt={0!r}, and build the index with prompt=manifest.prompts[{0!r}]."
)


def test_galleries_with_a_prompt_of_the_model_are_searched() -> None:
    for prompt in ("query: ", "passage: "):
        check_gallery_prompt(prompt, PROMPTS)
    for none in (None, ""):
        check_gallery_prompt(none, PLAIN)
        check_gallery_prompt(none, {"query": "query: "})
        check_gallery_prompt(none, {"query": "Represent this: ", "passage": ""})


@pytest.mark.parametrize(
    ("prompts", "names", "remedy"),
    [
        (PROMPTS, "query 'query: ', passage 'passage: '", EMBED_WITH.format("passage")),
        ({"query": "q: ", "document": "d: "}, "query 'q: ', document 'd: '", "document"),
        ({"query": "q: "}, "query 'q: '", "query"),
        (PLAIN, "none", "Embed the gallery without a prompt, and build the index without one."),
    ],
)
def test_a_prompt_that_the_model_lacks_makes_another_gallery(
    prompts: dict[str, str], names: str, remedy: str, refuses: Refuses
) -> None:
    remedy = remedy if " " in remedy else EMBED_WITH.format(remedy)
    with refuses(EncoderMismatchError, OTHER.format(names, remedy)):
        check_gallery_prompt("doc: ", prompts)


@pytest.mark.parametrize("name", ["passage", "document"])
def test_a_gallery_without_its_prompt_is_another_gallery(name: str, refuses: Refuses) -> None:
    for none in (None, ""):
        with refuses(EncoderMismatchError, NONE.format(name)):
            check_gallery_prompt(none, {"query": "query: ", name: f"{name}: "})


def client_of(kind: str) -> tuple[Any, Callable[[Any], Any]]:
    """A class of client, and what runs the answer of one of its methods."""
    return (Client, lambda answer: answer) if kind == "sync" else (AsyncClient, asyncio.run)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("is_served", [False, True])
def test_both_clients_refuse_the_gallery_of_another_prompt(
    kind: str, is_served: bool, refuses: Refuses
) -> None:
    new_client, run = client_of(kind)
    names = "query 'query: ', passage 'passage: '"
    for prompt, text in (
        ("doc: ", OTHER.format(names, EMBED_WITH.format("passage"))),
        (None, NONE.format("passage")),
    ):
        index: Any = text_index(BIRDS, prompt, encoder_fingerprint="5e1f")
        if is_served:
            manifest = replace(INDEX, prompt=prompt)
            index = new_client(InMemoryServer(manifest, lambda _: None))
        client = new_client(TextServer(text_manifest()))
        with refuses(EncoderMismatchError, text):
            run(client.retrieve(BIRDS, index))


def test_another_tokenizer_is_another_encoder() -> None:
    """The fingerprint covers the vocabulary and all settings of the preprocessor."""
    index = text_index(BIRDS, "passage: ", encoder_fingerprint="dead")
    with pytest.raises(EncoderMismatchError, match="the encoder it was built with"):
        Client(TextServer(text_manifest())).retrieve(BIRDS, index)


def test_an_index_of_another_making_needs_no_prompt() -> None:
    class Own:
        width, encoder_fingerprint = 64, None

        def search(self, queries: Any, k: Any = None, among: Any = None, only: Any = None) -> Any:
            return text_index(BIRDS).search(queries, k, among, only)

    index: Any = Own()
    assert len(Client(TextServer(text_manifest(PLAIN))).retrieve(BIRDS, index)) == 4


def test_the_gallery_of_two_towers_has_a_prompt_of_its_own_tower() -> None:
    gallery = {"inputs": text_manifest().inputs, "preprocessor": text_manifest().preprocessor}
    two = text_manifest({"query": "find: "}, other_tower=gallery)
    server = TextServer(two)
    answer = server.answer
    server.answer = lambda call: answer(
        replace(call, signature=call.signature.replace("_other", ""))
    )
    ask(server, "embed", BIRDS, 8, prompt="passage", other_tower=True)
    assert server.texts == ["passage: " + text for text in BIRDS] * 2
    with pytest.raises(UnknownPromptError, match="Choose one of query"):
        Client(server).embed(BIRDS, 8, prompt="passage")
    ask(server, "retrieve", BIRDS, text_index(BIRDS, "passage: "))
    with pytest.raises(EncoderMismatchError, match="whose gallery had 'find: '"):
        Client(server).retrieve(BIRDS, text_index(BIRDS, "find: "))


# A gallery on disk.


def test_a_gallery_is_embedded_to_disk_with_its_prompt(tmp_path: Path) -> None:
    server = TextServer(text_manifest())
    texts = np.array(BIRDS * 5, object)
    for name, given in itertools.product(("sync", "async"), (texts, texts.tolist(), [BIRDS] * 5)):
        new_client, run = client_of(name)
        client, path = new_client(server), tmp_path / f"{name}{len(given)}{type(given).__name__}"
        rows = run(client.embed_dataset(given, 8, path, prompt="passage"))
        np.testing.assert_array_equal(rows, vectors_of(["passage: " + t for t in texts], 8))
    with pytest.raises(UnknownPromptError):
        Client(server).embed_dataset(texts, 8, tmp_path / "other", prompt="title")
    gap: Any = None
    with pytest.raises(InvalidInputError, match="with a NoneType"):
        Client(server).embed_dataset(["owls", gap], 8, tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


def test_a_gallery_goes_on_with_the_prompt_it_was_begun_with(
    tmp_path: Path, refuses: Refuses
) -> None:
    server = TextServer(text_manifest())
    path, texts = tmp_path / "E.npy", np.array(BIRDS * 4, object)
    client = Client(server, options=Options(max_batch_size=1, max_in_flight=2))  # windows of 4

    def interrupt(rows: int, _: object) -> None:
        if rows >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.embed_dataset(texts, 8, path, prompt="passage", progress=interrupt)
    text = (
        f"All rows of a file are made alike. Received: prompt='' for {path}.partial, begun with "
        f"prompt='passage: '. Give what it was begun with, or remove {path}.partial and "
        f"{path}.partial.json."
    )
    with refuses(ValueError, text):
        client.embed_dataset(texts, 8, path)
    sent_before = len(server.texts)
    rows = client.embed_dataset(texts, 8, path, prompt="passage")
    np.testing.assert_array_equal(rows, vectors_of(["passage: " + t for t in texts], 8))
    assert len(server.texts) - sent_before == 8


def test_a_prompt_is_put_before_strings_of_every_kind() -> None:
    for texts in (np.array(["a", "b"]), np.array([b"a", b"b"]), np.array(["a", b"b"], object)):
        prompted = put_before("¿", texts)
        assert [t if isinstance(t, bytes) else t.encode() for t in prompted] == [
            *("¿a".encode(), "¿b".encode())
        ]
        assert put_before("", texts) is texts


def test_an_index_in_this_process_is_built_with_the_text_of_the_prompt() -> None:
    server = TextServer(text_manifest())
    manifest = Client(server).describe()
    gallery = Client(server).embed(BIRDS, manifest.width, prompt="passage")
    index = ExactIndex.build(
        gallery,
        PAIR,
        encoder_fingerprint=manifest.fingerprint,
        prompt=manifest.prompts["passage"],
    )
    assert len(ask(server, "retrieve", BIRDS, index)) == len(BIRDS)
