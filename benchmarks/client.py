"""What the client costs over a bare tensorflow-serving-api stub, measured in one run.

    python benchmarks/client.py [--calls 2000]

The development server runs in a process of its own, over a model of one matrix product, which it
serves twice: without a `model_id` in its answers, and with one. The stub and the client ask it in
turns, the same rows, so that what else the machine does falls on all. Then the client asks both
models in turns: what the id costs.
"The same work" of the stub: the request's tensor from the array's bytes, the call, and
`np.array(float_val)` of the answer; it checks nothing. Then: decoding a million floats, importing
the client in a fresh process, its size as installed, and rows split over calls in flight.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

WIDTH = 64
BATCHES = (1, 64)
ROOT = Path(__file__).parents[1]

SERVER = """
import sys, time
import numpy as np, tensorflow as tf
from keras_mrl_serving import Manifest
from keras_mrl_serving.server import DevServer

path, port, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module = tf.Module()
module.matrix = tf.Variable(np.random.default_rng(0).normal(size=(width, width)), dtype=tf.float32)
rows = tf.TensorSpec((None, width), tf.float32, "x")
key = tf.TensorSpec((None,), tf.string, "key")

def save(name, model_id):
    manifest = Manifest(name=name, kind="encoder", fingerprint="5e1f", dims=(width,), width=width,
        inputs={"x": {"dtype": "float32", "shape": [None, width]}}, made_with={},
        model_id=model_id).to_json()

    def embed(x):
        ids = {} if model_id is None else {"model_id": tf.fill(tf.shape(x)[:1], model_id)}
        return {"embedding": x @ module.matrix, **ids}

    signatures = {
        f"embed_{width}": tf.function(embed, [rows]),
        "describe": tf.function(lambda key: {"manifest": tf.fill(tf.shape(key), manifest)}, [key]),
    }
    tf.saved_model.save(module, f"{path}/{name}/1", signatures=signatures)
    return f'config {{ name: "{name}" base_path: "{path}/{name}" model_platform: "tensorflow" }}'

configs = [save("toy", None), save("identified", 5)]
with open(path + "/models.config", "w") as file:
    file.write(f"model_config_list {{ {' '.join(configs)} }}")
server = DevServer(model_config_file=path + "/models.config", port=port)
server.start()
print("ready", flush=True)
server.wait()
"""

IMPORT = """
import time
began = time.perf_counter()
from keras_mrl_serving import Client
print(time.perf_counter() - began)
"""


@contextmanager
def served() -> Iterator[str]:
    """A server of its own process, of a model that answers in well under a millisecond."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as path:
        arguments = [sys.executable, "-c", SERVER, path, str(port), str(WIDTH)]
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError("The server must start. Received: its end. Run its text alone.")
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def stub_of(target: str) -> Callable[[np.ndarray], np.ndarray]:
    """What an application without this package would write, made as fast as it goes."""
    import grpc
    from tensorflow.core.framework.tensor_pb2 import TensorProto
    from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
    from tensorflow.core.framework.types_pb2 import DT_FLOAT
    from tensorflow_serving.apis.predict_pb2 import PredictRequest
    from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

    channel = grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)])
    stub = PredictionServiceStub(channel)

    def embed(rows: np.ndarray) -> np.ndarray:
        request = PredictRequest()
        request.model_spec.name = "toy"
        request.model_spec.signature_name = f"embed_{WIDTH}"
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in rows.shape])
        request.inputs["x"].CopyFrom(
            TensorProto(dtype=DT_FLOAT, tensor_shape=shape, tensor_content=rows.tobytes())
        )
        tensor = stub.Predict(request, timeout=10.0).outputs["embedding"]
        shape = [dim.size for dim in tensor.tensor_shape.dim]
        return np.array(tensor.float_val, np.float32).reshape(shape)

    return embed


def in_turns(calls: int, *functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each function, called in turns."""
    took: list[list[float]] = [[] for _ in functions]
    for turn in range(calls + calls // 10):
        for function, times in zip(functions, took, strict=True):
            began = time.perf_counter()
            function()
            if turn >= calls // 10:  # the first tenth warms up
                times.append(time.perf_counter() - began)
    return [1e3 * statistics.median(times) for times in took]


def decode_ms() -> float:
    """Median milliseconds of reading a million floats as TensorFlow Serving sends them."""
    from keras_mrl_serving import _wire_pb2 as wire
    from keras_mrl_serving._wire import from_proto, to_proto

    proto = to_proto(np.random.default_rng(0).normal(size=(1000, 1000)).astype(np.float32))
    size = len(proto.tensor_content)
    packed = b"\x2a" + bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128])
    content, proto.tensor_content = proto.tensor_content, b""
    proto = wire.TensorProto.FromString(
        proto.SerializeToString() + packed + bytes([size >> 21]) + content
    )
    return in_turns(200, lambda: from_proto(proto))[0]


def import_s() -> float:
    """Median seconds of importing the client, each time in a fresh process."""
    runs = [subprocess.check_output([sys.executable, "-c", IMPORT]) for _ in range(9)]
    return statistics.median(map(float, runs))


def install_mb() -> float:
    """Megabytes of `pip install keras-mrl` with all it needs, into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints = ["-c", str(ROOT / "constraints.txt")]
        subprocess.check_call(
            [*pip, *constraints, "--target", folder, str(ROOT)], stderr=subprocess.DEVNULL
        )
        names = {path.name for path in Path(folder).iterdir()}
        if names & {"tensorflow", "keras", "jax", "torch"}:
            raise RuntimeError(f"The client must bring no framework. Received: {sorted(names)}.")
        return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6


def main() -> None:
    """Measure, and print one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000, help="calls of each, per batch (2000)")
    calls = parser.parse_args().calls
    from keras_mrl_serving import Client, Options

    report: dict[str, Any] = {}
    with (
        served() as target,
        Client(target, "toy") as client,
        Client(target, "identified") as identified,
    ):
        stub = stub_of(target)
        for batch in BATCHES:
            rows = np.random.default_rng(1).normal(size=(batch, WIDTH)).astype(np.float32)
            np.testing.assert_array_equal(stub(rows), client.embed(rows, WIDTH))
            np.testing.assert_array_equal(stub(rows), identified.embed(rows, WIDTH))
            raw, ours = in_turns(calls, partial(stub, rows), partial(client.embed, rows, WIDTH))
            # In a run of their own: the model that is asked more often has the warmer caches.
            without, with_id = in_turns(
                calls, partial(client.embed, rows, WIDTH), partial(identified.embed, rows, WIDTH)
            )
            print(
                f"batch {batch}: stub {raw:.3f} ms, client {ours:.3f} ms, {ours / raw:.3f}x; "
                f"without model_id {without:.3f} ms, with it {with_id:.3f} ms, "
                f"{with_id / without:.3f}x",
                flush=True,
            )
            report[str(batch)] = (raw, ours, with_id / without)
        many = np.random.default_rng(2).normal(size=(50_000, WIDTH)).astype(np.float32)
        one, four = (
            Client(target, "toy", options=Options(max_in_flight=n, timeout_s=60)) for n in (1, 4)
        )
        with one, four:
            alone, together = in_turns(
                10, lambda: one.embed(many, WIDTH), lambda: four.embed(many, WIDTH)
            )
        print(f"50,000 rows by 1,000: {alone:.0f} ms one call at a time, {together:.0f} ms by four")
    ratios = {batch: ours / raw for batch, (raw, ours, _) in report.items()}
    print(
        json.dumps(
            {
                "raw_stub_ms": round(report["1"][0], 4),
                "client_ms": round(report["1"][1], 4),
                "client_over_stub": round(max(ratios.values()), 3),
                "client_over_stub_by_batch": {b: round(r, 3) for b, r in ratios.items()},
                "identity_over_none_by_batch": {b: round(r, 3) for b, (_, _, r) in report.items()},
                "raw_stub_64_ms": round(report["64"][0], 4),
                "client_64_ms": round(report["64"][1], 4),
                "decode_1m_floats_ms": round(decode_ms(), 4),
                "import_s": round(import_s(), 3),
                "install_mb": round(install_mb(), 1),
                "parallel_speedup": round(alone / together, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
