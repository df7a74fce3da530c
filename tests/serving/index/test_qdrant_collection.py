"""What Qdrant's client raises, as an error of this package."""

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

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
        "Give its key: QdrantClient(..., api_key=...).",
    ):
        index.search(GALLERY)
    raised = Rpc(grpc.StatusCode.INTERNAL)
    with refuses(
        errors.ServerError,
        "Qdrant must answer without an error. Received: because, for collection 'pets'. "
        "See the server's log.",
    ):
        index.search(GALLERY)
