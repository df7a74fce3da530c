"""What Qdrant's client raises, as an error of this package."""

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from qdrant_client.http.models import QueryResponse, ScoredPoint

from keras_mrl_serving import errors
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index.qdrant import QdrantIndex
from keras_mrl_serving.index.qdrant_collection import Collection
from tests.helpers.galleries import Refuses

SCHEDULE = FunnelSchedule((2, 4), (3,), 2)
GALLERY = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def build(client: QdrantClient, name: str) -> QdrantIndex:
    return QdrantIndex.build(client, name, GALLERY, SCHEDULE)


@pytest.mark.parametrize("grpc", [False, True])
def test_no_server(grpc: bool) -> None:
    nowhere = QdrantClient(
        url="http://127.0.0.1:9", grpc_port=9, prefer_grpc=grpc, check_compatibility=False
    )
    for act in (QdrantIndex.open, build):
        with pytest.raises(errors.ServerUnavailableError) as caught:
            act(nowhere, "pets")
        text = str(caught.value)
        assert text.startswith("Qdrant must be there and ready. Received: ")
        assert text.endswith(
            ", for collection 'pets'. "
            "Start it, wait until it is less busy, or give a client with another URL."
        )
        assert "refused" in text
    nowhere.close()


def test_errors_of_local_mode(refuses: Refuses) -> None:
    client = QdrantClient(":memory:")
    text = (
        "Qdrant must take the request. Received: {}, for collection 'pets'. "
        "See that the collection is still there, and that Qdrant knows the options given."
    )
    with refuses(errors.InvalidInputError, text.format("Unknown arguments: ['shards']")):
        QdrantIndex.build(client, "pets", GALLERY, SCHEDULE, shards=3)
    index = QdrantIndex.build(client, "pets", GALLERY, SCHEDULE)
    client.delete_collection("pets")
    acts: list[Callable[[], Any]] = [
        lambda: len(index),
        lambda: index.search(GALLERY),
        lambda: index.add(GALLERY, range(6)),
        lambda: index.remove([1]),
    ]
    for act in acts:
        with refuses(errors.InvalidInputError, text.format("Collection pets not found")):
            act()
    client.close()
    with refuses(
        errors.ServerUnavailableError,
        "Qdrant must be there and ready. Received: QdrantLocal instance is closed. Please create "
        "a new instance, for collection 'pets'. "
        "Start it, wait until it is less busy, or give a client with another URL.",
    ):
        len(index)


class Rpc(grpc.RpcError):
    """As gRPC raises it."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "because."


class ReadTimeout(Exception):
    """As httpx calls it."""


def answered(status: int) -> UnexpectedResponse:
    return UnexpectedResponse(status, "", b'{"status": "..."}', headers={})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (answered(400), errors.InvalidInputError),
        (answered(403), errors.AccessDeniedError),
        (answered(404), errors.InvalidInputError),
        (answered(413), errors.MessageTooLargeError),
        (answered(500), errors.ServerError),
        (answered(503), errors.ServerUnavailableError),
        (answered(504), errors.DeadlineError),
        (ResourceExhaustedResponse("slow down", 3), errors.ServerUnavailableError),
        (ResponseHandlingException(ReadTimeout()), errors.DeadlineError),
        (ResponseHandlingException(OSError()), errors.ServerUnavailableError),
        (Rpc(grpc.StatusCode.UNAUTHENTICATED), errors.AccessDeniedError),
        (Rpc(grpc.StatusCode.DEADLINE_EXCEEDED), errors.DeadlineError),
        (Rpc(grpc.StatusCode.NOT_FOUND), errors.InvalidInputError),
        (Rpc(grpc.StatusCode.INTERNAL), errors.ServerError),
    ],
    ids=str,
)
def test_an_error_of_the_client_is_one_of_ours(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = QdrantClient(":memory:")

    def fails(*_: Any, **__: Any) -> Any:
        raise raised

    monkeypatch.setattr(client, "collection_exists", fails)
    with pytest.raises(errors.KerasMrlError) as caught:
        Collection(client, "pets").exists()
    assert type(caught.value) is expected
    assert caught.value.__cause__ is raised
    client.close()


def test_an_error_says_what_the_server_answered(
    monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    client = QdrantClient(":memory:")
    index = build(client, "pets")

    def fails(*_: Any, **__: Any) -> Any:
        raise raised

    monkeypatch.setattr(client, "query_batch_points", fails)
    raised: Exception = answered(401)
    with refuses(
        errors.AccessDeniedError,
        "Qdrant must let the caller in. Received: Unexpected Response: 401 (Unrecognized Status "
        "Code) Raw response content: b'{\"status\": \"...\"}', for collection 'pets'. "
        "Give its key: QdrantClient(..., api_key=os.environ['QDRANT_API_KEY']).",
    ):
        index.search(GALLERY)
    raised = Rpc(grpc.StatusCode.INTERNAL)
    with refuses(
        errors.ServerError,
        "Qdrant must answer without an error. Received: because, for collection 'pets'. "
        "See the server's log.",
    ):
        index.search(GALLERY)


def test_a_key_and_a_password_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    client = QdrantClient(":memory:")
    client._init_options["api_key"] = "5e1f"

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("no 5e1f at https://birds:gr@y@host:6333/collections?key=5e1f or //a/b@c")

    monkeypatch.setattr(client, "collection_exists", fails)
    with pytest.raises(errors.InvalidInputError) as caught:
        Collection(client, "pets").exists()
    assert "no *** at https://***@host:6333/collections?key=*** or //a/b@c, for" in str(
        caught.value
    )


UUID = "5e1f5e1f-5e1f-5e1f-5e1f-5e1f5e1f5e1f"


def point(id: Any) -> ScoredPoint:
    return ScoredPoint(id=id, version=0, score=0.5)


@pytest.mark.parametrize(
    ("answers", "received"),
    [
        ([], "0 answers to 2 queries"),
        ([[]] * 3, "3 answers to 2 queries"),
        ([[point(n) for n in range(9)]] * 2, "9 points where 2 were asked for"),
        (
            [[point("5e1f5e1f-5e1f-5e1f-5e1f-5e1f5e1f5e1f")]] * 2,
            "a point whose id is no int64 >= 0",
        ),
        ([[point(2**63)], []], "a point whose id is no int64 >= 0"),
    ],
)
def test_an_answer_holds_rows_of_the_gallery(
    answers: list[list[ScoredPoint]],
    received: str,
    monkeypatch: pytest.MonkeyPatch,
    refuses: Refuses,
) -> None:
    client = QdrantClient(":memory:")
    index = build(client, "pets")
    responses = [QueryResponse(points=points) for points in answers]
    monkeypatch.setattr(client, "query_batch_points", lambda *_, **__: responses)
    with refuses(
        errors.ServerError,
        f"Qdrant must answer with rows of the gallery. Received: {received}, for collection "
        "'pets'. See which server answers, and what else writes to the collection.",
    ):
        index.search(GALLERY[:2])
