"""The client: asks TensorFlow Serving for the dim it chooses, adaptively, or for neighbours."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from . import _rpc, flows
from . import _wire_pb2 as wire
from ._tensors import from_proto, to_proto
from .cascade import CascadePolicy
from .contract import DEFAULT_MODEL_NAME, Manifest
from .errors import (
    InvalidInputError,
    KerasMrlError,
    NoCascadeError,
    NoHeadError,
    ServerError,
    SignatureNotFoundError,
    UnknownDimError,
    VersionChangedError,
    VersionNotFoundError,
)
from .inputs import Inputs
from .options import Options
from .results import Classification, Neighbors

T = TypeVar("T")

# What a manifest that is no longer the model's may be the reason of.
_PERHAPS_STALE = (
    InvalidInputError,
    NoCascadeError,
    NoHeadError,
    SignatureNotFoundError,
    UnknownDimError,
)


class Index(Protocol):
    """A gallery that can be searched by embeddings of its width."""

    @property
    def width(self) -> int:
        """Dim the queries are embedded at."""

    def search(self, queries: npt.ArrayLike) -> Neighbors:
        """Return the nearest gallery rows of each query."""


class Client:
    """Asks one model of a TensorFlow Serving server, or of `keras-mrl serve`.

    It needs neither TensorFlow nor Keras. What the model serves is read from the model itself,
    once, and again when its version changes. One client may be used by many threads.

    Args:
        target: Address of the server's gRPC port, "host:port".
        model: Name the server gives the model.
        options: Timeout and message sizes.

    Raises:
        KerasMrlError: Every method raises a class of this tree, never one of grpc.

    Examples:
        ```
        with Client("localhost:8500", model="digits") as client:
            client.describe().dims                      # (2, 4, 8, 16, 32, 64)
            client.embed(images, dim=16)                # float32 (batch, 16), unit length
            client.classify_adaptive(images).class_ids  # small dims first
        ```
    """

    def __init__(
        self, target: str, model: str = DEFAULT_MODEL_NAME, *, options: Options | None = None
    ) -> None:
        self.target = target
        self.model = model
        self.options = options or Options()
        self._channel = _rpc.open_channel(target, self.options)
        self._predict = _rpc.predict_stub(self._channel)
        self._described: tuple[int, Manifest] | None = None

    def describe(self) -> Manifest:
        """Return what the model says of itself: its dims, inputs, policy and quality."""
        described = self._described
        return described[1] if described else self._drive(flows.describe)

    def embed(self, inputs: Inputs, dim: int) -> npt.NDArray[np.float32]:
        """Return embeddings `(batch, dim)`.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            dim: One of `describe().dims`.
        """
        return self._answer(lambda manifest: flows.embed(manifest, inputs, dim))

    def classify(self, inputs: Inputs, dim: int) -> Classification:
        """Return the best classes of each row, as the head of one dim sees them.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            dim: One of `describe().dims`.
        """
        return self._answer(lambda manifest: flows.classify(manifest, inputs, dim))

    def classify_adaptive(
        self, inputs: Inputs, policy: CascadePolicy | None = None
    ) -> Classification:
        """Return the best classes of each row, wider dims only for rows still unsure.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            policy: None asks the model's own policy, in one call. A policy of the caller's asks
                for features once, then for each wider head with the rows still unsure.
        """
        if policy is None:
            return self._answer(lambda manifest: flows.classify_adaptive(manifest, inputs))
        return self._answer(lambda manifest: flows.classify_by(manifest, inputs, policy))

    def search(self, inputs: Inputs, index: Index) -> Neighbors:
        """Embed the inputs at the index's width and return their nearest gallery rows.

        Args:
            inputs: One array, batch first, or a dict of them by input name.
            index: For example an `ExactIndex` over embeddings of the same model.
        """
        return index.search(self.embed(inputs, index.width))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.target!r}, model={self.model!r})"

    def _answer(self, start: Callable[[Manifest], flows.Flow[T]]) -> T:
        """Run a flow by the manifest; where the one kept refuses, by one read anew."""
        kept = self._described
        try:
            return self._drive(lambda: start(self.describe()))
        except _PERHAPS_STALE:
            self._described = None
            if kept is None or kept[1] == self.describe():
                raise
        return self._drive(lambda: start(self.describe()))

    def _drive(self, start: Callable[[], flows.Flow[T]]) -> T:
        """Run a flow; all its calls are answered by the version that answered the first.

        If that version goes away meanwhile, the flow starts over once.
        """
        try:
            return self._drive_once(start)
        except VersionNotFoundError:
            self._described = None
        try:
            return self._drive_once(start)
        except VersionNotFoundError as error:
            changed = VersionChangedError(
                "All calls of one answer must reach one version. Received: the version that "
                f"began the answer was gone before its end, twice, from {self.target} for model "
                f"{self.model!r}. Let the server keep the version before the newest "
                "(model_version_policy latest {num_versions: 2}), or swap less often."
            )
            changed.target, changed.model, changed.version = self.target, self.model, error.version
            changed.signature, changed.timeout_s = error.signature, error.timeout_s
            raise changed from error

    def _drive_once(self, start: Callable[[], flows.Flow[T]]) -> T:
        flow = start()
        version: int | None = None
        try:
            call = next(flow)
            while True:
                answer, version = self._ask(call, version)
                call = flow.send(answer)
        except StopIteration as done:
            result: T = done.value
        if isinstance(result, Manifest) and version is not None:
            self._described = (version, result)
        return result

    def _ask(self, call: flows.Call, version: int | None) -> tuple[flows.Arrays, int]:
        """Send one call, to `version` if the flow has begun on one."""
        spec = wire.ModelSpec(name=self.model, signature_name=call.signature)
        if version is not None:
            spec.version.value = version
        request = wire.PredictRequest(model_spec=spec, output_filter=call.outputs)
        for name, array in call.inputs.items():
            request.inputs[name].CopyFrom(to_proto(array))
        timeout_s = self.options.timeout_s
        try:
            response = self._predict(request, timeout_s)
        except grpc.RpcError as error:
            raise _rpc.translate(error, self.target, spec, timeout_s) from error
        except ValueError as error:  # grpc's word for a channel that was closed
            raise KerasMrlError(
                "A client asks until it is closed. "
                f"Received: a call on {self!r} after close(). Make another Client."
            ) from error
        try:
            outputs = {name: from_proto(proto) for name, proto in response.outputs.items()}
        except ValueError as error:
            raise ServerError(
                f"A served tensor must be one this client reads. Received: from {self.target} for "
                f"model {self.model!r}, signature {call.signature!r}: {error} "
                "Ask a model exported by keras_mrl_export.export_saved_model."
            ) from error
        answered = response.model_spec.version.value
        described = self._described  # once: another thread may forget it meanwhile
        if described and described[0] != answered:
            self._described = None  # another version: it may serve other dims
        return outputs, answered
