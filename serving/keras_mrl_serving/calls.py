"""What can be asked of a server and what it answers, as arrays and names: no bytes, no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, eq=False)
class Call:
    """One Predict request; it is answered by arrays by output name.

    Args:
        signature: Name of the signature.
        inputs: Its inputs by name, batch first.
        outputs: Which outputs are wanted; none means all.

    Examples:
        >>> Call("embed_8", {"image": np.zeros((1, 3), np.float32)}).outputs
        ()
    """

    signature: str
    inputs: Arrays
    outputs: tuple[str, ...] = ()


class Output:
    """What the contract promises of one row of an output.

    Args:
        dtype: "float32", "int32", "int64", or "object" for strings.
        size: How many there are, None for any number; left out, there is one.

    Examples:
        >>> print(Output("float32", 8), Output("int64", None), Output("int32"))
        float32 (rows, 8) int64 (rows, any) int32 (rows,)
        >>> Output("float32", 8).fits(np.zeros((3, 8), np.float16), rows=3)
        True
    """

    def __init__(self, dtype: str, *size: int | None) -> None:
        self.dtype = dtype
        self._sizes = size

    def fits(self, array: npt.NDArray[Any], rows: int) -> bool:
        """Whether an array is that many rows of it, in this or another width of its kind."""
        if array.ndim != 1 + len(self._sizes) or len(array) != rows:
            return False
        kinds = {"f": "f", "i": "iu", "O": "OU"}[np.dtype(self.dtype).kind]
        sizes = zip(array.shape[1:], self._sizes, strict=True)
        return array.dtype.kind in kinds and all(s is None or n == s for n, s in sizes)

    def __str__(self) -> str:
        sizes = "".join(f" {'any' if size is None else size}" for size in self._sizes)
        return f"{self.dtype} (rows,{sizes})"


@dataclass(frozen=True)
class AskManifest:
    """What the model says of itself; it is answered by a `Manifest`.

    A conversation that knows the manifest of the version that is answering asks nobody.

    Examples:
        >>> AskManifest()
        AskManifest()
    """


@dataclass(frozen=True)
class AskSignatures:
    """One GetModelMetadata request; it is answered by `Signature`s by name.

    Examples:
        >>> AskSignatures()
        AskSignatures()
    """


@dataclass(frozen=True)
class AskStatus:
    """One GetModelStatus request; it is answered by a tuple of `VersionStatus`.

    Examples:
        >>> AskStatus()
        AskStatus()
    """


@dataclass(frozen=True)
class Signature:
    """What a signature takes and gives.

    Args:
        inputs: Input name to `{"dtype": ..., "shape": [null, ...]}`; a null shape is any.
        outputs: The same of the outputs.

    Examples:
        >>> Signature({"x": {"dtype": "float32", "shape": [None, 3]}}, {}).inputs["x"]["shape"]
        [None, 3]
    """

    inputs: Mapping[str, Mapping[str, object]]
    outputs: Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class VersionStatus:
    """How one version of a model stands.

    Args:
        version: Its number.
        state: "START", "LOADING", "AVAILABLE", "UNLOADING" or "END".
        error: Why it does not serve; empty where nothing went wrong.

    Examples:
        >>> VersionStatus(3, "AVAILABLE").error
        ''
    """

    version: int
    state: str
    error: str = ""


@dataclass(frozen=True, eq=False)
class Envelope:
    """A request with its address: all that a transport needs to know.

    Args:
        model: Name of the model.
        version: The version that must answer; None for the newest, or the labelled one.
        request: What is asked.
        remaining_s: Seconds the answer may still take, retries included.
        timeout_s: Seconds the whole was given, for what an error says.
        label: The label of the version that must answer, where `version` names none.

    Examples:
        >>> Envelope("birds", None, AskStatus(), 10.0, 10.0).signature
        ''
    """

    model: str
    version: int | None
    request: Call | AskSignatures | AskStatus
    remaining_s: float
    timeout_s: float
    label: str | None = None

    @property
    def signature(self) -> str:
        """The signature that is called; empty for what is none."""
        return self.request.signature if isinstance(self.request, Call) else ""


def checked_label(label: str | None) -> str | None:
    """Return the label of a version, or None for none.

    Raises:
        ValueError: If it is no name.

    Examples:
        >>> checked_label("stable")
        'stable'
    """
    if label is not None and (not isinstance(label, str) or not label):
        raise ValueError(
            "label must be the name that a model config gives a version. "
            f"Received: label={label!r}. Leave it out for the newest version."
        )
    return label


@dataclass(frozen=True, eq=False)
class Reply(Generic[T_co]):
    """What a transport brings back.

    Args:
        answer: Arrays, signatures or versions, by what was asked.
        version: The version that answered; None where none did, as for a status.

    Examples:
        >>> Reply((), None).answer
        ()
    """

    answer: T_co
    version: int | None


class Transport(Protocol):
    """Carries envelopes to a server; `Client` talks through one."""

    @property
    def target(self) -> str:
        """Where it carries them, as an error names it."""

    def send(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`. Called by any number of threads at once."""

    def close(self) -> None:
        """Free what it holds; a `send` after it raises a `KerasMrlError`."""


class AsyncTransport(Protocol):
    """Carries envelopes to a server without blocking; `AsyncClient` talks through one."""

    @property
    def target(self) -> str:
        """Where it carries them, as an error names it."""

    async def send_async(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""

    async def close_async(self) -> None:
        """Free what it holds; a `send_async` after it raises a `KerasMrlError`."""
