"""The client: it answers as the model, and refuses in sentences."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.cascade.audits import Audits, estimate_harm
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import truncate
from keras_mrl_serving.errors import (
    NO_SERVER_REMEDY,
    EncoderMismatchError,
    InvalidInputError,
    KerasMrlError,
    MessageTooLargeError,
    ModelNotFoundError,
    NoCascadeError,
    NoHeadError,
    NoIndexError,
    ServerError,
    ServerUnavailableError,
    SignatureNotFoundError,
    UnknownDimError,
)
from keras_mrl_serving.flows import Arrays, Call
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.options import Options
from keras_mrl_serving.results import Classification
from keras_mrl_serving.testing import InMemoryServer

Array = npt.NDArray[Any]
Model = Callable[[Call], Arrays]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def targets(saved: Mapping[str, Path]) -> Iterator[Mapping[str, str]]:
    """A server of each model, under the name of the model."""
    from keras_mrl_serving.server import DevServer

    servers = {
        name: DevServer(path, model_name=name, file_system_poll_wait_seconds=0)
        for name, path in saved.items()
    }
    yield {name: server.start() for name, server in servers.items()}
    for server in servers.values():
        server.stop()


@pytest.fixture
def client(targets: Mapping[str, str]) -> Iterator[Client]:
    with Client(targets["classifier"], "classifier") as client:
        yield client


@pytest.fixture
def encoder(targets: Mapping[str, str]) -> Iterator[Client]:
    with Client(targets["encoder"], "encoder") as client:
        yield client


@pytest.fixture
def model(toys: Mapping[str, Model]) -> Model:
    return toys["classifier"]


def assert_answers(answer: Classification, expected: Arrays) -> None:
    """The same classes by the same dims, and numbers within the contract's tolerance."""
    np.testing.assert_array_equal(answer.class_ids, expected["class_ids"])
    for name in ("probabilities", "confidence"):
        np.testing.assert_allclose(getattr(answer, name), expected[name], rtol=0, atol=1e-5)
    if "dim" in expected:
        np.testing.assert_array_equal(answer.dim, expected["dim"])
    assert answer.labels is not None
    assert answer.labels.tolist() == [[n.decode() for n in row] for row in expected["labels"]]
    dtypes = [answer.class_ids.dtype, answer.probabilities.dtype, answer.confidence.dtype]
    assert [*dtypes, answer.dim.dtype] == [np.int64, np.float32, np.float32, np.int32]


def test_describe_gives_the_manifest(client: Client, manifests: Mapping[str, Manifest]) -> None:
    assert client.describe() == manifests["classifier"]


@pytest.mark.parametrize("dim", [2, 4, 8])
def test_embed_and_classify_answer_as_the_model(client: Client, model: Model, dim: int) -> None:
    embedding = client.embed(ROWS, dim)
    assert embedding.dtype == np.float32
    expected = model(Call(f"embed_{dim}", {"x": ROWS}))["embedding"]
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5)
    answer = client.classify(ROWS, dim)
    assert_answers(answer, model(Call(f"classify_{dim}", {"x": ROWS})))
    assert answer.dim.tolist() == [dim] * 40


def test_the_model_s_policy_and_the_same_one_given_answer_alike(
    client: Client, model: Model, policy: CascadePolicy
) -> None:
    expected = model(Call("classify_adaptive", {"x": ROWS}))
    assert set(expected["dim"].tolist()) == {2, 4, 8}
    assert_answers(client.classify_adaptive(ROWS), expected)
    assert_answers(client.classify_adaptive(ROWS, policy), expected)
    assert_answers(client.classify_adaptive(ROWS, policy=policy), expected)


def test_harm_is_estimated_from_audited_rows_of_many_calls(
    client: Client, policy: CascadePolicy
) -> None:
    """All that is drawn is within the interval; only rows that differ are given a label."""
    rows = np.random.default_rng(5).normal(size=(3000, 4)).astype(np.float32)
    truth = client.classify(rows, 8).class_ids[:, 0]  # as if the last stage were always right
    whole = client.classify_adaptive(rows)
    harm = float(np.mean(whole.class_ids[:, 0] != truth))
    for by in (None, policy):
        audits, rng, num_asked = Audits([], []), np.random.default_rng(7), 0
        for start in range(0, 3000, 100):
            part = slice(start, start + 100)
            answer = client.classify_adaptive(rows[part], by, audit_rate=0.2, audit_seed=rng)
            differs = answer.class_ids[:, 0] != answer.full_class_ids
            audits += Audits.of(answer, np.where(differs, truth[part], -1))
            num_asked += int(differs[answer.audited].sum())
        estimate = estimate_harm(audits)
        assert 500 < estimate.size < 700
        assert (estimate.differing, estimate.unlabelled) == (num_asked, 0)
        assert estimate.low < harm < estimate.high
        assert estimate.high - estimate.low < 0.1


def test_a_version_without_the_signature_of_audits_says_so(
    manifests: Mapping[str, Manifest], model: Model
) -> None:
    def without(call: Call) -> Arrays | None:
        return None if call.signature == "classify_8" else model(call)

    client = Client(InMemoryServer(manifests["classifier"], without))
    assert len(client.classify_adaptive(ROWS)) == 40
    with pytest.raises(SignatureNotFoundError, match="signature 'classify_8'"):
        client.classify_adaptive(ROWS, audit_rate=1.0)


@pytest.mark.parametrize(("threshold", "dim"), [(0.0, 2), (1.0, 8)])
def test_thresholds_below_and_above_every_confidence(
    client: Client, threshold: float, dim: int
) -> None:
    policy = CascadePolicy((Stage(2, threshold), Stage(8, None)))
    answer = client.classify_adaptive(ROWS, policy)
    assert answer.dim.tolist() == [dim] * 40
    np.testing.assert_array_equal(answer.class_ids, client.classify(ROWS, dim).class_ids)


def test_an_answer_does_not_depend_on_its_neighbours(client: Client, policy: CascadePolicy) -> None:
    for own in (None, policy):
        together = client.classify_adaptive(ROWS, own)
        for row in range(5):
            alone = client.classify_adaptive(ROWS[row : row + 1], own)
            assert alone.class_ids[0].tolist() == together.class_ids[row].tolist()
            assert alone.dim[0] == together.dim[row]
            np.testing.assert_allclose(
                alone.probabilities[0], together.probabilities[row], rtol=0, atol=1e-5
            )


def test_retrieve_embeds_at_the_width_of_the_index(client: Client) -> None:
    gallery = client.embed(ROWS, 8)
    index = ExactIndex.build(gallery, FunnelSchedule((2, 8), (20,), 3), np.arange(40) + 100)
    neighbors = client.retrieve(ROWS[:7], index)
    assert neighbors.ids[:, 0].tolist() == list(range(100, 107))
    np.testing.assert_array_equal(neighbors.ids, index.search(gallery[:7]).ids)
    np.testing.assert_allclose(neighbors.scores[:, 0], 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "inputs",
    [
        ROWS.astype(np.float64),
        ROWS.tolist(),
        np.asfortranarray(ROWS),
        {"x": ROWS},
        np.repeat(ROWS, 2, axis=0)[::2],
    ],
)
def test_rows_are_cast_to_what_the_model_takes(client: Client, inputs: Any) -> None:
    dim: Any = np.int64(4)
    np.testing.assert_array_equal(client.embed(inputs, dim), client.embed(ROWS, 4))


def test_nan_never_comes_back_as_a_class(client: Client, policy: CascadePolicy) -> None:
    x = ROWS.copy()
    x[3] = np.nan
    text = r"NaN or infinity in .* 1 of 40 rows, first in row 3"
    with pytest.raises(ServerError, match=text):
        client.classify(x, 4)
    for chosen in (None, policy):
        with pytest.raises(ServerError, match=text):
            client.classify_adaptive(x, chosen)
    is_nan: Array = np.isnan(client.embed(x, 4))
    assert np.flatnonzero(is_nan.all(axis=1)).tolist() == [3]


def test_no_rows_are_no_answers(client: Client, policy: CascadePolicy) -> None:
    assert client.embed(ROWS[:0], 4).shape == (0, 4)
    assert len(client.classify_adaptive(ROWS[:0])) == 0
    assert len(client.classify_adaptive(ROWS[:0], policy)) == 0


def test_an_answer_of_more_than_4_megabytes_arrives(encoder: Client) -> None:
    rows = np.tile(ROWS, (26, 1))[:1024]
    embedding = encoder.embed(rows, 2048)
    assert embedding.shape == (1024, 2048)
    assert embedding.nbytes > 4 * 2**20
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


@pytest.mark.soak
def test_hundreds_of_megabytes_arrive_by_default(encoder: Client) -> None:
    """200 MB in `make soak`, a tenth of it here; nothing was set to make room."""
    count = 25_600 if os.environ.get("KERAS_MRL_SOAK") else 2_560
    rows = np.tile(ROWS, (count // 40, 1))
    embedding = encoder.embed(rows, 2048)
    assert embedding.nbytes == count * 2048 * 4
    np.testing.assert_allclose(embedding[-40:], encoder.embed(ROWS, 2048), rtol=0, atol=1e-5)


def test_a_message_limit_is_kept(targets: Mapping[str, str]) -> None:
    options = Options(max_message_bytes=np.int64(1 << 20))  # type: ignore[arg-type]
    with Client(targets["encoder"], "encoder", options=options) as client:
        assert client.embed(ROWS[:8], 2048).shape == (8, 2048)
        rows = np.tile(ROWS, (26, 1))  # 8.5 MB of embeddings, in parts that fit
        np.testing.assert_allclose(
            client.embed(rows, 2048)[-40:], client.embed(ROWS, 2048), rtol=0, atol=1e-5
        )
    options = Options(max_message_bytes=4096)
    with Client(targets["encoder"], "encoder", options=options) as client:
        with pytest.raises(MessageTooLargeError, match=" RESOURCE_EXHAUSTED ") as caught:
            client.embed(ROWS, 2048)  # not even one row fits
    assert caught.value.signature == "embed_2048"


def test_eight_threads_share_one_client(
    client: Client, model: Model, policy: CascadePolicy
) -> None:
    barrier = threading.Barrier(8)

    def ask(number: int) -> None:
        rows = ROWS[number : number + 1 + 4 * number]
        adaptive = model(Call("classify_adaptive", {"x": rows}))
        embedding = model(Call("embed_8", {"x": rows}))["embedding"]
        barrier.wait()
        for _ in range(5):
            np.testing.assert_allclose(client.embed(rows, 8), embedding, rtol=0, atol=1e-5)
            assert_answers(client.classify_adaptive(rows), adaptive)
            assert_answers(client.classify_adaptive(rows, policy), adaptive)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


NO_SUCH_DIM = (
    "dim must be one of the dims the model serves. Received: dim=3 for model 'toy'. "
    "Choose one of 2, 4, 8."
)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.embed(ROWS, 3),
        lambda client: client.classify(ROWS, 3),
        lambda client: client.classify_adaptive(
            ROWS, CascadePolicy((Stage(2, 0.5), Stage(3, None)))
        ),
        lambda client: client.retrieve(ROWS, ExactIndex.build(ROWS, FunnelSchedule((3,), (), 1))),
    ],
)
def test_an_unknown_dim_is_refused_by_naming_those_there_are(
    client: Client, ask: Callable[[Client], object], refuses: Refuses
) -> None:
    with refuses(UnknownDimError, NO_SUCH_DIM):
        ask(client)
    with pytest.raises(ValueError, match="Choose one of 2, 4, 8"):
        ask(client)


@pytest.mark.parametrize("dim", [True, 8.0, "8", None])
def test_what_only_looks_like_a_dim_is_refused(client: Client, dim: Any, refuses: Refuses) -> None:
    with refuses(UnknownDimError, NO_SUCH_DIM.replace("dim=3", f"dim={dim!r}")):
        client.embed(ROWS, dim)


def test_a_model_without_a_head_does_not_classify(encoder: Client, policy: CascadePolicy) -> None:
    methods: list[Callable[[], object]] = [
        lambda: encoder.classify(ROWS, 2),
        lambda: encoder.classify_adaptive(ROWS),
        lambda: encoder.classify_adaptive(ROWS, policy),
    ]
    for ask in methods:
        with pytest.raises(NoHeadError, match=r"^Only a model with a head can classify\. "):
            ask()


def test_a_model_without_a_policy_needs_one_given(targets: Mapping[str, str]) -> None:
    with Client(targets["successor"], "successor") as client:
        with pytest.raises(NoCascadeError, match=r"^classify_adaptive needs a cascade policy\. "):
            client.classify_adaptive(ROWS)
        policy = CascadePolicy((Stage(2, 0.5), Stage(16, None)))
        assert set(client.classify_adaptive(ROWS, policy).dim.tolist()) == {2, 16}


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            ROWS[0],
            "Input 'x' must be float32 of shape (any, 4), batch first. "
            "Received: float32 of shape (4,). Give a batch: for one row, x[None].",
        ),
        (
            ROWS.astype(str),
            "Input 'x' must be float32. Received: <U32 of shape (40, 4). "
            "Convert it, e.g. with .astype('float32').",
        ),
        ({"image": ROWS}, "inputs must be named x. Received: image. Rename them."),
    ],
)
def test_inputs_the_model_does_not_take_are_refused(
    client: Client, inputs: Any, text: str, refuses: Refuses
) -> None:
    with refuses(InvalidInputError, text):
        client.embed(inputs, 2)


def test_an_unknown_model_is_refused(targets: Mapping[str, str]) -> None:
    target = targets["classifier"]
    with Client(target, "owl") as client, pytest.raises(ModelNotFoundError) as caught:
        client.embed(ROWS, 2)
    assert type(caught.value) is ModelNotFoundError
    assert str(caught.value) == (
        f"The server must have the model. Received: NOT_FOUND from {target} for model 'owl', "
        "signature 'describe', timeout 10 s: Servable not found for request: Latest(owl). Give "
        "the name the server was started with, Client(target, model=NAME), and see in its log "
        "whether a version loaded."
    )
    assert_names_the_call(caught.value, target, "owl", 10.0)


def assert_names_the_call(error: KerasMrlError, target: str, model: str, timeout_s: float) -> None:
    assert (error.target, error.model) == (target, model)
    assert (error.signature, error.timeout_s) == ("describe", timeout_s)
    assert not isinstance(error, grpc.RpcError)


ASK: list[Callable[[Client], object]] = [
    lambda client: client.describe(),
    lambda client: client.embed(ROWS, 2),
    lambda client: client.classify(ROWS, 2),
    lambda client: client.classify_adaptive(ROWS),
    lambda client: client.retrieve(ROWS, ExactIndex.build(ROWS, FunnelSchedule((2,), (), 1))),
]


def test_where_no_server_is_the_target_and_the_timeout_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        target = f"127.0.0.1:{free.getsockname()[1]}"
    once = Options(timeout_s=7.5, max_attempts=1)
    with Client(target, options=once) as client:
        for ask in ASK:
            with pytest.raises(ConnectionError) as caught:
                ask(client)
            assert type(caught.value) is ServerUnavailableError
            text = str(caught.value)
            assert text.startswith(  # then, in gRPC's own words, why not
                "A TensorFlow Serving server must answer at the target. Received: UNAVAILABLE "
                f"from {target} for model 'default', signature 'describe', timeout 7.5 s: "
            )
            assert text.endswith(f"refused. {NO_SERVER_REMEDY}")
            assert_names_the_call(caught.value, target, "default", 7.5)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_settings_that_are_no_options_are_refused(kind: type[Any]) -> None:
    for other in ({}, {"timeout_s": 1.0}, 1.0):
        with pytest.raises(TypeError, match=f"are Options. Received: {type(other).__name__}. "):
            kind("localhost:8500", options=other)


# Neighbours: from a gallery in this process, from a served index, from encoder and index in one.

QUERIES = ROWS[:21]
SCHEDULE = FunnelSchedule((2, 4, 8), (12, 6), 3)
IDS = np.arange(30, dtype=np.int64) * 7


@pytest.fixture(scope="module")
def encoder_server(toys: Mapping[str, Model], manifests: Mapping[str, Manifest]) -> InMemoryServer:
    return InMemoryServer(manifests["classifier"], toys["classifier"])


@pytest.fixture(scope="module")
def gallery(encoder_server: InMemoryServer) -> Any:
    return Client(encoder_server).embed(RNG.normal(size=(30, 4)).astype(np.float32), 8)


@pytest.fixture(scope="module")
def index_server(manifests: Mapping[str, Manifest], gallery: Any) -> InMemoryServer:
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
        neighbors = (ExactIndex.build(gallery, flat, IDS) if dim else funnel).search(queries)
        return {"ids": neighbors.ids, "scores": neighbors.scores}

    return InMemoryServer(manifest, answer)


@pytest.mark.parametrize("options", [Options(), Options(max_batch_size=4)])
def test_a_served_index_answers_as_one_in_this_process(
    encoder_server: InMemoryServer, index_server: InMemoryServer, gallery: Any, options: Options
) -> None:
    local = ExactIndex.build(gallery, SCHEDULE, IDS, encoder_fingerprint="5e1f")
    here = Client(encoder_server, options=options).retrieve(QUERIES, local)
    index = Client(index_server, options=options)
    there = Client(encoder_server, options=options).retrieve(QUERIES, index)
    np.testing.assert_array_equal(here.ids, there.ids)
    np.testing.assert_allclose(here.scores, there.scores, rtol=0, atol=1e-6)
    embeddings = Client(encoder_server).embed(QUERIES, 8)
    alone = index.search(embeddings)
    np.testing.assert_array_equal(alone.ids, here.ids)


def test_an_index_in_this_process_takes_k_and_a_filter(
    encoder_server: InMemoryServer, gallery: Any
) -> None:
    local = ExactIndex.build(gallery, FunnelSchedule((8,), (), 3), IDS)
    among = [int(i) for i in IDS[::2]]
    expected = local.search(Client(encoder_server).embed(QUERIES, 8), 2, among)

    async def main() -> Any:
        return await AsyncClient(encoder_server).retrieve(QUERIES, local, k=2, among=among)

    for neighbors in (
        Client(encoder_server).retrieve(QUERIES, local, k=2, among=among),
        asyncio.run(main()),
    ):
        np.testing.assert_array_equal(neighbors.ids, expected.ids)
        assert neighbors.ids.shape == (len(QUERIES), 2)
        assert np.isin(neighbors.ids, among).all()


def test_a_served_index_takes_neither_k_nor_a_filter(
    encoder_server: InMemoryServer, index_server: InMemoryServer, refuses: Refuses
) -> None:
    num_calls = len(encoder_server.calls)
    text = (
        "k, among and filter are for an index in this process. "
        "Received: k={}, among={}, filter=None for a served one. "
        "Cut its answer, or open the index here: open_index(path)."
    )
    with refuses(ValueError, text.format(2, None)):
        Client(encoder_server).retrieve(QUERIES, Client(index_server), k=2)
    with refuses(ValueError, text.format(None, "ids")):
        Client(encoder_server).retrieve(QUERIES, among=[7])
    with refuses(ValueError, text.format(2, None)):
        asyncio.run(AsyncClient(encoder_server).retrieve(QUERIES, AsyncClient(index_server), k=2))
    assert len(encoder_server.calls) == num_calls


def test_an_index_of_another_kind_is_refused(
    encoder_server: InMemoryServer, index_server: InMemoryServer, refuses: Refuses
) -> None:
    text = (
        "An index must be one in this process, or another {0}. Received: {1}. "
        "Give open_index(path), or the {0} of a model that is an index."
    )
    num_calls = len(encoder_server.calls)
    others: list[Any] = [3, "birds.index", ExactIndex]
    for index in (AsyncClient(index_server), *others):
        with refuses(InvalidInputError, text.format("Client", type(index).__name__)):
            Client(encoder_server).retrieve(QUERIES, index)
    for index in (Client(index_server), *others):
        with refuses(InvalidInputError, text.format("AsyncClient", type(index).__name__)):
            asyncio.run(AsyncClient(encoder_server).retrieve(QUERIES, index))
    assert len(encoder_server.calls) == num_calls


@pytest.mark.parametrize("dim", [2, 4, 8])
def test_one_dim_is_searched_exactly(index_server: InMemoryServer, gallery: Any, dim: int) -> None:
    queries = truncate(RNG.normal(size=(5, 8)), dim)
    neighbors = Client(index_server).search(queries, dim)
    expected = ExactIndex.build(gallery, FunnelSchedule((dim,), (), 3), IDS).search(queries)
    np.testing.assert_array_equal(neighbors.ids, expected.ids)
    assert index_server.calls[-1].signature == f"search_{dim}"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20])
def test_queries_that_have_no_length_are_not_sent(
    index_server: InMemoryServer, value: float, refuses: Refuses
) -> None:
    num_calls = len(index_server.calls)
    text = (
        "The queries must be finite, and so must the squares of their lengths in float32. "
        "Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made."
    )
    with refuses(InvalidInputError, text):
        Client(index_server).search([[value] * 8])
    assert {call.signature for call in index_server.calls[num_calls:]} <= {"describe"}


def test_an_index_refuses_the_embeddings_of_another_encoder(
    encoder_server: InMemoryServer, index_server: InMemoryServer, gallery: Any, refuses: Refuses
) -> None:
    text = (
        "An index answers embeddings of the encoder it was built with. Received: embeddings of "
        "the model with fingerprint '5e1f', for an index built with 'dead'. Embed the gallery "
        "anew with the model that is served, or serve the model the index was built with."
    )
    with refuses(EncoderMismatchError, text):
        Client(encoder_server).retrieve(
            QUERIES, ExactIndex.build(gallery, SCHEDULE, encoder_fingerprint="dead")
        )
    other = InMemoryServer(
        replace(index_server.manifest, encoder_fingerprint="dead"),
        index_server.answer,
    )
    with refuses(EncoderMismatchError, text):
        Client(encoder_server).retrieve(QUERIES, Client(other))
    assert [call.signature for call in other.calls] == ["describe"]  # never searched
    with refuses(EncoderMismatchError, text):
        Client(other).search(gallery, encoder="5e1f")
    assert len(Client(other).search(gallery)) == 30  # of an unknown encoder


def test_the_fingerprint_is_that_of_the_version_that_answered(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest], gallery: Any
) -> None:
    """Not that of the remembered manifest: vectors of equal width would give silent garbage."""
    server = InMemoryServer(manifests["classifier"], toys["classifier"])
    client = Client(server)
    bound = ExactIndex.build(gallery, SCHEDULE, IDS, encoder_fingerprint="5e1f")
    assert len(client.retrieve(QUERIES, bound)) == 21
    server.version, server.manifest = 2, replace(server.manifest, fingerprint="new")
    with pytest.raises(EncoderMismatchError, match="fingerprint 'new'"):
        client.retrieve(QUERIES, bound)


def test_an_index_that_was_swapped_is_noticed_at_the_first_search(
    index_server: InMemoryServer, gallery: Any
) -> None:
    server = InMemoryServer(index_server.manifest, index_server.answer)
    client = Client(server)
    assert len(client.search(gallery, encoder="5e1f")) == 30
    server.version, server.manifest = 2, replace(server.manifest, encoder_fingerprint="new")
    with pytest.raises(EncoderMismatchError, match="built with 'new'"):
        client.search(gallery, encoder="5e1f")


def test_a_model_without_a_gallery_has_no_neighbours(
    encoder_server: InMemoryServer, index_server: InMemoryServer, refuses: Refuses
) -> None:
    text = (
        "Only an index can be searched. Received: a request to search model 'toy', a classifier "
        "without a gallery. Give an index: client.retrieve(inputs, index=ExactIndex.build(...))."
    )
    with refuses(NoIndexError, text):
        Client(encoder_server).search(np.zeros((2, 8)))
    with refuses(NoIndexError, text):
        Client(encoder_server).retrieve(QUERIES)
    with pytest.raises(SignatureNotFoundError, match="signature 'retrieve'"):
        Client(index_server).retrieve(QUERIES)  # an index without its encoder
    with pytest.raises(InvalidInputError, match=r"float32 of shape \(any, 8\)"):
        Client(index_server).search(QUERIES)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, index_server: InMemoryServer, gallery: Any
) -> Iterator[str]:
    """Encoder and index in one SavedModel, exact at the full width."""
    import tensorflow as tf

    from keras_mrl_serving.server import DevServer

    manifest = index_server.manifest.to_json()
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
        neighbors = client.retrieve(QUERIES)
        assert neighbors.ids.shape == (21, 3)
        assert neighbors.ids.dtype == np.int64
        assert [i for i, _ in neighbors[0]] == neighbors.ids[0].tolist()


def test_an_event_loop_finds_the_same_neighbours(
    encoder_server: InMemoryServer, index_server: InMemoryServer, gallery: Any, served: str
) -> None:
    local = ExactIndex.build(gallery, SCHEDULE, IDS, encoder_fingerprint="5e1f")

    async def main() -> list[Any]:
        waiting, galleries = AsyncClient(encoder_server), AsyncClient(index_server)
        async with AsyncClient(served) as both:
            return [
                await waiting.retrieve(QUERIES, local),
                await waiting.retrieve(QUERIES, galleries),
                await galleries.search(gallery),
                await galleries.search(gallery[:, :4], 4, encoder="5e1f"),
                await both.retrieve(QUERIES),
                await both.search(gallery),
            ]

    with Client(served) as both:
        expected = [
            Client(encoder_server).retrieve(QUERIES, local),
            Client(encoder_server).retrieve(QUERIES, Client(index_server)),
            Client(index_server).search(gallery),
            Client(index_server).search(gallery[:, :4], 4, encoder="5e1f"),
            both.retrieve(QUERIES),
            both.search(gallery),
        ]
    for one, other in zip(asyncio.run(main()), expected, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.scores, other.scores)
    with pytest.raises(EncoderMismatchError):
        asyncio.run(AsyncClient(index_server).search(gallery, encoder="dead"))
