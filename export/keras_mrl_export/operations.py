"""Which operations a graph may hold: TensorFlow's own, which every server of SavedModels has."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from .errors import ExportError

# These call back into the Python process that made them.
_OF_PYTHON = frozenset(("PyFunc", "PyFuncStateless", "EagerPyFunc"))
# TensorFlow's own too, though tf.raw_ops does not name them: Keras slices and updates by them.
_INTERNAL = ("_", "Xla")


def check_operations(folder: Path) -> None:
    """Raise `ExportError` if the SavedModel in `folder` needs more than TensorFlow to run.

    It runs here, where the package that brings an operation is imported, and loads in no server.
    """
    graphs = SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs
    used = {op.name for graph in graphs for op in graph.meta_info_def.stripped_op_list.op}
    foreign = sorted(name for name in used if not _is_tensorflows(name))
    if foreign:
        raise ExportError(
            "A served graph may hold only operations of TensorFlow itself. "
            f"Received: a model that needs {', '.join(foreign)}. Do this before the model, in the "
            "client, or by layers of Keras: TextVectorization for a tokenizer of tensorflow-text, "
            "keras.ops for tf.py_function."
        )


def _is_tensorflows(name: str) -> bool:
    if name in _OF_PYTHON:
        return False
    return hasattr(tf.raw_ops, name) or name.startswith(_INTERNAL)
