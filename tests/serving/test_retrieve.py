"""Neighbours from a gallery in this process, a served index, and encoder and index in one."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Call
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import truncate
from keras_mrl_serving.errors import (
    EncoderMismatchError,
    InvalidInputError,
    NoIndexError,
    SignatureNotFoundError,
)
from keras_mrl_serving.flows import Arrays
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.options import Options
from keras_mrl_serving.testing import InMemoryServer

Model = Callable[[Call], Arrays]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(21, 4)).astype(np.float32)
SCHEDULE = FunnelSchedule((2, 4, 8), (12, 6), 3)
IDS = np.arange(30, dtype=np.int64) * 7


@pytest.fixture(scope="module")
def encoder(toys: Mapping[str, Model], manifests: Mapping[str, Manifest]) -> InMemoryServer:
    return InMemoryServer(manifests["classifier"], toys["classifier"])


@pytest.fixture(scope="module")
def gallery(encoder: InMemoryServer) -> Any:
    return Client(encoder).embed(RNG.normal(size=(30, 4)).astype(np.float32), 8)


@pytest.fixture(scope="module")
def index(manifests: Mapping[str, Manifest], gallery: Any) -> InMemoryServer:
    """An index over that gallery, by the contract: a funnel, one exact stage per dim."""
    changes: dict[str, Any] = {
        **{"kind": "index", "size": 30, "fingerprint": "c0de", "encoder_fingerprint": "5e1f"},
        **{"funnel": {"dims": [2, 4, 8], "shortlists": [12, 6], "k": 3}},
        **{"num_classes": None, "top_k": None, "labels": False, "cascade": None},
    }
    manifest = replace(manifests["classifier"], **changes)
    funnel = ExactIndex.build(gallery, SCHEDULE, IDS)

    def answer(call: Call) -> Arrays | None:
        if call.signature == "retrieve":
            return None
        _, _, dim = call.signature.partition("_")
        queries = call.inputs["embedding"]
        flat = FunnelSchedule((int(dim or 8),), (), 3)
        found = (ExactIndex.build(gallery, flat, IDS) if dim else funnel).search(queries)
        return {"ids": found.ids, "scores": found.scores}

    return InMemoryServer(manifest, answer)


@pytest.mark.parametrize("options", [Options(), Options(max_batch_size=4)])
def test_a_served_index_answers_as_one_in_this_process(
    encoder: InMemoryServer, index: InMemoryServer, gallery: Any, options: Options
) -> None:
    local = ExactIndex.build(gallery, SCHEDULE, IDS, encoder_fingerprint="5e1f")
    here = Client(encoder, options=options).retrieve(ROWS, local)
    there = Client(encoder, options=options).retrieve(ROWS, Client(index, options=options))
    np.testing.assert_array_equal(here.ids, there.ids)
    np.testing.assert_allclose(here.scores, there.scores, rtol=0, atol=1e-6)
    embeddings = Client(encoder).embed(ROWS, 8)
    alone = Client(index, options=options).search(embeddings)
    np.testing.assert_array_equal(alone.ids, here.ids)


def test_an_index_in_this_process_takes_k_and_a_filter(
    encoder: InMemoryServer, gallery: Any
) -> None:
    local = ExactIndex.build(gallery, FunnelSchedule((8,), (), 3), IDS)
    among = [int(i) for i in IDS[::2]]
    expected = local.search(Client(encoder).embed(ROWS, 8), 2, among)

    async def main() -> Any:
        return await AsyncClient(encoder).retrieve(ROWS, local, k=2, among=among)

    for found in (
        Client(encoder).retrieve(ROWS, local, k=2, among=among),
        asyncio.run(main()),
    ):
        np.testing.assert_array_equal(found.ids, expected.ids)
        assert found.ids.shape == (len(ROWS), 2)
        assert np.isin(found.ids, among).all()


def test_a_served_index_is_asked_neither_for_k_nor_for_a_filter(
    encoder: InMemoryServer, index: InMemoryServer, refuses: Refuses
) -> None:
    asked = len(encoder.calls)
    text = (
        "k and among are for an index in this process. Received: k={}, among={} for a served one. "
        "Cut its answer, or open the index here: open_index(path)."
    )
    with refuses(ValueError, text.format(2, None)):
        Client(encoder).retrieve(ROWS, Client(index), k=2)
    with refuses(ValueError, text.format(None, "ids")):
        Client(encoder).retrieve(ROWS, among=[7])
    with refuses(ValueError, text.format(2, None)):
        asyncio.run(AsyncClient(encoder).retrieve(ROWS, AsyncClient(index), k=2))
    assert len(encoder.calls) == asked


@pytest.mark.parametrize("dim", [2, 4, 8])
def test_one_dim_is_searched_exactly(index: InMemoryServer, gallery: Any, dim: int) -> None:
    queries = truncate(RNG.normal(size=(5, 8)), dim)
    found = Client(index).search(queries, dim)
    expected = ExactIndex.build(gallery, FunnelSchedule((dim,), (), 3), IDS).search(queries)
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert index.calls[-1].signature == f"search_{dim}"


def test_an_index_refuses_the_embeddings_of_another_encoder(
    encoder: InMemoryServer, index: InMemoryServer, gallery: Any, refuses: Refuses
) -> None:
    text = (
        "An index answers embeddings of the encoder it was built with. Received: embeddings of "
        "the model with fingerprint '5e1f', for an index built with 'dead'. Embed the gallery "
        "anew with the model that is served, or serve the model the index was built with."
    )
    with refuses(EncoderMismatchError, text):
        Client(encoder).retrieve(
            ROWS, ExactIndex.build(gallery, SCHEDULE, encoder_fingerprint="dead")
        )
    other = InMemoryServer(
        replace(index.manifest, encoder_fingerprint="dead"), lambda call: index.answer(call)
    )
    with refuses(EncoderMismatchError, text):
        Client(encoder).retrieve(ROWS, Client(other))
    assert [call.signature for call in other.calls] == ["describe"]  # never searched
    with refuses(EncoderMismatchError, text):
        Client(other).search(gallery, encoder="5e1f")
    assert len(Client(other).search(gallery)) == 30  # nobody said whose they are


def test_the_fingerprint_is_that_of_the_version_that_answered(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest], gallery: Any
) -> None:
    """The one kept may be another's: vectors of equal width would give silent garbage."""
    server = InMemoryServer(manifests["classifier"], toys["classifier"])
    client = Client(server)
    bound = ExactIndex.build(gallery, SCHEDULE, IDS, encoder_fingerprint="5e1f")
    assert len(client.retrieve(ROWS, bound)) == 21
    server.version, server.manifest = 2, replace(server.manifest, fingerprint="new")
    with pytest.raises(EncoderMismatchError, match="fingerprint 'new'"):
        client.retrieve(ROWS, bound)


def test_an_index_that_was_swapped_is_found_out_at_the_first_search(
    index: InMemoryServer, gallery: Any
) -> None:
    server = InMemoryServer(index.manifest, lambda call: index.answer(call))
    client = Client(server)
    assert len(client.search(gallery, encoder="5e1f")) == 30
    server.version, server.manifest = 2, replace(server.manifest, encoder_fingerprint="new")
    with pytest.raises(EncoderMismatchError, match="built with 'new'"):
        client.search(gallery, encoder="5e1f")


def test_neither_is_a_model_without_a_gallery(
    encoder: InMemoryServer, index: InMemoryServer, refuses: Refuses
) -> None:
    text = (
        "Only an index can be searched. Received: a request to search model 'toy', a classifier "
        "without a gallery. Give an index: client.retrieve(inputs, index=ExactIndex.build(...))."
    )
    with refuses(NoIndexError, text):
        Client(encoder).search(np.zeros((2, 8)))
    with refuses(NoIndexError, text):
        Client(encoder).retrieve(ROWS)
    with pytest.raises(SignatureNotFoundError, match="signature 'retrieve'"):
        Client(index).retrieve(ROWS)  # an index without its encoder
    with pytest.raises(InvalidInputError, match=r"float32 of shape \(any, 8\)"):
        Client(index).search(ROWS)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, index: InMemoryServer, gallery: Any
) -> Iterator[str]:
    """Encoder and index in one SavedModel, exact at the full width."""
    import tensorflow as tf

    from keras_mrl_serving.server import DevServer

    manifest = index.manifest.to_json()
    module = tf.Module()
    module.gallery = tf.Variable(gallery)
    module.projection = tf.Variable(RNG.normal(size=(4, 8)).astype(np.float32))

    def search(embedding: Any) -> dict[str, Any]:
        scores = tf.math.l2_normalize(embedding, axis=1) @ tf.transpose(module.gallery)
        best, rows = tf.math.top_k(scores, 3)
        return {"ids": tf.gather(tf.constant(IDS), rows), "scores": best}

    signatures = {
        "describe": tf.function(
            lambda key: {"manifest": tf.fill(tf.shape(key), manifest)},
            input_signature=[tf.TensorSpec((None,), tf.string, "key")],
        ),
        "search": tf.function(
            search, input_signature=[tf.TensorSpec((None, 8), tf.float32, "embedding")]
        ),
        "retrieve": tf.function(
            lambda x: search(x @ module.projection),
            input_signature=[tf.TensorSpec((None, 4), tf.float32, "x")],
        ),
    }
    path = tmp_path_factory.mktemp("index")
    tf.saved_model.save(module, str(path / "1"), signatures=signatures)
    with DevServer(path, file_system_poll_wait_seconds=0) as target:
        yield target


def test_rows_in_neighbours_out_in_one_call(served: str, gallery: Any) -> None:
    with Client(served) as client:
        assert client.search(gallery).ids[:, 0].tolist() == IDS.tolist()
        found = client.retrieve(ROWS)
        assert found.ids.shape == (21, 3)
        assert found.ids.dtype == np.int64
        assert [i for i, _ in found[0]] == found.ids[0].tolist()


def test_an_event_loop_finds_the_same_neighbours(
    encoder: InMemoryServer, index: InMemoryServer, gallery: Any, served: str
) -> None:
    local = ExactIndex.build(gallery, SCHEDULE, IDS, encoder_fingerprint="5e1f")

    async def main() -> list[Any]:
        waiting, galleries = AsyncClient(encoder), AsyncClient(index)
        async with AsyncClient(served) as both:
            return [
                await waiting.retrieve(ROWS, local),
                await waiting.retrieve(ROWS, galleries),
                await galleries.search(gallery),
                await galleries.search(gallery[:, :4], 4, encoder="5e1f"),
                await both.retrieve(ROWS),
                await both.search(gallery),
            ]

    with Client(served) as both:
        expected = [
            Client(encoder).retrieve(ROWS, local),
            Client(encoder).retrieve(ROWS, Client(index)),
            Client(index).search(gallery),
            Client(index).search(gallery[:, :4], 4, encoder="5e1f"),
            both.retrieve(ROWS),
            both.search(gallery),
        ]
    for one, other in zip(asyncio.run(main()), expected, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.scores, other.scores)
    with pytest.raises(EncoderMismatchError):
        asyncio.run(AsyncClient(index).search(gallery, encoder="dead"))
