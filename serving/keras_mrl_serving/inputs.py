"""A caller's inputs, logits and labels, checked and converted to the arrays that are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInputError

Inputs = npt.ArrayLike | Mapping[str, npt.ArrayLike]


def check_inputs(specs: Mapping[str, Mapping[str, Any]], inputs: Inputs) -> dict[str, Any]:
    """Return one array per input of a model whose inputs are batches of the same rows.

    Raises:
        InvalidInputError: As `as_arrays`, or if the inputs differ in their number of rows.

    Examples:
        >>> specs = {"image": {"dtype": "float32", "shape": [None, 3]}}
        >>> check_inputs(specs, [[0, 127, 255]])
        {'image': array([[  0., 127., 255.]], dtype=float32)}
    """
    arrays = as_arrays(specs, inputs)
    rows = {name: len(array) for name, array in arrays.items()}
    if len(set(rows.values())) > 1:
        raise InvalidInputError(
            f"Every input needs the same number of rows. Received: {rows}. Send whole rows."
        )
    return arrays


def as_arrays(specs: Mapping[str, Mapping[str, Any]], inputs: Inputs) -> dict[str, Any]:
    """Return one array per input of the model, checked before anything is sent.

    Floats of another width are cast, because float64 is only NumPy's default.
    Integers are cast if no value changes. Nothing else is cast.

    Args:
        specs: The `inputs` of a manifest or of a signature.
        inputs: One array for a model with one input, else a mapping by input name. A list of
            bytes or str is one array of strings.

    Raises:
        InvalidInputError: If names, shapes or dtypes do not fit.

    Examples:
        >>> specs = {"image": {"dtype": "string", "shape": [None]}}
        >>> as_arrays(specs, [b"JPEG...", b"PNG..."])
        {'image': array([b'JPEG...', b'PNG...'], dtype=object)}
    """
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    elif len(specs) == 1:
        named = {next(iter(specs)): inputs}
    else:
        raise InvalidInputError(
            f"A model of several inputs takes a dict with {', '.join(specs)}. "
            f"Received: one {type(inputs).__name__}. Name each array."
        )
    if set(named) != set(specs):
        raise InvalidInputError(
            f"inputs must be named {', '.join(specs)}. "
            f"Received: {', '.join(map(str, named)) or 'none'}. Rename them."
        )
    return {name: _check_array(name, specs[name], named[name]) for name in specs}


def _check_array(name: str, spec: Mapping[str, Any], value: npt.ArrayLike) -> npt.NDArray[Any]:
    try:
        array = np.asarray(value)
        if array.dtype.kind == "S" and not isinstance(value, np.ndarray):
            # NumPy's own bytes drop trailing zeros, which an image may end with; objects keep them.
            array = np.array(value, object)
    except ValueError as error:
        raise InvalidInputError(
            f"Input {name!r} must be an array. "
            f"Received: {type(value).__name__} ({str(error).rstrip('.')}). "
            "Make every row as long as the others."
        ) from error
    shape = spec["shape"]
    if shape is not None and not _fits(array.shape, shape):
        expected = _format_shape(tuple("any" if size is None else size for size in shape))
        batch, remedy = "", "Prepare the rows as in training."
        if shape[:1] == [None]:
            batch = ", batch first"
            if array.ndim == len(shape) - 1:
                remedy = "Give a batch: for one row, x[None]."
        raise InvalidInputError(
            f"Input {name!r} must be {spec['dtype']} of shape {expected}{batch}. "
            f"Received: {array.dtype} of shape {_format_shape(array.shape)}. {remedy}"
        )
    if spec["dtype"] == "string":
        objects = array.ravel().tolist() if array.dtype.kind == "O" else []
        if array.dtype.kind in "SUTO" and all(isinstance(o, str | bytes) for o in objects):
            return array
        raise _wrong_dtype(name, spec, array)
    try:
        dtype = np.dtype(spec["dtype"])
    except TypeError as error:
        raise InvalidInputError(
            f"An input's dtype must be one that NumPy has. Received: {spec['dtype']} for input "
            f"{name!r}. Export the model with float32 inputs."
        ) from error
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
    dtype = spec["dtype"]
    convert = f"Convert it, e.g. with .astype({dtype!r})."
    return InvalidInputError(
        f"Input {name!r} must be {dtype}. Received: {array.dtype} of shape "
        f"{_format_shape(array.shape)}. {'Give str or bytes.' if dtype == 'string' else convert}"
    )


def _fits(shape: tuple[int, ...], expected: list[int | None]) -> bool:
    sizes = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(e is None or e == n for n, e in sizes)


def _format_shape(entries: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, entries))}{',' if len(entries) == 1 else ''})"


def as_float32(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return real numbers as float32, without a copy if they are float32 already.

    Args:
        name: Name of the values, for the error.
        values: The numbers.

    Raises:
        ValueError: If they are strings, complex, ragged or not numbers at all.

    Examples:
        >>> as_float32("Embeddings", [[1, 2]])
        array([[1., 2.]], dtype=float32)
    """
    return _as_reals(name, values, np.float32)


def as_float64(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return real numbers as float64, otherwise like `as_float32`.

    Examples:
        >>> as_float64("costs", (8, 1e300))
        array([8.e+000, 1.e+300])
    """
    return _as_reals(name, values, np.float64)


def _as_reals(name: str, values: npt.ArrayLike, dtype: type[Any]) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "SUTcmM":  # NumPy would convert these too
            return array.astype(dtype, copy=False)
        received = f"{array.dtype} of shape {_format_shape(array.shape)}"
    except (TypeError, ValueError) as error:
        received = f"{type(values).__name__} ({str(error).rstrip('.')})"
    raise ValueError(
        f"{name} must be an array of real numbers. Received: {received}. "
        "Give a NumPy array of floats, every row as long as the others."
    )


def check_logits(logits: npt.ArrayLike, num_stages: int) -> npt.NDArray[np.float32]:
    """Return logits as float32 `(rows, num_stages, num_classes)`, all finite.

    Raises:
        ValueError: If the logits have another shape, or one is not finite.

    Examples:
        >>> check_logits([[[0, 1], [2, 3]]], num_stages=2).shape
        (1, 2, 2)
    """
    scores = as_float32("logits", logits)
    if scores.ndim != 3 or scores.shape[1] != num_stages or not scores.shape[2]:
        raise ValueError(
            "logits must be (rows, num_stages, num_classes). "
            f"Received: logits of shape {scores.shape} for {num_stages} stages. "
            "Give those of the policy's dims alone, in their order."
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            "logits must be finite. Received: NaN or infinity. Train the model to a finite loss."
        )
    return scores


def check_class_ids(labels: npt.NDArray[Any], num_classes: int) -> None:
    """Raise a `ValueError` unless every label is an integer in 0..num_classes - 1.

    Examples:
        >>> check_class_ids(np.array([0, 2]), num_classes=3)
    """
    are_integers = labels.dtype.kind in "iu"
    if not are_integers or labels.min() < 0 or labels.max() >= num_classes:
        range_ = f" from {labels.min()} to {labels.max()}" if are_integers else ""
        raise ValueError(
            f"labels must be class ids in 0..{num_classes - 1}. "
            f"Received: {labels.dtype} labels{range_}. Number the classes from 0, as in training."
        )


def check_holdout(
    logits: npt.ArrayLike, labels: npt.ArrayLike, num_dims: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the logits and the class ids of a holdout on which a cascade can be judged.

    Raises:
        ValueError: If the shapes do not fit, there are no rows, or a value cannot be a logit or a
            class id.

    Examples:
        >>> scores, truth = check_holdout([[[0, 1], [2, 3]]], [1], num_dims=2)
        >>> scores.shape, truth
        ((1, 2, 2), array([1]))
    """
    scores = as_float32("logits", logits)
    truth = np.asarray(labels)
    if truth.ndim == 2 and truth.shape[1] == 1:  # as in the datasets of Keras
        truth = truth[:, 0]
    if scores.ndim != 3 or scores.shape[1] != num_dims or truth.shape != scores.shape[:1]:
        raise ValueError(
            "logits must be (rows, num_dims, num_classes) with one label per row. "
            f"Received: logits of shape {scores.shape} and labels of shape {truth.shape} for "
            f"{num_dims} dims. Give what predict() of the nested model returns, and class ids."
        )
    if not len(truth):
        raise ValueError(
            "A holdout needs rows. Received: none. Keep some labelled rows out of training."
        )
    check_logits(scores, num_dims)
    check_class_ids(truth, scores.shape[2])
    if scores.min() >= 0 and np.allclose(scores.sum(axis=-1), 1, atol=1e-3):
        raise ValueError(
            "logits must be logits, not probabilities. Received: rows that sum to 1. "
            "Leave the softmax out, or give np.log(probabilities)."
        )
    return scores, truth.astype(np.int64)
