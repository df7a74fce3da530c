"""The caller's sample: real rows, as NumPy has them and as the model's inputs are shaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .job import ExportError

# What the inputs of a served model are called.

# Names Keras makes up for an input that was given none.
_UNNAMED = re.compile(r"(keras_tensor|input_layer|input)(_\d+)?")
SINGLE_INPUT = "inputs"
# What TensorFlow keeps as it is when it names a signature's input.
_SERVABLE = re.compile(r"(?!self\Z)[A-Za-z]\w*", re.ASCII)


def check_one_input(backbone: keras.Model) -> None:
    """Raise a `ValueError` if a decoder would not know which input images are for."""
    declared = list(declared_inputs(backbone))
    if len(declared) > 1:
        raise ValueError(
            "A decoder makes the one input of a model out of images. "
            f"Received: a decoder for a model with the inputs {', '.join(declared)}. "
            "Export it without, for clients that send pixels."
        )


def name_inputs(backbone: keras.Model, sample: Any) -> dict[str, str]:
    """Return the served name of every input, by its key in `sample` ("" for a bare array).

    Inputs keep the names they have in Keras; a single one that has none is called `inputs`.

    Raises:
        ValueError: If `sample` is neither an array nor a dict, does not fit the model's inputs, or
            TensorFlow could not serve an input under its name.
    """
    if isinstance(sample, (list, tuple)):
        raise ValueError(
            "sample must be one array, or a dict by input name. "
            f"Received: a {type(sample).__name__}. Write {{name: array}}."
        )
    keys = list(sample) if isinstance(sample, Mapping) else [""]
    known = list(declared_inputs(backbone)) or keys or [SINGLE_INPUT]
    if len(known) != len(keys) or (keys != [""] and set(keys) != set(known)):
        raise ValueError(
            f"sample must hold the inputs of the model: {', '.join(known)}. "
            f"Received: {', '.join(keys) or 'none' if keys != [''] else 'one array'}. "
            "Write {name: array} with those names."
        )
    if len(keys) > 1:
        names = {key: key for key in keys}
    else:
        unnamed = not known[0] or _UNNAMED.fullmatch(known[0])
        names = {keys[0]: SINGLE_INPUT if unnamed else known[0]}
    refused = [name for name in names.values() if not _SERVABLE.fullmatch(name)]
    if refused:
        raise ValueError(
            "A served input's name must be a letter, then letters, digits and underscores, and "
            f"not self. Received: {', '.join(map(repr, refused))}. Put an input of another name "
            "before the model: x = keras.Input(..., name='image'); keras.Model(x, model(x))."
        )
    return names


def as_declared(backbone: keras.Model, sample: Any) -> Any:
    """Return `sample` as Keras takes it without a warning: bare where one tensor was declared."""
    bare = isinstance(input_structure(backbone), keras.KerasTensor)
    return next(iter(sample.values())) if bare and isinstance(sample, Mapping) else sample


def declared_inputs(backbone: keras.Model) -> dict[str, Any]:
    """Return the symbolic inputs of a functional or sequential model; none of a subclassed one.

    They come by name, in the order Keras flattens them: the key where the model was declared over
    a dict, for that is what Keras matches data by.
    """
    inputs = input_structure(backbone)
    if isinstance(inputs, Mapping):
        return {key: inputs[key] for key in sorted(inputs)}
    return {tensor.name: tensor for tensor in keras.tree.flatten(inputs)}


def input_structure(backbone: keras.Model) -> Any:
    """Return the symbolic inputs in the model's own structure; an empty list if it has none."""
    try:
        if isinstance(backbone, keras.Sequential):  # it has no `input` until it is called on one
            return backbone.inputs[0]
        return backbone.input
    except AttributeError:
        return []


# What the trained model makes of the sample, found out without a risk to the model.

_BATCH = 32
_MOST_SHOWN = 300
_COLOURS = re.compile(r"\x1b\[\d*m")


def answers(model: keras.Model, rows: Any) -> npt.NDArray[np.float32]:
    """Return the one output of `model` for `rows`.

    The model is called and not asked by `predict`: on JAX that takes the weights out of the model
    while it runs, and one that fails or is interrupted never puts them back.

    Args:
        model: The model, which is built if it was not.
        rows: What it takes: one array, or arrays by input name.

    Raises:
        ValueError: If it cannot take the rows, or has several outputs.
        ExportError: If it answers with values that are not finite.
    """
    size = len(next(iter(rows.values())) if isinstance(rows, Mapping) else rows)
    batches = [_answer(model, rows, start) for start in range(0, size, _BATCH)]
    outputs = np.concatenate(batches)
    if not np.isfinite(outputs).all():
        raise ExportError(
            "A model must give finite values to be exported. "
            f"Received: NaN or infinity from {model.name!r} on the sample. "
            "Train it to a finite loss, and look for bad rows in the sample."
        )
    return outputs


def _answer(model: keras.Model, rows: Any, start: int) -> npt.NDArray[np.float32]:
    part = keras.tree.map_structure(lambda array: array[start : start + _BATCH], rows)
    try:
        output = model(part, training=False)
    except Exception as error:  # whatever a layer or the backend raises
        raise ValueError(
            "sample must hold rows that the model takes. "
            f"Received: {_shapes(rows)}, and {type(error).__name__}: {_plain(error)} "
            "Prepare its rows as in training: model(sample) must run."
        ) from error
    if isinstance(output, (list, tuple, Mapping)):
        raise ValueError(
            "A model is exported with one output. "
            f"Received: {len(output)} outputs from {model.name!r}. "
            "Name the one that is served: keras.Model(model.input, features)."
        )
    return np.asarray(keras.ops.convert_to_numpy(output), dtype=np.float32)


def _shapes(rows: Any) -> str:
    given = rows if isinstance(rows, Mapping) else {"": rows}
    return " and ".join(f"{name} {array.shape}".strip() for name, array in given.items())


def _plain(error: Exception) -> str:
    """What is said, in one line of some length."""
    text = " ".join(_COLOURS.sub("", str(error)).split())
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + " ..."


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
