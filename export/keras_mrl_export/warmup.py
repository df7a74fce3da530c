"""What a server runs before it lets a version answer, so that no first caller waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from keras_mrl_serving._session import SavedModelSession

from .job import ExportError

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
_MAX_RECORDS = 1000  # a server refuses a version with more

Arrays = Mapping[str, npt.NDArray[Any]]


def write_warmup(
    folder: Path,
    session: SavedModelSession,
    model: str,
    inputs: Mapping[str, Arrays],
    batch_sizes: Sequence[int],
) -> None:
    """Write one record per signature and batch size, and run each as a server will.

    A record that fails would keep the server from loading the version.

    Args:
        folder: The SavedModel.
        session: The same, loaded.
        model: Name of the model.
        inputs: Rows for every signature, at least one.
        batch_sizes: How many rows a record has; rows repeat where there are fewer.

    Raises:
        ExportError: If a record fails, or there are more than a server takes.
    """
    records = [
        _record(model, signature, {name: _rows(array, size) for name, array in arrays.items()})
        for signature, arrays in inputs.items()
        for size in batch_sizes
    ]
    if len(records) > _MAX_RECORDS:
        raise ExportError(
            f"A server takes no more than {_MAX_RECORDS} warm-up records. "
            f"Received: {len(inputs)} signatures at {len(batch_sizes)} batch sizes. "
            "Give fewer warmup_batch_sizes, or fewer signatures."
        )
    if not records:
        return
    file = folder / WARMUP_FILE
    with tf.io.TFRecordWriter(str(file)) as writer:
        for record in records:
            writer.write(record.SerializeToString())
    _replay(session, file)


def _record(model: str, signature: str, arrays: Arrays) -> Any:
    log = PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, array in arrays.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    return log


def _rows(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    return np.resize(array, (size, *array.shape[1:]))


def _replay(session: SavedModelSession, file: Path) -> None:
    for data in tf.data.TFRecordDataset(str(file)):
        request = PredictionLog.FromString(data.numpy()).predict_log.request
        signature = request.model_spec.signature_name
        inputs = {name: tf.make_ndarray(tensor) for name, tensor in request.inputs.items()}
        try:
            session.run(signature, inputs)
        except tf.errors.OpError as error:
            raise ExportError(
                "Every warm-up record must run, or no server loads the version. "
                f"Received: {signature} fails: {error.message} "
                "Give a sample of rows that the model can take."
            ) from error
