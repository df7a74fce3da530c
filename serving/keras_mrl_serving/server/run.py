"""A loaded version and a Predict request: the checks in TensorFlow Serving's order, and the run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from .._session import Signature
from .answer_size import (
    MAX_ANSWER_BYTES,
    check_size,
    expected_size,
    one_large_at_a_time,
    size_of,
)
from .status import failed_precondition, from_number, invalid_argument
from .tensors import decode


class ServingSession(Protocol):
    """A loaded version: a `SavedModelSession`, or one that batches."""

    signatures: Mapping[str, Signature]

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_names: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs one signature; see `SavedModelSession.run`."""

    def cancel(self) -> None:
        """Ends the runs under way, and all later ones, with CANCELLED."""

    def close(self) -> None:
        """Frees everything; call it once no run is under way."""


def run_predict(
    session: ServingSession,
    request: Any,
    timeout_s: float | None,
    max_answer_bytes: int = MAX_ANSWER_BYTES,
) -> tuple[str, dict[str, np.ndarray]]:
    """The name of the signature that answers a PredictRequest, and its outputs.

    Args:
        session: the version.
        request: the `PredictRequest`; of its model_spec the signature alone counts.
        timeout_s: the time left until the caller's deadline; None without one.
        max_answer_bytes: the most that the outputs may take.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send; RESOURCE_EXHAUSTED, the
            answer would be too large.
    """
    name = request.model_spec.signature_name or "serving_default"
    if name not in session.signatures:
        raise failed_precondition(f'Serving signature key "{name}" not found.')
    signature = session.signatures[name]
    inputs = _decoded_inputs(signature, request.inputs)
    _check_output_filter(signature, request.output_filter)

    def run_rows(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run(session, name, rows, request.output_filter, timeout_s)

    size = expected_size(run_rows, signature, inputs, request.output_filter)
    check_size(size, max_answer_bytes)
    with one_large_at_a_time(size, timeout_s):
        outputs = run_rows(inputs)
    check_size(size_of(outputs), max_answer_bytes)
    return name, outputs


def run(
    session: ServingSession,
    name: str,
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    timeout_s: float | None,
) -> dict[str, np.ndarray]:
    """Runs one signature; an error of TensorFlow comes with TensorFlow Serving's code.

    Args:
        session: the version.
        name: a key of its signatures.
        inputs: arrays by the signature's input names.
        outputs: the outputs to fetch; empty means all of them.
        timeout_s: the time left until the caller's deadline; None without one.

    Raises:
        StatusError: the run fails.
    """
    try:
        return session.run(name, inputs, outputs, timeout_s=timeout_s)
    except tf.errors.OpError as error:
        raise from_number(error.error_code, error.message) from error


def _decoded_inputs(signature: Signature, protos: Mapping[str, Any]) -> dict[str, np.ndarray]:
    declared, defaults = signature.inputs, signature.defaults
    if len(protos) > len(declared) or (len(protos) < len(declared) and not defaults):
        raise invalid_argument(
            f"input size does not match signature: {len(protos)}!={len(declared)} "
            f"len({_listed(protos)}) != len({_listed(declared)}). "
            f"Sent extra: {_listed(protos.keys() - declared.keys())}. "
            f"Missing but required: {_listed(declared.keys() - protos.keys())}."
        )
    inputs = {}
    for alias in sorted(declared):
        if alias not in protos and alias not in defaults:
            raise invalid_argument(
                f"Signature input alias: {alias}(feed name: {declared[alias].name}) not found in "
                f"request and no default value provided. Inputs expected to be in the request "
                f"{_listed(protos)}, or default input alias set: {','.join(sorted(defaults))}"
            )
        try:
            inputs[alias] = decode(protos[alias] if alias in protos else defaults[alias])
        except ValueError as error:
            raise invalid_argument(f"tensor parsing error: {alias}") from error
    used = [alias for alias in inputs if alias in protos]
    if len(used) != len(protos):
        raise invalid_argument(
            f"Inputs contains invalid name. Used request inputs: {','.join(used)}, "
            f"request input: {','.join(sorted(protos))}"
        )
    return inputs


def _check_output_filter(signature: Signature, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for alias in names:
        if alias not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {alias} Outputs expected to be "
                f"in the set {_listed(signature.outputs)}."
            )
        if alias in seen:
            raise invalid_argument(f"duplicate output tensor alias: {alias}")
        seen.add(alias)


def _listed(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"
