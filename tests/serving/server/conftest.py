"""One tiny SavedModel with a signature for each thing a server can get wrong."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from tests.helpers.server_target import Served, reload, server_under_test

Publish = Callable[[Path, str], Path]


class Tiny(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = tf.Variable(tf.reshape(tf.range(12.0), (4, 3)))

    @tf.function(input_signature=[tf.TensorSpec((None, 4), name="x")])
    def project(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x @ self.weights, "total": tf.reduce_sum(x, -1)}

    @tf.function(
        input_signature=[tf.TensorSpec((None,), name="a"), tf.TensorSpec((None,), name="b")]
    )
    def add(self, a: tf.Tensor, b: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"total": a + b}

    @tf.function(input_signature=[tf.TensorSpec((None,), name="x")])
    def kinds(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        types = ("float64", "int8", "uint8", "int32", "int64", "uint32", "uint64", "bool")
        outputs = {name: tf.cast(x, name) for name in types}
        outputs |= {name: tf.cast(x, name) for name in ("float16", "bfloat16", "complex64")}
        return outputs | {"string": tf.strings.as_string(x), "scalar": tf.reduce_sum(x)}

    @tf.function(input_signature=[tf.TensorSpec((), tf.string, name="text")])
    def echo(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"text": tf.identity(text)}

    @tf.function(input_signature=[tf.TensorSpec((), tf.int64, name="steps")])
    def count(self, steps: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"steps": tf.while_loop(lambda i: i < steps, lambda i: [i + 1], [0 * steps])[0]}


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny = Tiny()
    signatures = {
        "serving_default": tiny.project,
        "add": tiny.add,
        "add_default": tiny.add,
        "kinds": tiny.kinds,
        "echo": tiny.echo,
        "count": tiny.count,
    }
    tf.saved_model.save(tiny, str(path), signatures=signatures)
    # A default value for one input, as the C++ server knows it and tf.saved_model.save does not.
    file = path / "saved_model.pb"
    proto = SavedModel.FromString(file.read_bytes())
    signature = proto.meta_graphs[0].signature_def["add_default"]
    signature.defaults["b"].CopyFrom(tf.make_tensor_proto([10.0]))
    file.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(scope="session")
def publish(saved_model: Path) -> Publish:
    """Puts the model under a base path the way an exporter must: copy beside, then rename."""

    def put(base: Path, name: str) -> Path:
        base.mkdir(exist_ok=True)
        copy = base / f"copying-{name.strip()}"
        shutil.copytree(saved_model, copy)
        return copy.rename(base / name)

    return put


@pytest.fixture(scope="module")
def served(publish: Publish, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The development server, or the one at KERAS_MRL_TFS_TARGET; see test_conformance.py."""
    flags = {"file_system_poll_wait_seconds": 0.02, "max_num_load_retries": 0}
    with server_under_test("", tmp_path_factory.mktemp("base"), publish, **flags) as served:
        yield served


@pytest.fixture
def reloaded(served: Served) -> Iterator[Served]:
    """The server, which gets its first config again afterwards."""
    yield served
    served(reload(served))
