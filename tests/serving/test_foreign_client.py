"""Clients by other people, in environments of their own, ask what we serve.

Neither knows of us, and neither is made with the protos of this environment: one has them from
protoc 3.20 under names of its own, the other from before that, with a protobuf that still reads it.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl_export import export_saved_model
from keras_mrl_serving import CascadePolicy, Client
from keras_mrl_serving.cascade.policy import Stage
from keras_mrl_serving.server import DevServer

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        not os.environ.get("KERAS_MRL_SOAK"), reason="installs packages; `make soak` runs it"
    ),
]

SIGNATURES = ("embed_2", "classify_4", "classify_adaptive", "features")

# The arguments are a target, a file of images and a file for the outputs, by `signature/output`.
OVMSCLIENT = """
import sys
import numpy as np
from ovmsclient import make_grpc_client
from ovmsclient.tfs_compat.grpc.requests import make_predict_request
from ovmsclient.tfs_compat.grpc.tensors import make_ndarray

target, images, answers, *signatures = sys.argv[1:]
client = make_grpc_client(target)
assert client.get_model_status("toy", 1)[1]["state"] == "AVAILABLE"
assert client.get_model_metadata("toy", 1)["inputs"]["x"]["shape"] == [-1, 4]
inputs = {"x": np.load(images)}
default = client.predict(inputs, "toy", 1)  # it takes version 0 for the newest, which it is not
arrays = {f"serving_default/{name}": array for name, array in default.items()}
for signature in signatures:
    request = make_predict_request(inputs, "toy", 1).raw_request
    request.model_spec.signature_name = signature
    outputs = client.prediction_service_stub.Predict(request, 10.0).outputs
    arrays |= {f"{signature}/{name}": make_ndarray(tensor) for name, tensor in outputs.items()}
np.savez(answers, **arrays)
"""
MIN_TFS_CLIENT = """
import sys
import numpy as np
from min_tfs_client.requests import PredictionServiceStub, TensorServingClient
from min_tfs_client.tensors import ndarray_to_tensor_proto, tensor_proto_to_ndarray
from tensorflow_serving.apis.predict_pb2 import PredictRequest

def read(tensor):
    if tensor.dtype == 7:  # strings, for which it has no array
        return np.array(list(tensor.string_val)).reshape([d.size for d in tensor.tensor_shape.dim])
    return tensor_proto_to_ndarray(tensor)

target, images, answers, *signatures = sys.argv[1:]
host, port = target.split(":")
client = TensorServingClient(host, int(port))
inputs = {"x": np.load(images)}
outputs = client.predict_request("toy", inputs, timeout=10).outputs
arrays = {f"serving_default/{name}": read(tensor) for name, tensor in outputs.items()}
for signature in signatures:
    request = PredictRequest()
    request.model_spec.name = "toy"
    request.model_spec.signature_name = signature
    request.inputs["x"].CopyFrom(ndarray_to_tensor_proto(inputs["x"]))
    outputs = PredictionServiceStub(client._channel).Predict(request, 10).outputs
    arrays |= {f"{signature}/{name}": read(tensor) for name, tensor in outputs.items()}
np.savez(answers, **arrays)
"""
FOREIGN = {
    "ovmsclient": (["ovmsclient==2023.1"], OVMSCLIENT),
    "min-tfs-client": (["min-tfs-client==1.0.2", "protobuf==3.20.3"], MIN_TFS_CLIENT),
}


def images() -> Any:
    return np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keras.utils.set_random_seed(3)
    backbone = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(8)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes=3, dims=(2, 4, 8)))
    folder = tmp_path_factory.mktemp("models")
    return export_saved_model(
        model,
        folder / "toy",
        sample=images()[:16],
        policy=CascadePolicy((Stage(2, 0.5), Stage(4, 0.6), Stage(8, None))),
        labels=["lynx", "ibex", "grüner Specht"],
        version=1,
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_a_client_that_knows_nothing_of_us_reads_the_same_numbers(
    name: str, version: Path, tmp_path: Path
) -> None:
    requirements, script = FOREIGN[name]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([python, *install, *requirements], check=True)
    np.save(tmp_path / "images.npy", images())
    with DevServer(version.parent, model_name="toy") as target:
        files = [tmp_path / "images.npy", tmp_path / "answers.npz"]
        subprocess.run([python, "-c", script, target, *files, *SIGNATURES], check=True)
        with Client(target, model="toy") as client:
            adaptive = client.classify_adaptive(images())
            embedding = client.embed(images(), dim=2)
    with np.load(tmp_path / "answers.npz") as answers:
        arrays = dict(answers)

    signatures = tf.saved_model.load(str(version)).signatures
    expected = {
        f"{signature}/{output}": tensor.numpy()
        for signature in (*SIGNATURES, "serving_default")
        for output, tensor in signatures[signature](x=tf.constant(images())).items()
    }
    assert set(arrays) == set(expected)
    assert len({*arrays["classify_adaptive/dim"]}) > 1
    for output, array in expected.items():
        if array.dtype == object:
            assert arrays[output].tolist() == array.tolist(), output
        elif array.dtype == np.float32:
            np.testing.assert_allclose(arrays[output], array, rtol=0, atol=1e-6, err_msg=output)
        else:
            np.testing.assert_array_equal(arrays[output], array, err_msg=output)

    np.testing.assert_array_equal(arrays["embed_2/embedding"], embedding)
    np.testing.assert_array_equal(arrays["classify_adaptive/class_ids"], adaptive.class_ids)
    np.testing.assert_array_equal(arrays["classify_adaptive/probabilities"], adaptive.probabilities)
    np.testing.assert_array_equal(arrays["classify_adaptive/dim"], adaptive.dim)
    assert adaptive.labels is not None
    texts = np.char.decode(arrays["classify_adaptive/labels"], "utf-8")
    assert texts.tolist() == adaptive.labels.tolist()
