"""The client over the development server: it answers as the model, and refuses in sentences."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving._wire import decode
from keras_mrl_serving.calls import Envelope
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import (
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    MessageTooLargeError,
    ModelNotFoundError,
    NoCascadeError,
    NoHeadError,
    ServerError,
    ServerUnavailableError,
    UnknownDimError,
)
from keras_mrl_serving.flows import Arrays, Call
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.options import Options
from keras_mrl_serving.results import Classification

Array = npt.NDArray[Any]
Model = Callable[[Call], Arrays]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)


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


def assert_answers(found: Classification, expected: Arrays) -> None:
    """The same classes by the same dims, and numbers within the contract's tolerance."""
    np.testing.assert_array_equal(found.class_ids, expected["class_ids"])
    for name in ("probabilities", "confidence"):
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=0, atol=1e-5)
    if "dim" in expected:
        np.testing.assert_array_equal(found.dim, expected["dim"])
    assert found.labels is not None
    assert found.labels.tolist() == [[n.decode() for n in row] for row in expected["labels"]]
    dtypes = [found.class_ids.dtype, found.probabilities.dtype, found.confidence.dtype]
    assert [*dtypes, found.dim.dtype] == [np.int64, np.float32, np.float32, np.int32]


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


@pytest.mark.parametrize(("threshold", "dim"), [(0.0, 2), (1.0, 8)])
def test_thresholds_below_and_above_every_confidence(
    client: Client, threshold: float, dim: int
) -> None:
    policy = CascadePolicy((Stage(2, threshold), Stage(8, None)))
    answer = client.classify_adaptive(ROWS, policy)
    assert answer.dim.tolist() == [dim] * 40
    np.testing.assert_array_equal(answer.class_ids, client.classify(ROWS, dim).class_ids)


def test_an_answer_does_not_depend_on_its_neighbours(client: Client, policy: CascadePolicy) -> None:
    for asked in (None, policy):
        together = client.classify_adaptive(ROWS, asked)
        for row in range(5):
            alone = client.classify_adaptive(ROWS[row : row + 1], asked)
            assert alone.class_ids[0].tolist() == together.class_ids[row].tolist()
            assert alone.dim[0] == together.dim[row]
            np.testing.assert_allclose(
                alone.probabilities[0], together.probabilities[row], rtol=0, atol=1e-5
            )


def test_search_embeds_at_the_width_of_the_index(client: Client) -> None:
    gallery = client.embed(ROWS, 8)
    index = ExactIndex.build(gallery, FunnelSchedule((2, 8), (20,), 3), np.arange(40) + 100)
    found = client.retrieve(ROWS[:7], index)
    assert found.ids[:, 0].tolist() == list(range(100, 107))
    np.testing.assert_array_equal(found.ids, index.search(gallery[:7]).ids)
    np.testing.assert_allclose(found.scores[:, 0], 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        ROWS.astype(np.float64),
        ROWS.tolist(),
        np.asfortranarray(ROWS),
        {"x": ROWS},
        np.repeat(ROWS, 2, axis=0)[::2],
    ],
)
def test_rows_are_cast_to_what_the_model_takes(client: Client, given: Any) -> None:
    numpys_own: Any = np.int64(4)
    np.testing.assert_array_equal(client.embed(given, numpys_own), client.embed(ROWS, 4))


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
    asked: list[Callable[[], object]] = [
        lambda: encoder.classify(ROWS, 2),
        lambda: encoder.classify_adaptive(ROWS),
        lambda: encoder.classify_adaptive(ROWS, policy),
    ]
    for ask in asked:
        with pytest.raises(NoHeadError, match=r"^Only a model with a head can classify\. "):
            ask()


def test_a_model_without_a_policy_needs_one_given(targets: Mapping[str, str]) -> None:
    with Client(targets["successor"], "successor") as client:
        with pytest.raises(NoCascadeError, match=r"^classify_adaptive needs a cascade policy\. "):
            client.classify_adaptive(ROWS)
        policy = CascadePolicy((Stage(2, 0.5), Stage(16, None)))
        assert set(client.classify_adaptive(ROWS, policy).dim.tolist()) == {2, 16}


@pytest.mark.parametrize(
    ("given", "text"),
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
    client: Client, given: Any, text: str, refuses: Refuses
) -> None:
    with refuses(InvalidInputError, text):
        client.embed(given, 2)


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
    assert_tells_the_call(caught.value, target, "owl", 10.0)


def assert_tells_the_call(
    error: KerasMrlError, target: str, model: str = "default", timeout_s: float = 0.3
) -> None:
    assert (error.target, error.model) == (target, model)
    assert (error.signature, error.timeout_s) == ("describe", timeout_s)
    assert not isinstance(error, grpc.RpcError)


@contextmanager
def listening() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        yield f"127.0.0.1:{black_hole.getsockname()[1]}"


ASK: list[Callable[[Client], object]] = [
    lambda client: client.describe(),
    lambda client: client.embed(ROWS, 2),
    lambda client: client.classify(ROWS, 2),
    lambda client: client.classify_adaptive(ROWS),
    lambda client: client.retrieve(ROWS, ExactIndex.build(ROWS, FunnelSchedule((2,), (), 1))),
]


def test_a_server_that_never_answers_is_waited_for_no_longer_than_asked() -> None:
    with listening() as target, Client(target, options=Options(timeout_s=0.3)) as client:
        for ask in ASK:
            start = time.monotonic()
            with pytest.raises(TimeoutError) as caught:
                ask(client)
            assert time.monotonic() - start < 3  # 0.3, on a machine busy elsewhere
            assert type(caught.value) is DeadlineError
            assert str(caught.value) == (
                f"An answer must come within the timeout. Received: DEADLINE_EXCEEDED from {target}"
                " for model 'default', signature 'describe', timeout 0.3 s: Deadline Exceeded. "
                "Send fewer rows at once, or raise Options(timeout_s=...)."
            )
            assert_tells_the_call(caught.value, target)


def test_where_no_server_is_the_target_and_the_timeout_are_named() -> None:
    with listening() as target:
        pass
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
            assert text.endswith(
                "refused. Start one with `keras-mrl serve --model_base_path PATH --port PORT`, "
                "or correct the target."
            )
            assert_tells_the_call(caught.value, target, timeout_s=7.5)


def test_a_client_closes_twice_and_then_asks_no_more(
    targets: Mapping[str, str], refuses: Refuses
) -> None:
    client = Client(targets["classifier"], "classifier")
    assert client.embed(ROWS, 2).shape == (40, 2)
    client.close()
    client.close()
    text = (
        "A client asks until it is closed. "
        f"Received: a call to {targets['classifier']} after close(). Make another Client."
    )
    with refuses(KerasMrlError, text):
        client.embed(ROWS, 2)
    never_asked = Client(targets["classifier"], "classifier")
    never_asked.close()
    with refuses(KerasMrlError, text):
        never_asked.describe()


def test_a_client_survives_a_fork(targets: Mapping[str, str]) -> None:
    """A child that shares the connection may be refused once; nobody hangs or gets garbage."""
    program = f"""
import os, sys
import numpy as np
from keras_mrl_serving import Client, KerasMrlError, Options

client = Client({targets["classifier"]!r}, "classifier", options=Options(timeout_s=5.0))
rows = np.ones((3, 4), np.float32)
expected = client.embed(rows, 2)
child = os.fork()
for attempt in range(3):
    try:
        same = np.array_equal(client.embed(rows, 2), expected)
        break
    except KerasMrlError:
        same = False
same = same and client._transport._pid == os.getpid()  # a channel of its own, not the parent's
if not child:
    os._exit(0 if same else 1)
sys.exit(0 if same and os.waitpid(child, 0)[1] == 0 else 1)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == 0


def test_a_tensor_this_client_cannot_read_is_an_error_of_ours() -> None:
    strange = wire.PredictResponse()
    strange.outputs["manifest"].dtype = wire.DT_COMPLEX64
    asked = Envelope("default", None, Call("describe", {}), 1.0, 1.0)
    with pytest.raises(ServerError) as caught:
        decode(asked, strange, "host:8500")
    assert str(caught.value) == (
        "The server must answer without an error. Received: what this client cannot read from "
        "host:8500 for model 'default', signature 'describe', timeout 1 s: a tensor's dtype must "
        "be a float, integer, bool or string dtype that NumPy has, or bfloat16. Received: "
        "dtype=DT_COMPLEX64. Cast the output in the exported signature: tf.cast(output, "
        "tf.float32). Ask a model exported by keras_mrl_export.export_saved_model."
    )
