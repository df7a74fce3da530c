"""Shapes that a signature does not declare: they are refused, where a kernel would end the process.

The server runs in a process of its own, since a convolution of TensorFlow ends the one that it runs
in over an input of another rank.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from keras_mrl_serving.server import DevServer
from tests.helpers.conv_model import save
from tests.helpers.server_process import server_process
from tests.helpers.server_target import TIMEOUT_S, Served, predict

WRONG = ((), (0,), (64,), (2, 64), (2, 8, 8), (2, 8, 8, 3), (2, 4, 8, 1), (1, 2, 8, 8, 1))


class Server(Served):
    """A server in a process of its own, over gRPC and REST."""

    def __init__(self, target: str, rest_port: int) -> None:
        super().__init__(target, Path(), 1)
        self.url = f"http://127.0.0.1:{rest_port}/v1/models/default:predict"

    def post(self, body: object) -> tuple[int, dict[str, object]]:
        request = urllib.request.Request(self.url, json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("conv")
    save(base / "1")
    log = tmp_path_factory.mktemp("log") / "log"
    with server_process(base, log) as (_, target, rest_port):
        server = Server(target, rest_port)
        with server.channel:
            yield server


def refusal_of(shape: tuple[int, ...]) -> str:
    return (
        "An input must have the shape that the signature declares. Received: x of shape "
        f"{shape}, where (None, 8, 8, 1) is declared. Send x of that shape; None takes any size."
    )


@pytest.mark.parametrize("shape", WRONG)
def test_a_wrong_shape_is_refused_and_the_server_goes_on(
    server: Server, shape: tuple[int, ...]
) -> None:
    x = np.ones(shape, np.float32)
    assert server.refuses(predict(inputs={"x": x})) == ("INVALID_ARGUMENT", refusal_of(shape))
    assert server.post({"inputs": x.tolist()}) == (400, {"error": refusal_of(x.shape)})
    honest = server(predict(inputs={"x": np.ones((3, 8, 8, 1), np.float32)}))
    assert [dim.size for dim in honest.outputs["y"].tensor_shape.dim] == [3, 2]


def test_rows_of_another_shape_over_rest(server: Server) -> None:
    assert server.post({"instances": [[1, 2]]}) == (400, {"error": refusal_of((1, 2))})


@pytest.mark.parametrize("signature", ["any_rank", "scalar"])
def test_a_shape_that_is_not_declared_is_free(server: Server, signature: str) -> None:
    shapes: list[tuple[int, ...]] = [()]
    if signature == "any_rank":
        shapes += [(0,), (3,), (1, 2, 3, 4, 5)]
    for shape in shapes:
        request = predict(inputs={"x": np.ones(shape, np.float32)}, signature=signature)
        assert [dim.size for dim in server(request).outputs["y"].tensor_shape.dim] == list(shape)


def test_an_empty_batch_is_fine(server: Server) -> None:
    answer = server(predict(inputs={"x": np.ones((0, 8, 8, 1), np.float32)}))
    assert answer.outputs["y"].tensor_shape.dim[0].size == 0


def test_with_batching_the_padded_batch_has_the_declared_size(tmp_path: Path) -> None:
    save(tmp_path / "base" / "1")
    file = tmp_path / "batching.config"
    file.write_text("max_batch_size { value: 4 } allowed_batch_sizes: 4")
    server = DevServer(tmp_path / "base", enable_batching=True, batching_parameters_file=file)
    with server as target:
        served = Served(target, Path(), 1)
        with served.channel:
            request = predict(inputs={"x": np.ones((3, 5, 6, 1), np.float32)}, signature="of_four")
            answer = served(request)
            assert [dim.size for dim in answer.outputs["y"].tensor_shape.dim] == [3, 2]
            code, text = served.refuses(
                predict(inputs={"x": np.ones((3, 5, 6, 2), np.float32)}, signature="of_four")
            )
    assert code == "INVALID_ARGUMENT"
    assert text is not None
    assert "x of shape (4, 5, 6, 2), where (4, None, None, 1) is declared" in text
