"""The caller's sample: a few real rows, on which every signature is compared with the model.

A sample that does not fit must harm nothing: it is checked before the model sees it, and the model
is then called in a way that leaves it whole if that fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl.text import are_texts, as_texts, check_preprocessor

from .decoder import ImageDecoder
from .job import ExportError, TextJob
from .text import PADDING_MASK, TEXT_INPUT, read_texts

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

SINGLE_INPUT = "inputs"  # served name of an input that has none of its own
# Names Keras makes up for an input without a name.
_UNNAMED = re.compile(r"(keras_tensor|input_layer|input)(_\d+)?")
# TensorFlow would change any other name of a signature's input.
_SERVABLE = re.compile(r"(?!self\Z)[A-Za-z]\w*", re.ASCII)


@dataclass(frozen=True, eq=False)
class Sample:
    """The caller's sample, checked, in the forms that an export needs.

    Args:
        rows: As the Keras model takes it: one array, or arrays by input name.
        names: Served name of every input, by the caller's key; "" is the key of a bare array.
        served: As clients send it, by served name: the arrays, the bytes of images, or texts.
        text: Makes the rows of those texts; None where there are none.
    """

    rows: Any
    names: dict[str, str]
    served: Arrays
    text: TextJob | None = None


def read_sample(backbone: keras.Model, sample: Any, decoder: ImageDecoder | None) -> Sample:
    """Return the sample of an export, or raise unless it fits the inputs of `backbone`.

    Inputs keep the names they have in Keras; a single one that has none is called `inputs`.

    Args:
        backbone: The model that takes the rows.
        sample: An array of any library, a list of texts, or a dict of such by input name; with a
            decoder, a list of the bytes of images.
        decoder: Decodes images in the served graph.

    Raises:
        ValueError: If `sample` is nothing of that, has other names or shapes than the model's
            inputs, or TensorFlow could not serve an input under its name.
    """
    if decoder is None:
        arrays = _arrays_by_key(sample)
    else:
        declared = list(declared_inputs(backbone))
        if len(declared) > 1:
            raise ValueError(
                "A decoder makes the one input of a model out of images. "
                f"Received: a decoder for a model with the inputs {', '.join(declared)}. "
                "Export it without, for clients that send pixels."
            )
        images = list(sample) if isinstance(sample, Iterable) else [sample]
        arrays = {"": decoder.pixels(images)}
    return _checked(backbone, arrays, None if decoder is None else images)


def read_text_sample(
    backbone: keras.Model,
    sample: Any,
    preprocessor: Any,
    prompts: Mapping[str, str],
    pooling: str | None,
) -> Sample:
    """Return the sample of an export of texts, or raise unless the model takes their tokens.

    Args:
        backbone: The model that takes the tokens.
        sample: A list or a column of texts, `str` or `bytes`.
        preprocessor: A preprocessor of keras-hub that makes the tokens.
        prompts: Name to the text that clients put before a text.
        pooling: How the model makes one vector of those of its tokens.

    Raises:
        ImportError: If tensorflow-text is missing.
        ValueError: If `sample` holds no texts in UTF-8, the preprocessor has more tokens or places
            than the backbone, or the model takes other inputs.
    """
    if not are_texts(sample):
        raise ValueError(
            "A sample for a model with a preprocessor is a list of texts, str or bytes. "
            f"Received: a {type(sample).__name__}. "
            "Give a few real ones: ['a first text', 'a second one']; or for token ids export "
            "without a preprocessor."
        )
    check_preprocessor(preprocessor, backbone)
    texts = as_texts(sample).reshape(-1)
    names = list(declared_inputs(backbone))
    text = read_texts(preprocessor, texts, names, prompts, pooling)
    tokens = {"": text.tokens[names[0]]} if len(names) == 1 else dict(text.tokens)
    served = np.empty(len(texts), dtype=object)
    served[:] = [own.encode() if isinstance(own, str) else own for own in texts]
    rows = _checked(backbone, tokens, None).rows
    return Sample(rows, {"": TEXT_INPUT}, {TEXT_INPUT: served}, text)


def _checked(backbone: keras.Model, arrays: Arrays, images: list[Any] | None) -> Sample:
    """Return a sample of some arrays, decoded from `images` where there are any."""
    names = _served_names(backbone, arrays)
    arrays = _with_texts_as_declared(backbone, arrays)
    _check_rows(arrays)
    _check_shapes(backbone, arrays)
    # Keras warns of a dict where the model declares one tensor.
    bare = "" in arrays or isinstance(input_structure(backbone), keras.KerasTensor)
    rows = next(iter(arrays.values())) if bare else arrays
    if images is None:
        return Sample(rows, names, {names[key]: array for key, array in arrays.items()})
    files = np.empty(len(images), dtype=object)
    files[:] = images
    return Sample(rows, {"": SINGLE_INPUT}, {SINGLE_INPUT: files})


def _arrays_by_key(sample: Any) -> Arrays:
    if isinstance(sample, Mapping):
        return {key: _as_array(f"{key}: ", value) for key, value in sample.items()}
    if isinstance(sample, (list, tuple)) and not isinstance(_first(sample), (str, bytes)):
        raise ValueError(
            "sample must be one array, or a dict by input name. "
            f"Received: a {type(sample).__name__}. Write {{name: array}}."
        )
    return {"": _as_array("", sample)}


def _as_array(prefix: str, value: Any) -> Array:
    if np.ma.is_masked(value):
        raise ValueError(
            "sample must hold a value at every place. "
            f"Received: {prefix}a masked array. Fill what is masked, e.g. with .filled(0)."
        )
    texts = isinstance(value, (list, tuple)) and isinstance(_first(value), (str, bytes))
    try:
        # As objects, for NumPy would turn a number in a list of texts into a text.
        array = np.asarray(value, dtype=object if texts else None)
    except Exception:  # any error of the library that the tensor is of
        array = np.array(None)
    # NumPy has no kind for bfloat16: other libraries register theirs as "V".
    if array.dtype.kind not in "biufV" and not _is_text(array) and array.size:
        kind = "" if array.dtype == object else f" of {array.dtype}"
        raise ValueError(
            "sample must hold numbers or strings, in arrays. "
            f"Received: {prefix}a {type(value).__name__}{kind}. "
            "Give a few real rows, for example x[:8]."
        )
    return array


def _first(value: Any) -> Any:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value


def _is_text(array: Array) -> bool:
    if array.dtype == object:
        return array.size > 0 and all(isinstance(value, (str, bytes)) for value in array.flat)
    return array.dtype.kind in "SUT"


def _served_names(backbone: keras.Model, arrays: Arrays) -> dict[str, str]:
    keys = list(arrays)
    expected = list(declared_inputs(backbone)) or keys or [SINGLE_INPUT]
    if len(expected) != len(keys) or (keys != [""] and set(keys) != set(expected)):
        raise ValueError(
            f"sample must hold the inputs of the model: {', '.join(expected)}. "
            f"Received: {'one array' if keys == [''] else ', '.join(keys) or 'none'}. "
            "Write {name: array} with those names."
        )
    if len(keys) > 1:
        names = {key: key for key in keys}
    else:
        unnamed = not expected[0] or _UNNAMED.fullmatch(expected[0])
        names = {keys[0]: SINGLE_INPUT if unnamed else expected[0]}
    refused = [name for name in names.values() if not _SERVABLE.fullmatch(name)]
    if refused:
        raise ValueError(
            "A served input's name must be a letter, then letters, digits and underscores, and "
            f"not self. Received: {', '.join(map(repr, refused))}. Put an input of another name "
            "before the model: x = keras.Input(..., name='image'); keras.Model(x, model(x))."
        )
    return names


def _with_texts_as_declared(backbone: keras.Model, arrays: Arrays) -> Arrays:
    """Return columns of texts, `(rows,)` or `(rows, 1)`, as the model declares them."""
    shaped = {
        key: array.reshape(len(array), *tensor.shape[1:])
        for _, tensor, key, array in _by_input(backbone, arrays)
        if array.ndim
        and _is_text(array)
        and {array.shape[1:], tuple(tensor.shape[1:])} <= {(), (1,)}
    }
    return {**arrays, **shaped}


def _check_rows(arrays: Arrays) -> None:
    received = ", ".join(f"{key or 'sample'} of shape {a.shape}" for key, a in arrays.items())
    if any(not array.ndim or not len(array) for array in arrays.values()):
        raise ValueError(
            "sample must hold at least one row, batch first. "
            f"Received: {received}. Give a few real rows, for example x[:8]."
        )
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError(
            "sample must hold as many rows for every input, batch first. "
            f"Received: {received}. Give the same rows of each."
        )


def _check_shapes(backbone: keras.Model, arrays: Arrays) -> None:
    for name, tensor, _, array in _by_input(backbone, arrays):
        expected = ("any", *("any" if size is None else size for size in tensor.shape[1:]))
        fits = array.ndim == len(expected) and all(
            size in ("any", actual) for size, actual in zip(expected, array.shape, strict=True)
        )
        if not fits:
            is_short = expected[-1] == 1 and array.ndim == len(expected) - 1
            column = "x[:, None]" if array.ndim == 1 else "x[..., None]"
            raise ValueError(
                f"sample must have the shape of the model's input {name!r}: "
                f"({', '.join(map(str, expected))}), batch first. Received: {array.shape}. "
                + (
                    f"Give every row its last axis, of one number: {column}."
                    if is_short
                    else "Prepare its rows as in training."
                )
            )


def _by_input(backbone: keras.Model, arrays: Arrays) -> Iterator[tuple[str, Any, str, Array]]:
    """Yield name and tensor of every declared input, with the caller's key and array for it."""
    for name, tensor in declared_inputs(backbone).items():
        key = name if name in arrays else next(iter(arrays))  # a single input, under another key
        yield name, tensor, key, arrays[key]


def declared_inputs(backbone: keras.Model) -> dict[str, Any]:
    """Return the symbolic inputs of a functional or sequential model by name; {} if subclassed.

    They are in the order in which Keras flattens them. Where the model was declared over a dict,
    the name is the key, because Keras matches data by it.
    """
    inputs = input_structure(backbone)
    if isinstance(inputs, Mapping):
        return {key: inputs[key] for key in sorted(inputs)}
    return {tensor.name: tensor for tensor in keras.tree.flatten(inputs)}


def takes_tokens(backbone: keras.Model) -> bool:
    """Whether a model takes numbers, and not texts themselves as TextVectorization does."""
    return all(tensor.dtype != "string" for tensor in declared_inputs(backbone).values())


def input_structure(backbone: keras.Model) -> Any:
    """Return the symbolic inputs in the model's own structure; an empty list if it has none."""
    try:
        if isinstance(backbone, keras.Sequential):  # it has no `input` until it is called on one
            return backbone.inputs[0]
        return backbone.input
    except AttributeError:
        return []


def row_shapes(backbone: keras.Model, rows: Any) -> list[tuple[int, ...]]:
    """Return the shape of one row of each input of `backbone`, flat, from the rows of a sample."""
    arrays = {**rows} if isinstance(rows, Mapping) else {"": rows}
    return [(1, *array.shape[1:]) for _, _, _, array in _by_input(backbone, arrays)]


_BATCH = 32
_LONGEST_QUOTE = 300  # characters of another library's error
_COLOURS = re.compile(r"\x1b\[\d*m")


def outputs_of(model: keras.Model, rows: Any) -> npt.NDArray[np.float32]:
    """Return the one output of the trained model for `rows`.

    The model is called, not run by `predict`: on JAX, `predict` takes the weights out of the model
    while it runs, and does not put them back if it fails or is interrupted.

    Args:
        model: The model, which is built if it was not.
        rows: The rows it takes: one array, or arrays by input name.

    Raises:
        ValueError: If it cannot take the rows, or has several outputs.
        ExportError: If an output is not finite.
    """
    size = len(next(iter(rows.values())) if isinstance(rows, Mapping) else rows)
    outputs = np.concatenate([_output(model, rows, start) for start in range(0, size, _BATCH)])
    if not np.isfinite(outputs).all():
        raise ExportError(
            "A model must give finite values to be exported. "
            f"Received: NaN or infinity from {model.name!r} on the sample. "
            "Train it to a finite loss, and look for bad rows in the sample."
        )
    return outputs


def _output(model: keras.Model, rows: Any, start: int) -> npt.NDArray[np.float32]:
    batch = keras.tree.map_structure(lambda array: array[start : start + _BATCH], rows)
    try:
        output = model(batch, training=False)
    except Exception as error:  # any error of a layer or of the backend
        raise ValueError(
            "sample must hold rows that the model takes. "
            f"Received: {_shapes(rows)}, and {type(error).__name__}: {_on_one_line(error)} "
            "Prepare its rows as in training: model(sample) must run."
        ) from error
    if isinstance(output, (list, tuple, Mapping)):
        raise ValueError(
            "A model is exported with one output. "
            f"Received: {len(output)} outputs from {model.name!r}. "
            "Name the one that is served: output=..., its key or the name of its last layer."
        )
    return np.asarray(keras.ops.convert_to_numpy(output), dtype=np.float32)


def _shapes(rows: Any) -> str:
    arrays = rows if isinstance(rows, Mapping) else {"": rows}
    return " and ".join(f"{name} {array.shape}".strip() for name, array in arrays.items())


def _on_one_line(error: Exception) -> str:
    text = " ".join(_COLOURS.sub("", str(error)).split())
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + " ..."


_TOLERANCE = 1e-5  # of a row's largest magnitude, as `parity` has it


def is_alike_without_padding(backbone: keras.Model, text: TextJob, features: Array) -> bool:
    """Whether a model gives a text the same features when its padding is cut off.

    So it is where attention and pooling look at the padding mask. The graph then cuts what is
    padding in all texts of a batch: a short text takes a share of the time.

    Args:
        backbone: The model.
        text: Its tokens of the sample; the text that has the most padding is tried.
        features: What the model gives for those, `(rows, width)`.
    """
    mask = text.tokens.get(PADDING_MASK)
    if mask is None or any(None not in own.shape[1:] for own in keras.tree.flatten(backbone.input)):
        return False
    lengths = _lengths(mask)
    row = int(np.argmin(lengths))
    length = max(int(lengths[row]), 1)
    if length == mask.shape[1]:
        return False
    try:
        cut = outputs_of(
            backbone, {name: own[row : row + 1, :length] for name, own in text.tokens.items()}
        )
    except (ValueError, ExportError):  # a model of texts of one length
        return False
    return bool(np.abs(cut - features[row]).max() <= _TOLERANCE * np.abs(features[row]).max())


def _lengths(mask: Array) -> Array:
    """Return the number of columns up to the last one of each row that is no padding."""
    columns = np.arange(1, mask.shape[1] + 1)
    return np.where(mask.astype(bool), columns, 0).max(axis=1)
