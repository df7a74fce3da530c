"""Runs SavedModels in an environment with an older TensorFlow, without any package of ours."""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def to_json(array: Any) -> dict[str, Any]:
    values = array.ravel().tolist()
    if array.dtype == object:
        values = [base64.b64encode(value).decode() for value in values]
    return {"dtype": str(array.dtype), "shape": array.shape, "values": values}


def from_json(array: dict[str, Any]) -> Any:
    values = array["values"]
    if array["dtype"] == "object":
        values = [base64.b64decode(value) for value in values]
    return np.array(values, array["dtype"]).reshape(array["shape"])


def ask(path: str, signatures: dict[str, Any]) -> dict[str, Any]:
    """The outputs of every signature of one SavedModel, loaded as TensorFlow Serving loads it."""
    import tensorflow as tf
    import tensorflow_text  # noqa: F401  (brings the operations that TensorFlow Serving has built in)

    answers = {}
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        graph = tf.compat.v1.saved_model.loader.load(session, ["serve"], path)
        for name, inputs in signatures.items():
            signature = graph.signature_def[name]
            fetches = {key: info.name for key, info in signature.outputs.items()}
            feeds = {signature.inputs[key].name: from_json(v) for key, v in inputs.items()}
            answer = session.run(fetches, feeds)
            answers[name] = {key: to_json(value) for key, value in answer.items()}
    return answers


if __name__ == "__main__":
    import tensorflow as tf

    questions = json.loads(Path(sys.argv[1]).read_text())
    answers = {path: ask(path, signatures) for path, signatures in questions.items()}
    Path(sys.argv[2]).write_text(json.dumps({"tensorflow": tf.__version__, "answers": answers}))
