"""For the tests of applications: a server in memory that clients ask without a socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from . import calls, contract, errors
from .errors import failed

__all__ = ["InMemoryServer"]


class InMemoryServer:
    """Answers `Client` and `AsyncClient` by a function, in place of a target.

    Args:
        manifest: What the model says of itself.
        answer: From a `Call` to the outputs of its signature, by name; `describe` is answered by
            the manifest. None for a signature the model has not; it may raise whatever
            `KerasMrlError` a server should seem to have sent.
        model: Name of the model.
        version: The version that answers.
        label: The label it has; None for none.

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
        self._answer = answer
        self._model = model
        self._label = label

    def send(self, envelope: calls.Envelope) -> calls.Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        if envelope.model != self._model:
            raise failed(errors.ModelNotFoundError, envelope, self.target, "no such model")
        if envelope.version not in (None, self.version):
            raise failed(errors.VersionNotFoundError, envelope, self.target, "no such version")
        if envelope.version is None and envelope.label not in (None, self._label):
            raise failed(errors.VersionNotFoundError, envelope, self.target, "no such label")
        request = envelope.request
        if isinstance(request, calls.AskStatus):
            return calls.Reply((calls.VersionStatus(self.version, "AVAILABLE"),), None)
        if isinstance(request, calls.AskSignatures):
            remedy = "Ask a DevServer over an exported model for its signatures."
            received = "a request for signatures, which a function has none of"
            raise failed(errors.ServerError, envelope, self.target, received, remedy=remedy)
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
        outputs = self._answer(call)
        if outputs is None:
            raise failed(errors.SignatureNotFoundError, envelope, self.target, "no such signature")
        return {name: np.asarray(outputs[name]) for name in call.outputs or outputs}
