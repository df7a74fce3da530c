"""The caller's sample: real rows, as NumPy has them and as the model's inputs are shaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .inputs import declared_inputs

Array = npt.NDArray[Any]

_NUMBERS = "biufV"  # NumPy has no kind for bfloat16, which others bring
_TEXTS = "SUT"


def as_arrays(sample: Any) -> Any:
    """Return `sample`, an array of any library or a dict of such, as NumPy has it.

    A list of texts is an array of them; another bare list or tuple is left to `name_inputs`, which
    refuses it.

    Raises:
        ValueError: If something in it is no array.
    """
    if isinstance(sample, Mapping):
        return {name: _as_array(f"{name}: ", array) for name, array in sample.items()}
    if isinstance(sample, (list, tuple)) and not isinstance(_first(sample), (str, bytes)):
        return sample
    return _as_array("", sample)


def as_dict(sample: Any) -> dict[str, Array]:
    """Return the arrays by key, "" for a bare one."""
    return dict(sample) if isinstance(sample, Mapping) else {"": sample}


def shaped_texts(backbone: keras.Model, sample: Any) -> Any:
    """Return `sample` with a column of texts as wide as the model declares it: `()` or `(1,)`."""
    shaped = {
        key: array.reshape(len(array), *tensor.shape[1:])
        for _, tensor, key, array in _by_input(backbone, sample)
        if array.ndim
        and _is_text(array)
        and {array.shape[1:], tuple(tensor.shape[1:])} <= {(), (1,)}
    }
    return {**sample, **shaped} if isinstance(sample, Mapping) else shaped.get("", sample)


def check_rows(sample: Any) -> None:
    """Raise `ValueError` unless every input has a row at least, and as many as the others."""
    shapes = {name or "sample": array.shape for name, array in as_dict(sample).items()}
    given = ", ".join(f"{name} of shape {shape}" for name, shape in shapes.items())
    if any(not shape or not shape[0] for shape in shapes.values()):
        raise ValueError(
            "sample must hold at least one row, batch first. "
            f"Received: {given}. Give a few real rows, for example x[:8]."
        )
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            "sample must hold as many rows for every input, batch first. "
            f"Received: {given}. Give the same rows of each."
        )


def check_shapes(backbone: keras.Model, sample: Any) -> None:
    """Raise a `ValueError` where `sample` has not the shapes the model declares."""
    for name, tensor, _, array in _by_input(backbone, sample):
        shape = tuple(array.shape)
        wanted = ("any", *("any" if size is None else size for size in tensor.shape[1:]))
        fits = len(shape) == len(wanted) and all(
            w in ("any", n) for w, n in zip(wanted, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"sample must have the shape of the model's input {name!r}: "
                f"({', '.join(map(str, wanted))}), batch first. Received: {shape}. "
                "Prepare its rows as in training."
            )


def _as_array(name: str, given: Any) -> Array:
    texts = isinstance(given, (list, tuple)) and isinstance(_first(given), (str, bytes))
    try:
        # Of a list NumPy would make texts of the numbers among them.
        array = np.asarray(given, dtype=object if texts else None)
    except Exception:  # whatever the library of a tensor raises
        array = np.array(None)
    if not _is_text(array) and array.dtype.kind not in _NUMBERS and array.size:
        kind = "" if array.dtype == object else f" of {array.dtype}"
        raise ValueError(
            "sample must hold numbers or strings, in arrays. "
            f"Received: {name}a {type(given).__name__}{kind}. "
            "Give a few real rows, for example x[:8]."
        )
    return array


def _first(given: Any) -> Any:
    while isinstance(given, (list, tuple)) and given:
        given = given[0]
    return given


def _is_text(array: Array) -> bool:
    if array.dtype == object:
        return array.size > 0 and all(isinstance(value, (str, bytes)) for value in array.flat)
    return array.dtype.kind in _TEXTS


def _by_input(backbone: keras.Model, sample: Any) -> Iterator[tuple[str, Any, str, Array]]:
    """The name and the tensor of every declared input, and the key and the array given for it."""
    given = as_dict(sample)
    for name, tensor in declared_inputs(backbone).items():
        key = name if name in given else next(iter(given))  # one input, under another key
        yield name, tensor, key, given[key]
