"""A server in memory, for the tests of applications: clients ask it without a socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from . import calls, contract, errors
from .errors import call_error

__all__ = ["InMemoryServer"]


class InMemoryServer:
    """Answers `Client` and `AsyncClient` by a function, in place of a target.

    Args:
        manifest: Manifest of the model; it answers `describe`.
        answer: Takes every other `Call` and returns the outputs of its signature by name, or None
            if the model lacks the signature. The `model_id` of the manifest is added to them, if
            they have none. It may raise the `KerasMrlError` that a server should
            seem to have sent.
        model: Name of the model.
        version: The version that answers.
        label: Label of that version; None for none.

    Attributes:
        calls: Every `Call` so far, `describe` too.

    Examples:
        >>> image = {"dtype": "float32", "shape": [None, 3]}
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(2, 3),
        ...     width=3, inputs={"image": image}, made_with={})
        >>> def answer(call):
        ...     dim = int(call.signature.removeprefix("embed_"))
        ...     return {"embedding": truncate(call.inputs["image"], dim)}
        >>> from keras_mrl_serving.testing import InMemoryServer
        >>> server = InMemoryServer(manifest, answer)
        >>> Client(server).embed([[3, 4, 12]], dim=2).tolist()
        [[0.6000000238418579, 0.800000011920929]]
        >>> [call.signature for call in server.calls]
        ['describe', 'embed_2']
    """

    target = "memory"

    def __init__(
        self,
        manifest: contract.Manifest,
        answer: Callable[[calls.Call], calls.Arrays | None],
        model: str = "default",
        version: int = 1,
        label: str | None = None,
    ) -> None:
        self.manifest = manifest
        self.version = version
        self.calls: list[calls.Call] = []
        self.answer = answer
        self._model = model
        self._label = label

    def send(self, envelope: calls.Envelope) -> calls.Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        if envelope.model != self._model:
            raise call_error(errors.ModelNotFoundError, envelope, self.target, "no such model")
        if envelope.version not in (None, self.version):
            raise call_error(errors.VersionNotFoundError, envelope, self.target, "no such version")
        if envelope.version is None and envelope.label not in (None, self._label):
            raise call_error(errors.VersionNotFoundError, envelope, self.target, "no such label")
        request = envelope.request
        if isinstance(request, calls.AskStatus):
            return calls.Reply((calls.VersionStatus(self.version, "AVAILABLE"),), None)
        if isinstance(request, calls.AskSignatures):
            remedy = "Ask a DevServer over an exported model for its signatures."
            received = "a request for signatures, which a function has none of"
            raise call_error(errors.ServerError, envelope, self.target, received, remedy=remedy)
        return calls.Reply(self._outputs(request, envelope), self.version)

    async def send_async(self, envelope: calls.Envelope) -> calls.Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        return self.send(envelope)

    def close(self) -> None:
        """Do nothing: other clients may go on asking."""

    async def close_async(self) -> None:
        """Do nothing: other clients may go on asking."""

    def _outputs(
        self, call: calls.Call, envelope: calls.Envelope
    ) -> Mapping[str, npt.NDArray[Any]]:
        self.calls.append(call)
        if call.signature == contract.DESCRIBE:
            rows = len(call.inputs["key"])
            return {"manifest": np.array([self.manifest.to_json().encode()] * rows, object)}
        outputs = self.answer(call)
        if outputs is None:
            raise call_error(
                errors.SignatureNotFoundError, envelope, self.target, "no such signature"
            )
        model_id = self.manifest.model_id
        if model_id is not None and call.signature != contract.SERVING_DEFAULT:
            rows = len(next(iter(call.inputs.values())))
            outputs = {contract.MODEL_ID: np.full(rows, model_id, np.int32), **outputs}
        return {name: np.asarray(outputs[name]) for name in call.outputs or outputs}
