"""A Predict request run by a session; its refusals are in test_conformance.py, row by row."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.server.run import run_predict
from keras_mrl_serving.server.status import StatusError
from tests.helpers.server_target import predict


@pytest.fixture(scope="module")
def session(saved_model: Path) -> Iterator[SavedModelSession]:
    with SavedModelSession(saved_model) as session:
        yield session


def test_the_default_signature_has_a_name(session: SavedModelSession) -> None:
    request = predict(("total",), inputs={"x": np.ones((1, 4), np.float32)})
    name, outputs = run_predict(session, request, None)
    assert name == "serving_default"
    assert outputs["total"].tolist() == [4]


def test_the_deadline_is_the_runs_own(session: SavedModelSession) -> None:
    request = predict(inputs={"steps": np.array(10**7)}, signature="count")
    with pytest.raises(StatusError, match=r"^Timed out waiting for notification$") as caught:
        run_predict(session, request, 0.02)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
