"""Every signature is run once by the server before anyone waits for it."""

import json
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.parity import PARITY_FILE
from keras_mrl_export.warmup import WARMUP_FILE, write_warmup
from keras_mrl_serving import Client
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.server import DevServer
from tests.helpers.export_models import TOP_K, Exported, only_tensorflow

pytestmark = pytest.mark.backend


def records(path: Path) -> dict[str, list[int]]:
    """The batch sizes of the records of each signature."""
    found: dict[str, list[int]] = {}
    for data in tf.data.TFRecordDataset(str(path / WARMUP_FILE)):
        request = PredictionLog.FromString(data.numpy()).predict_log.request
        (size,) = {tensor.tensor_shape.dim[0].size for tensor in request.inputs.values()}
        found.setdefault(request.model_spec.signature_name, []).append(size)
    return found


def test_one_record_of_one_row_per_signature(classifier: Exported) -> None:
    written = classifier.session.signatures.keys() - {"__saved_model_init_op"}
    assert records(classifier.path) == {name: [1] for name in written}


def test_records_hold_real_rows(untied: Exported) -> None:
    data = next(iter(tf.data.TFRecordDataset(str(untied.path / WARMUP_FILE))))
    request = PredictionLog.FromString(data.numpy()).predict_log.request
    image = tf.make_ndarray(request.inputs["image"])
    np.testing.assert_array_equal(image, untied.rows[""][:1])


def test_how_near_it_was_lies_beside(untied: Exported) -> None:
    report = json.loads((untied.path / PARITY_FILE).read_text())
    assert report["rows"] == 16
    assert report["tolerance"] == 1e-5
    shares = report["largest_difference"]
    assert shares.keys() == {*untied.job.signatures, "serving_default"}
    assert all(0 <= share <= 1e-5 for share in shares.values())


@only_tensorflow
def test_sizes_are_the_users_to_choose(encoder: Exported, tmp_path: Path) -> None:
    sample = encoder.rows[""][:2]
    given: list[Any] = [(1, 5), np.array([1, 5]), (size for size in (1, 5)), ()]
    for sizes in given:
        path = export_saved_model(
            encoder.model, tmp_path, sample, signatures=["embed_8"], warmup_batch_sizes=sizes
        )
        if sizes is given[-1]:
            assert not (path / WARMUP_FILE).exists()
        else:
            expected = ("embed_8", "serving_default", "describe")
            assert records(path) == {name: [1, 5] for name in expected}


@only_tensorflow
def test_a_server_takes_them(untied: Exported) -> None:
    with DevServer(untied.path.parent, model_name="m") as target, Client(target, "m") as client:
        assert client.classify(untied.rows[""][:3], dim=2).class_ids.shape == (3, TOP_K)


@only_tensorflow
@pytest.mark.parametrize("sizes", [(0,), (True,), (1.5,)])
def test_sizes_that_are_none(encoder: Exported, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    text = f"warmup_batch_sizes must be positive integers. Received: {sizes}. "
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}Give for example \(1, 32\), or"):
        export_saved_model(encoder.model, tmp_path, encoder.rows[""], warmup_batch_sizes=sizes)


@only_tensorflow
def test_more_than_a_server_takes(encoder: Exported, tmp_path: Path) -> None:
    sizes = range(1, 400)
    with pytest.raises(ExportError) as caught:
        export_saved_model(
            *(encoder.model, tmp_path, encoder.rows[""]),
            signatures=["embed_8"],
            warmup_batch_sizes=sizes,
        )
    assert str(caught.value) == (
        "A server takes no more than 1000 warm-up records. "
        "Received: 3 signatures at 399 batch sizes. "
        "Give fewer warmup_batch_sizes, or fewer signatures."
    )
    assert list(tmp_path.iterdir()) == []


@only_tensorflow
def test_a_record_that_fails_keeps_the_version_back(tmp_path: Path) -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(8)(inputs))
    path = export_saved_model(model, tmp_path, np.ones((2, 4), np.float32))
    wrong = {"embed_8": {"inputs": np.ones((1, 3), np.float32)}}
    with SavedModelSession(path) as session, pytest.raises(ExportError) as caught:
        write_warmup(path, session, "m", wrong, (1,))
    assert str(caught.value).startswith(
        "Every warm-up record must run, or no server loads the version. Received: embed_8 fails: "
    )
    assert str(caught.value).endswith("Give a sample of rows that the model can take.")
