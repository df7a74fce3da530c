"""What a caller gave, as the arrays the model's manifest asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInputError

Inputs = npt.ArrayLike | Mapping[str, npt.ArrayLike]


def check_inputs(specs: Mapping[str, Mapping[str, Any]], inputs: Inputs) -> dict[str, Any]:
    """Return one array per input of the model, checked before anything is sent.

    Floats of another width are cast (float64 is NumPy's default, not a decision), and so are
    integers where no value changes; nothing else is.

    Args:
        specs: The `inputs` of the manifest.
        inputs: One array for a model with one input, else a mapping by input name.

    Raises:
        InvalidInputError: If names, shapes or dtypes do not fit, or the rows are not as many.
    """
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    elif len(specs) == 1:
        given = {next(iter(specs)): inputs}
    else:
        raise InvalidInputError(
            f"A model of several inputs takes a dict with {', '.join(specs)}. "
            f"Received: one {type(inputs).__name__}. Name each array."
        )
    if set(given) != set(specs):
        raise InvalidInputError(
            f"inputs must be named {', '.join(specs)}. "
            f"Received: {', '.join(map(str, given)) or 'none'}. Rename them."
        )
    arrays = {name: _check_array(name, specs[name], given[name]) for name in specs}
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) > 1:
        raise InvalidInputError(
            f"Every input needs the same number of rows. Received: {rows}. Send whole rows."
        )
    return arrays


def _check_array(name: str, spec: Mapping[str, Any], value: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(value)
    wanted = spec["shape"]
    if array.ndim != len(wanted) or any(
        w is not None and w != n for w, n in zip(wanted, array.shape, strict=True)
    ):
        shown = tuple("any" if n is None else n for n in wanted)
        raise InvalidInputError(
            f"Input {name!r} must be {spec['dtype']} of shape {_shape(shown)}, batch first. "
            f"Received: {array.dtype} of shape {_shape(array.shape)}. {_remedy(array, wanted)}"
        )
    if spec["dtype"] == "string":
        if array.dtype.kind in "SUO":
            return array
        raise _wrong_dtype(name, spec, array)
    dtype = np.dtype(spec["dtype"])
    if array.dtype == dtype:
        return array
    if array.dtype.kind == "f" and dtype.kind == "f":
        return array.astype(dtype)
    if array.dtype.kind in "biu" and dtype.kind in "fiu":
        cast = array.astype(dtype)
        if np.array_equal(cast, array):
            return cast
    raise _wrong_dtype(name, spec, array)


def _wrong_dtype(name: str, spec: Mapping[str, Any], array: npt.NDArray[Any]) -> InvalidInputError:
    return InvalidInputError(
        f"Input {name!r} must be {spec['dtype']}. Received: {array.dtype} of shape "
        f"{_shape(array.shape)}. Convert it, e.g. with .astype({spec['dtype']!r})."
    )


def _shape(entries: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, entries))}{',' if len(entries) == 1 else ''})"


def _remedy(array: npt.NDArray[Any], wanted: list[int | None]) -> str:
    if array.ndim == len(wanted) - 1:
        return "Give a batch: for one row, x[None]."
    return "Prepare the rows as in training."
