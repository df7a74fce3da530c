"""Warm-up records: requests that a server runs itself before it lets a version answer."""

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

Arrays = Mapping[str, npt.NDArray[Any]]

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"
_MAX_RECORDS = 1000  # a server refuses a version with more


def write_warmup(
    folder: Path,
    session: SavedModelSession,
    model: str,
    inputs: Mapping[str, Arrays],
    batch_sizes: Sequence[int],
) -> None:
    """Write one record per signature and batch size, and run each as a server will.

    Args:
        folder: The SavedModel.
        session: The same SavedModel, loaded.
        model: Name of the model.
        inputs: Inputs of every signature, at least one row.
        batch_sizes: Rows of a record; they are repeated where `inputs` has fewer.

    Raises:
        ExportError: If a record fails, or there are more than a server takes.
    """
    records = [
        _record(model, signature, arrays, size)
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


def _record(model: str, signature: str, arrays: Arrays, size: int) -> Any:
    log = PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    for name, array in arrays.items():
        rows = np.resize(array, (size, *array.shape[1:]))
        request.inputs[name].CopyFrom(tf.make_tensor_proto(rows))
    return log


def _replay(session: SavedModelSession, file: Path) -> None:
    for record in tf.data.TFRecordDataset(str(file)):
        request = PredictionLog.FromString(record.numpy()).predict_log.request
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
