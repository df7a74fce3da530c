"""The requests a server takes and its replies, as arrays and names: no bytes, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]
Header = tuple[str | np.dtype[Any], tuple[int, ...]]  # dtype and shape of a tensor
T_co = TypeVar("T_co", covariant=True)

LABEL_BYTES = 4096  # of a class name, on average; ImageNet's longest has 121
_ROWS = "rows"


class Output:
    """What is promised of an output: its dtype, its size, and how long its strings are.

    Args:
        dtype: "float32", "int32", "int64", or "object" for strings.
        size: Length of a row, None for any length; without it, each row is one value.
        string_bytes: The longest that its strings are on average.

    Examples:
        >>> print(Output("float32", 8), Output("int64", None), Output("int32"))
        float32 (rows, 8) int64 (rows, any) int32 (rows,)
        >>> Output("float32", 8).fits(("float16", (3, 8)), rows=3)
        True
    """

    def __init__(
        self, dtype: str, *size: int | None, string_bytes: int | None = LABEL_BYTES
    ) -> None:
        self.dtype = dtype
        self.string_bytes = string_bytes
        self._shape: tuple[int | str | None, ...] | None = (_ROWS, *size)

    @classmethod
    def of_signature(cls, spec: Mapping[str, Any]) -> Output:
        """Return what a signature promises of an output, whose first axis need not be rows.

        Args:
            spec: One of `Signature.outputs`.

        Examples:
            >>> print(Output.of_signature({"dtype": "string", "shape": [None, 2]}))
            object (any, 2)
        """
        output = cls(array_dtype(spec["dtype"]), string_bytes=None)
        output._shape = None if spec["shape"] is None else tuple(spec["shape"])
        return output

    @property
    def has_rows(self) -> bool:
        """Whether its first axis is that of the rows sent."""
        return self._shape is not None and self._shape[:1] == (_ROWS,)

    def fits(self, header: Header, rows: int) -> bool:
        """Whether a tensor is so many of these rows, in this dtype or a wider or narrower one."""
        dtype, shape = header
        if dtype != self.dtype and not _same_kind(dtype, self.dtype):
            return False
        if self._shape is None:
            return True
        if self.has_rows:
            return shape[:1] == (rows,) and shape_fits(shape[1:], self._shape[1:])
        return shape_fits(shape, self._shape)

    def __str__(self) -> str:
        if self._shape is None:
            return f"{self.dtype} of any shape"
        sizes = ", ".join("any" if size is None else str(size) for size in self._shape)
        return f"{self.dtype} ({sizes}{',' if len(self._shape) == 1 else ''})"


def shape_fits(shape: tuple[int, ...], expected: Sequence[object]) -> bool:
    """Whether a shape has the expected sizes; None is any size.

    Examples:
        >>> shape_fits((3, 8), (None, 8)), shape_fits((3, 8), (None,))
        (True, False)
    """
    if len(shape) != len(expected):
        return False
    for size, wanted in zip(shape, expected, strict=True):  # all() takes twice as long
        if wanted is not None and size != wanted:
            return False
    return True


def array_dtype(name: str) -> str:
    """Return the dtype of the array that a tensor of a named dtype becomes.

    Examples:
        >>> array_dtype("string"), array_dtype("bfloat16"), array_dtype("float16")
        ('object', 'float32', 'float16')
    """
    return {"string": "object", "bfloat16": "float32"}.get(name, name)


@lru_cache(maxsize=64)
def _same_kind(dtype: str | np.dtype[Any], promised: str) -> bool:
    """Whether both are floats, integers of any sign, or strings; else, whether they are equal."""
    try:
        kinds = [np.dtype(name).kind for name in (dtype, promised)]
    except TypeError:  # a dtype that NumPy lacks
        return dtype == promised
    one, other = ({"u": "i", "U": "O", "S": "O"}.get(kind, kind) for kind in kinds)
    return one == other


@dataclass(frozen=True, eq=False)
class Call:
    """One Predict request; its answer is a dict of arrays by output name.

    Args:
        signature: Name of the signature.
        inputs: Its inputs by name, batch first.
        outputs: The outputs to return; none means all.
        promised: What must hold of the outputs that are read; the others are not decoded. None
            at all reads every output, whatever it is.
        optional: Further outputs that are read where the answer has them.

    Examples:
        >>> Call("embed_8", {"image": np.zeros((1, 3), np.float32)}).outputs
        ()
    """

    signature: str
    inputs: Arrays
    outputs: tuple[str, ...] = ()
    promised: Mapping[str, Output] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    def reads(self, output: str) -> bool:
        """Whether an output of the answer is read."""
        return not self.promised or output in self.promised or output in self.optional


@dataclass(frozen=True)
class AskManifest:
    """A request for the manifest of the version that is answering; its answer is a `Manifest`.

    A conversation that remembers this manifest sends no call.

    Examples:
        >>> AskManifest()
        AskManifest()
    """


@dataclass(frozen=True)
class AskSignatures:
    """One GetModelMetadata request; its answer is a dict of `Signature`s by name.

    Examples:
        >>> AskSignatures()
        AskSignatures()
    """


@dataclass(frozen=True)
class AskStatus:
    """One GetModelStatus request; its answer is a tuple of `VersionStatus`.

    Examples:
        >>> AskStatus()
        AskStatus()
    """


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a signature.

    Args:
        inputs: Input name to `{"dtype": ..., "shape": [null, ...]}`; a null shape is any shape.
        outputs: The same for the outputs.

    Examples:
        >>> Signature({"x": {"dtype": "float32", "shape": [None, 3]}}, {}).inputs["x"]["shape"]
        [None, 3]
    """

    inputs: Mapping[str, Mapping[str, object]]
    outputs: Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class VersionStatus:
    """The state of one version of a model.

    Args:
        version: Its number.
        state: "START", "LOADING", "AVAILABLE", "UNLOADING" or "END".
        error: Why it does not serve; empty if nothing went wrong.

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
        request: The request.
        remaining_s: Seconds the reply may still take, retries included.
        timeout_s: Timeout of the whole answer in seconds, for the text of errors.
        label: Label of the version that must answer, if `version` is None.

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
        """The signature that is called; empty if the request calls none."""
        return self.request.signature if isinstance(self.request, Call) else ""


def check_label(label: str | None) -> str | None:
    """Return `label`, the name of a version or None.

    Raises:
        ValueError: If it is neither.

    Examples:
        >>> check_label("stable")
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
    """The reply to an envelope.

    Args:
        answer: Arrays, signatures or versions, depending on the request.
        version: The version that answered; None for a status, which no version answers.

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
        """Address of the server, as errors name it."""

    def send(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`. Called by any number of threads at once."""

    def close(self) -> None:
        """Close the connection; a later `send` raises a `KerasMrlError`."""


class AsyncTransport(Protocol):
    """Carries envelopes to a server without blocking; `AsyncClient` talks through one."""

    @property
    def target(self) -> str:
        """Address of the server, as errors name it."""

    async def send_async(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""

    async def close_async(self) -> None:
        """Close the connection; a later `send_async` raises a `KerasMrlError`."""
