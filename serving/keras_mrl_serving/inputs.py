"""A caller's inputs, logits and labels, checked and converted to the arrays that are needed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from .calls import shape_fits
from .errors import InvalidInputError

Inputs = npt.ArrayLike | Mapping[str, npt.ArrayLike]


def check_inputs(
    specs: Mapping[str, Mapping[str, Any]],
    inputs: Inputs,
    other: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return one array per input of a model whose inputs are batches of the same rows.

    Args:
        specs: The `inputs` of a manifest or of a signature.
        inputs: As for `as_arrays`.
        other: The inputs of the other tower, in a model of two.

    Raises:
        InvalidInputError: As `as_arrays`, or if the inputs differ in their number of rows.

    Examples:
        >>> specs = {"image": {"dtype": "float32", "shape": [None, 3]}}
        >>> check_inputs(specs, [[0, 127, 255]])
        {'image': array([[  0., 127., 255.]], dtype=float32)}
    """
    try:
        arrays = as_arrays(specs, inputs)
    except InvalidInputError as error:
        if other is None or not _are_taken(other, inputs):
            raise
        raise InvalidInputError(
            "Each tower of a model takes the rows of its own side. "
            f"Received: rows that the other tower takes, as {', '.join(other)}. "
            "Embed rows of galleries with other_tower=True, and rows of queries without."
        ) from error
    if len(arrays) > 1 and len(set(map(len, arrays.values()))) > 1:
        rows = {name: len(array) for name, array in arrays.items()}
        raise InvalidInputError(
            f"Every input needs the same number of rows. Received: {rows}. Send whole rows."
        )
    return arrays


def _are_taken(specs: Mapping[str, Mapping[str, Any]], inputs: Inputs) -> bool:
    try:
        as_arrays(specs, inputs)
    except InvalidInputError:
        return False
    return True


def as_arrays(specs: Mapping[str, Mapping[str, Any]], inputs: Inputs) -> dict[str, Any]:
    """Return one array per input of the model, checked before anything is sent.

    Floats of another width are rounded to the nearest that the model takes, because float64 is
    only NumPy's default; NaN and infinity stay what they are. Integers and bools are cast if no
    value changes. Nothing else is cast.

    Args:
        specs: The `inputs` of a manifest or of a signature.
        inputs: One array for a model with one input, else a mapping by input name. A list of
            bytes or str is one array of strings.

    Raises:
        InvalidInputError: If names, shapes or dtypes do not fit, a number is too large for the
            dtype or changes in it, a place is masked, or a str is no UTF-8.

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
    if named.keys() != specs.keys():
        raise InvalidInputError(
            f"inputs must be named {', '.join(specs)}. "
            f"Received: {', '.join(map(str, named)) or 'none'}. Rename them."
        )
    return {name: _check_array(name, specs[name], named[name]) for name in specs}


def _check_array(name: str, spec: Mapping[str, Any], value: npt.ArrayLike) -> npt.NDArray[Any]:
    is_text = spec["dtype"] == "string"
    shape = spec["shape"]
    if type(value) is np.ndarray and not is_text and value.dtype == spec["dtype"]:
        if shape is None or shape_fits(value.shape, shape):
            return value  # as a caller in a hurry gives it
    try:
        array = as_array(f"Input {name!r}", value, is_text=is_text)
    except ValueError as error:
        raise InvalidInputError(str(error)) from error
    is_number = array.dtype.kind not in "SUTO"
    if shape is not None and not shape_fits(array.shape, shape):
        expected = _format_shape(tuple("any" if size is None else size for size in shape))
        batch = ", batch first" if shape[:1] == [None] else ""
        raise InvalidInputError(
            f"Input {name!r} must be {spec['dtype']} of shape {expected}{batch}. "
            f"Received: {_describe(array)}. "
            + (_TEXT_REMEDY if is_text and is_number else _shape_remedy(array, shape))
        )
    if is_text:
        return _check_text(name, array)
    try:
        dtype = np.dtype(spec["dtype"])
    except TypeError as error:
        raise InvalidInputError(
            f"An input's dtype must be one that NumPy has. Received: {spec['dtype']} for input "
            f"{name!r}. Export the model with float32 inputs."
        ) from error
    if array.dtype != dtype and not _is_cast(array.dtype, dtype):
        raise InvalidInputError(
            f"Input {name!r} must be {dtype}. Received: {_describe(array)}. "
            f"Convert it, e.g. with .astype({dtype.name!r})."
        )
    try:
        return _cast(f"Input {name!r}", array, dtype)
    except ValueError as error:
        raise InvalidInputError(str(error)) from error


_TEXT_REMEDY = (
    "Give str or bytes; to a model that decodes images, the bytes of image files: "
    "[pathlib.Path(file).read_bytes()]."
)


def _shape_remedy(array: npt.NDArray[Any], shape: list[int | None]) -> str:
    if shape[:1] == [None] and array.ndim == len(shape) - 1:
        if array.dtype.kind in "OSUT" and not array.ndim:
            return "Give a batch: for one row, [x]."
        if shape[-1] == 1 and shape_fits(array.shape, shape[:-1]):
            column = "x[:, None]" if array.ndim == 1 else "x[..., None]"
            return f"Give every row its last axis, of one number: {column}."
        if shape_fits(array.shape, shape[1:]):
            return "Give a batch: for one row, x[None]."
    return "Prepare the rows as in training."


def _check_text(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    received = _describe(array)
    if array.dtype.kind not in "SUTO":
        raise InvalidInputError(
            f"Input {name!r} must be string. Received: {received}. {_TEXT_REMEDY}"
        )
    for element in array.ravel().tolist():
        if isinstance(element, str):
            try:
                element.encode()
            except UnicodeEncodeError as error:
                raise InvalidInputError(
                    f"Input {name!r} must be text that UTF-8 can hold, or bytes. "
                    f"Received: {received}, with half of a surrogate pair in {element[:40]!a}. "
                    "Read the text with errors='replace', or give its bytes."
                ) from error
        elif not isinstance(element, bytes):
            raise InvalidInputError(
                f"Input {name!r} must be string. "
                f"Received: {received}, with a {type(element).__name__}. {_TEXT_REMEDY}"
            )
    return array


def _is_cast(dtype: np.dtype[Any], target: np.dtype[Any]) -> bool:
    if dtype.kind in "biu":
        return target.kind in "fiu"
    is_float = dtype.kind == "f" or (dtype.names is None and np.can_cast(dtype, np.float32))
    return target.kind == "f" and is_float  # bfloat16 of JAX is no float to NumPy


@np.errstate(over="ignore", invalid="ignore")
def _cast(name: str, array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return numbers as another dtype, floats rounded; raise if any other number changes."""
    cast = array.astype(dtype, copy=False)
    if array.dtype.kind not in "iu":
        if array.dtype.itemsize <= dtype.itemsize or np.isfinite(cast).all():
            return cast
        changes = np.isinf(cast) & np.isfinite(array)
    elif dtype.kind == "f":
        if array.dtype.itemsize < dtype.itemsize:  # room for every digit
            return cast
        # Compared as integers: NumPy compares an int64 and a float as floats.
        is_outside = np.isinf(cast) | (
            cast >= 2.0 ** (8 * array.dtype.itemsize - (array.dtype.kind == "i"))
        )
        changes = is_outside | (np.where(is_outside, 0, cast).astype(array.dtype) != array)
    else:
        changes = cast != array
    if changes.any():
        change = f"{array[changes][0]} would become {cast[changes][0]}"
        raise ValueError(
            f"{name} must be numbers that {dtype} holds. "
            f"Received: {_describe(array)}, in which {change}. Scale or round them first."
        )
    return cast


def _describe(array: npt.NDArray[Any]) -> str:
    return f"{array.dtype} of shape {_format_shape(array.shape)}"


def _format_shape(entries: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, entries))}{',' if len(entries) == 1 else ''})"


def as_array(name: str, values: npt.ArrayLike, *, is_text: bool = False) -> npt.NDArray[Any]:
    r"""Return what a caller gave as an array, of whatever dtype.

    Args:
        name: Name of the values, for the error.
        values: An array of any library, or nested lists.
        is_text: Whether to keep str and bytes as Python objects: NumPy's own strings drop
            trailing zero bytes, which an image may end with.

    Raises:
        ValueError: If no array can be made of them, or a masked array hides some.

    Examples:
        >>> as_array("Texts", ["a\0", "b"], is_text=True).tolist()
        ['a\x00', 'b']
    """
    array = _converted(name, values, is_text=is_text)
    if isinstance(array, str):
        raise ValueError(
            f"{name} must be an array. Received: {array}. "
            "Give a NumPy array, every row as long as the others."
        )
    return array


def _converted(
    name: str, values: npt.ArrayLike, *, is_text: bool = False
) -> npt.NDArray[Any] | str:
    """Return an array, or in words what could not become one."""
    rows = values if isinstance(values, list | tuple) else [values]
    if any(isinstance(row, np.ma.MaskedArray) and np.ma.is_masked(row) for row in rows):
        raise ValueError(
            f"{name} must hold a value at every place. Received: a masked array. "
            "Fill what is masked, e.g. with .filled(0)."
        )
    try:
        is_array = isinstance(values, np.ndarray)
        array = np.array(values, object) if is_text and not is_array else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(values).__name__} ({str(error).rstrip('.')})"
    if array.ndim or array.dtype.kind != "O" or is_array or isinstance(values, str | bytes):
        return array
    return type(values).__name__  # such as None or a sparse matrix: an array of one object


def as_float32(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return real numbers as float32, without a copy if they are float32 already.

    Args:
        name: Name of the values, for the error.
        values: The numbers.

    Raises:
        ValueError: If they are no array of real numbers, a number is too large for float32, or an
            integer changes in it.

    Examples:
        >>> as_float32("Embeddings", [[1, 2]])
        array([[1., 2.]], dtype=float32)
    """
    return _as_reals(name, values, np.dtype(np.float32))


def as_float64(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return real numbers as float64, otherwise like `as_float32`.

    Examples:
        >>> as_float64("costs", (8, 1e300))
        array([8.e+000, 1.e+300])
    """
    return _as_reals(name, values, np.dtype(np.float64))


def _as_reals(name: str, values: npt.ArrayLike, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    array = _converted(name, values)
    received = array if isinstance(array, str) else _describe(array)
    if not isinstance(array, str):
        if array.dtype.kind == "O" and all(isinstance(number, Real) for number in array.flat):
            with suppress(OverflowError):
                array = array.astype(np.float64)
        if _is_cast(array.dtype, dtype):
            return _cast(name, array, dtype)
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
    truth = as_array("labels", labels)
    if truth.ndim == 2 and truth.shape[1] == 1:  # as in the datasets of Keras
        truth = truth[:, 0]
    if scores.ndim == 3 and truth.ndim == 2 and truth.shape == scores.shape[::2]:
        raise ValueError(
            "A cascade decides which one class a row has. "
            f"Received: labels of shape {truth.shape}, one for each class. For one-hot labels give "
            "labels.argmax(axis=1); where a row may have several classes, ask one dim."
        )
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
