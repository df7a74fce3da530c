"""Warm-up by the calls that feed tf.Example: Classify, Regress and MultiInference."""

from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from .running import ServingSession, run
from .status import StatusError, invalid_argument

_CLASSIFY = "tensorflow/serving/classify"
_REGRESS = "tensorflow/serving/regress"


def run_classify(session: ServingSession, request: Any) -> None:
    """Runs a ClassificationRequest.

    Args:
        session: the version.
        request: the request; of its model_spec the signature alone counts.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    name, signature = _signature(session, request, "No signature was found with the name")
    outputs = _classification_outputs(signature)
    run(session, name, _examples(request.input), outputs, None)


def run_regress(session: ServingSession, request: Any) -> None:
    """Runs a RegressionRequest.

    Args:
        session: the version.
        request: the request; of its model_spec the signature alone counts.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    name, signature = _signature(session, request, "No signature was found with the name")
    outputs = _regression_outputs(signature)
    run(session, name, _examples(request.input), outputs, None)


def run_multi_inference(session: ServingSession, request: Any) -> None:
    """Runs the tasks of a MultiInferenceRequest, one after the other.

    Args:
        session: the version.
        request: the request.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    found: dict[str, Sequence[str]] = {}
    for task in request.tasks:
        if not task.model_spec.name:
            raise invalid_argument("Found ModelSpec with an empty model name.")
        if task.model_spec.name != request.tasks[0].model_spec.name:
            raise invalid_argument(
                "All ModelSpecs in a MultiInferenceRequest must access the same model name."
            )
        text = "Requested signature not found in model graph"
        name, signature = _signature(session, task, text)
        if name in found:
            raise invalid_argument(f"Duplicate evaluation of signature: {name}")
        if task.method_name not in (_CLASSIFY, _REGRESS):
            raise StatusError(
                grpc.StatusCode.UNIMPLEMENTED,
                f"Unsupported signature method_name: {task.method_name}",
            )
        classifies = task.method_name == _CLASSIFY
        found[name] = (_classification_outputs if classifies else _regression_outputs)(signature)
    for name, outputs in found.items():
        run(session, name, _examples(request.input), outputs, None)


def _signature(session: ServingSession, request: Any, missing: str) -> tuple[str, Any]:
    name = request.model_spec.signature_name or "serving_default"
    if name not in session.signatures:
        raise invalid_argument(f"{missing}: {name}")
    return name, session.signatures[name]


def _classification_outputs(signature: Any) -> Sequence[str]:
    count = len(signature.outputs)
    _check_input(signature, "classification", count in (1, 2), "one or two output Tensors, found ")
    outputs = [name for name in ("classes", "scores") if name in signature.outputs]
    if not outputs:
        raise invalid_argument(
            'Expected classification signature outputs to contain at least one of "classes" or '
            f'"scores". Signature was: {signature}'
        )
    return outputs


def _regression_outputs(signature: Any) -> Sequence[str]:
    _check_input(signature, "regression", len(signature.outputs) == 1, "one output Tensor.")
    if "outputs" not in signature.outputs:
        raise invalid_argument(f"No regression outputs found in SignatureDef: {signature}")
    return ["outputs"]


def _check_input(signature: Any, kind: str, outputs_fit: bool, expected: str) -> None:
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    if not outputs_fit:
        found = "" if expected.endswith(".") else len(signature.outputs)
        raise invalid_argument(f"Expected {expected}{found}")
    if "inputs" not in signature.inputs:
        raise invalid_argument(f"No {kind} inputs found in SignatureDef: {signature}")


def _examples(given: Any) -> dict[str, np.ndarray]:
    kind = given.WhichOneof("kind")
    examples = list(getattr(given, kind).examples) if kind else []
    if not examples:
        raise invalid_argument("Input is empty.")
    # Two messages end to end are one with the fields of both: so the context joins each example.
    context = (
        given.example_list_with_context.context.SerializeToString()
        if kind == "example_list_with_context"
        else b""
    )
    serialized = np.empty(len(examples), object)
    serialized[:] = [context + example.SerializeToString() for example in examples]
    return {"inputs": serialized}
