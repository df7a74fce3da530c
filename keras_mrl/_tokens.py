"""Strings as tokens, before `fit`, `evaluate` and `predict`, by the preprocessor of a model.

A string is no tensor on JAX and PyTorch, so texts are tokenized outside the compiled step. Where
tensorflow-text is installed the preprocessor runs as a TensorFlow graph on every backend, since
that is what a served model does; else keras-hub's Python code runs. `docs/text.md` names the
characters on which they differ.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from ._arrays import Array, is_dataset

_ROWS = 1024  # tokenized together
_graphs: Any = weakref.WeakKeyDictionary()  # of preprocessors, by their configuration


def takes_text(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of a model (`fit`, `predict`, ...) take strings where the model tokenizes."""
    signature = inspect.signature(getattr(keras.Model, method.__name__))

    @functools.wraps(method)
    def with_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        preprocessor = self.preprocessor
        if preprocessor is None:
            return method(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        given.pop("self")
        has_texts_as_labels = self._has_texts_as_labels

        def parts(x: Any, *labels: Any) -> tuple[Any, ...]:
            _check_sides(x)
            if has_texts_as_labels:
                _check_ids(x, *labels[:1])
                labels = tuple(tokenized(preprocessor, own) for own in labels)
            return tokenized(preprocessor, x, has_texts_as_labels), *map(_as_numbers, labels)

        given["x"], y = parts(given.get("x"), given.get("y"))
        if y is not None:
            given["y"] = y
        validation = given.get("validation_data")
        if isinstance(validation, (tuple, list)) and len(validation):
            given["validation_data"] = parts(*validation)
        elif validation is not None:
            given["validation_data"] = tokenized(preprocessor, validation, has_texts_as_labels)
        return method(self, **given)

    return with_tokens


def tokenized(preprocessor: Any, data: Any, has_texts_as_labels: bool = True) -> Any:
    """Return inputs with tokens in the place of strings; anything else as it is.

    Texts in memory are tokenized at once; those of a data set batch by batch.

    Args:
        preprocessor: A layer from strings to a dict of tokens, or None.
        data: An array or a list of strings; a tuple, list or dict of such, as pairs are; or a
            data set of batches.
        has_texts_as_labels: Whether the second part of a batch of a data set may be texts.

    Raises:
        ValueError: If an entry is no text, a text is not UTF-8, or a data set of strings is of a
            kind that cannot be tokenized.

    Examples:
        >>> from keras_mrl._tokens import tokenized
        >>> tokenized(None, ["as it is"])
        ['as it is']
    """
    if preprocessor is None or data is None:
        return data
    if isinstance(data, (str, bytes)) or _is_one_text(data):
        raise ValueError(
            f"Texts come in a list or an array. Received: one {type(data).__name__}. Write [text]."
        )
    rows = (
        len(data) if isinstance(data, (list, tuple)) else next(iter(getattr(data, "shape", ())), 1)
    )
    if rows == 0 or are_texts(data):
        return tokenize(preprocessor, data)
    if is_dataset(data) or isinstance(data, types.GeneratorType):
        return _tokenized_dataset(preprocessor, data, has_texts_as_labels)
    if isinstance(data, dict):
        return {name: tokenized(preprocessor, own) for name, own in data.items()}
    if isinstance(data, (tuple, list)) and any(map(_holds_texts, data)):
        return tuple(tokenized(preprocessor, own) for own in data)
    return data


def _is_one_text(data: Any) -> bool:
    """Whether `data` is an array of strings without an axis."""
    dtype = getattr(data, "dtype", None)
    is_of_strings = getattr(dtype, "kind", None) in ("U", "S", "T", "O") or "str" in str(dtype)
    return is_of_strings and getattr(data, "ndim", 1) == 0


def _check_sides(x: Any) -> None:
    """Raise `ValueError` unless texts are one a row: in one column, or in one for each side."""
    is_one_side = not isinstance(x, (list, tuple)) or are_texts(x)
    for side in [x] if is_one_side else x[:2]:  # negatives may be several a row
        check_one_axis(side)
    if is_one_side or not all(isinstance(own, (list, tuple)) and are_texts(own) for own in x):
        return
    sizes = {len(own) for own in x}
    if sizes in ({2}, {3}) and len(x) > 3:
        raise ValueError(
            "Texts of pairs must be given side by side: (anchors, positives). "
            f"Received: {len(x)} rows of {sizes.pop()} texts. Write tuple(zip(*rows))."
        )


def _check_ids(x: Any, y: Any = None) -> None:
    """Raise `ValueError` for texts as the ids of pairs."""
    is_one_side = not isinstance(x, (list, tuple, dict)) or are_texts(x)
    if not is_one_side and _holds_texts(x) and are_texts(y):
        raise ValueError(
            "The ids of pairs must be integers. Received: texts as y, beside pairs of texts. "
            "Number them: numpy.unique(ids, return_inverse=True)[1]."
        )


def _as_numbers(labels: Any) -> Any:
    """Return a list of numbers as an array, which Keras needs; anything else as it is."""
    is_list = isinstance(labels, list) and labels
    if is_list and all(isinstance(own, (int, float, np.number)) for own in labels):
        return np.asarray(labels)
    return labels


def check_one_axis(texts: Any) -> None:
    """Raise `ValueError` for an array of texts that has more axes than the one of its rows.

    Args:
        texts: Inputs of a model that takes one text a row; anything that is no array of texts
            passes.
    """
    shape = getattr(texts, "shape", ())
    if len(shape) > 1 and are_texts(texts):
        raise ValueError(
            "Texts must be given in an array of one axis, a text a row. "
            f"Received: an array of shape {tuple(shape)}. Write texts.ravel(), or "
            "(anchors, positives) for pairs."
        )


def _holds_texts(part: Any) -> bool:
    """Whether a part of a structure is texts, or has them within."""
    if isinstance(part, dict):
        return any(map(_holds_texts, part.values()))
    if isinstance(part, (tuple, list)) and not are_texts(part):
        return any(_holds_texts(own) for own in part if isinstance(own, (tuple, list, dict)))
    return are_texts(part)


def are_texts(data: Any) -> bool:
    """Whether `data` is a list or an array of strings, or of strings and gaps (None, NaN).

    Examples:
        >>> from keras_mrl._tokens import are_texts
        >>> are_texts(["a", "b"]), are_texts(np.array([b"a"])), are_texts([1, 2])
        (True, True, False)
    """
    if isinstance(data, (list, tuple)):
        return _begins_with_a_text(data)
    dtype = getattr(data, "dtype", None)
    if dtype is None or not getattr(data, "shape", ()):
        return False
    if getattr(dtype, "kind", None) in ("U", "S", "T"):
        return True
    if getattr(dtype, "kind", None) == "O":
        return _begins_with_a_text(np.asarray(data).ravel())
    return "str" in str(getattr(dtype, "name", dtype))  # TensorFlow's and pandas's


def _begins_with_a_text(entries: Any) -> bool:
    """Whether the first entry that is no number and no gap is a string, or all are gaps."""
    filled = (own for own in entries if not isinstance(own, (int, float, np.number)))
    first = next((own for own in filled if own is not None), None)
    return isinstance(first, (str, bytes)) or (len(entries) > 0 and all(x is None for x in entries))


def tokenize(preprocessor: Any, texts: Any) -> dict[str, Array]:
    """Return the tokens of texts, as the preprocessor cuts and pads them.

    Args:
        preprocessor: A layer from strings to a dict of tokens.
        texts: Strings, or bytes of UTF-8, `(...)`.

    Shapes:
        Output: `(..., sequence_length)` each.

    Raises:
        TypeError: If the preprocessor is none.
        ValueError: If there is no text, an entry is none, or one is not UTF-8.
    """
    if preprocessor is None:
        raise TypeError(
            "Tokens are made by a preprocessor. Received: None, as a model has that takes no "
            "texts. Give preprocessor= to the model, or one of keras-hub here."
        )
    array = as_texts(texts)
    if not array.size:
        raise ValueError("At least one text must be given. Received: none.")
    flat = [_utf8(text, row) for row, text in enumerate(array.ravel().tolist())]
    run = _graph_of(preprocessor)
    parts = [run(flat[start : start + _ROWS]) for start in range(0, len(flat), _ROWS)]
    tokens = keras.tree.map_structure(lambda *own: np.concatenate(own), *parts)
    if array.ndim == 1:
        return tokens
    return keras.tree.map_structure(lambda own: own.reshape(*array.shape, *own.shape[1:]), tokens)


def as_texts(texts: Any) -> Array:
    """Return texts as an array of objects: NumPy's own strings lose a NUL at the end."""
    if isinstance(texts, np.ndarray):
        return texts.astype(object)
    if isinstance(texts, (list, tuple)):
        array = np.empty(len(texts), object)
        array[:] = texts
        return array
    return np.asarray(texts, dtype=object)


def cleaned(texts: Any) -> Any:
    """Return a string tensor of TensorFlow as a tokenizer is given it.

    A NUL becomes a blank, since tensorflow-text drops what follows it; bytes that are no UTF-8
    become U+FFFD.
    """
    import tensorflow as tf

    texts = tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")
    return tf.strings.regex_replace(texts, r"\x00", " ")


def _utf8(text: Any, row: int) -> bytes:
    """Return a text as a tokenizer is given it, in memory: see `cleaned`."""
    try:
        if isinstance(text, str):
            return text.encode().replace(b"\0", b" ")
        if isinstance(text, bytes):
            text.decode()
            return text.replace(b"\0", b" ")
    except UnicodeError as error:
        raise ValueError(
            "Texts must be UTF-8. "
            f"Received: in row {row}, {error}. Repair it where it was read, for example by "
            "bytes.decode(errors='replace') or text.encode(errors='replace').decode()."
        ) from error
    raise ValueError(
        "Texts must be strings. "
        f"Received: a {type(text).__name__} in row {row}. Leave the row out, or write ''."
    )


def _graph_of(preprocessor: Any) -> Callable[[list[bytes]], Any]:
    """Return a function from UTF-8 to arrays of tokens."""
    if importlib.util.find_spec("tensorflow_text") is None:
        return lambda texts: keras.tree.map_structure(
            ops.convert_to_numpy, preprocessor([text.decode() for text in texts])
        )
    import tensorflow as tf

    def run(texts: list[bytes]) -> Any:
        tokens = _traced_graph(preprocessor)(tf.constant(texts, tf.string))
        return keras.tree.map_structure(lambda own: own.numpy(), tokens)

    def run_again(texts: list[bytes]) -> Any:
        try:
            return run(texts)
        except tf.errors.NotFoundError:
            # To set TensorFlow's seed frees what tensorflow-text holds of a SentencePiece model.
            tokenizer = getattr(preprocessor, "tokenizer", preprocessor)
            if not hasattr(tokenizer, "set_proto"):
                raise
            tokenizer.set_proto(tokenizer.proto)
            del _graphs[preprocessor]
            return run(texts)

    return run_again


def _traced_graph(preprocessor: Any) -> Any:
    import tensorflow as tf

    key = json.dumps(preprocessor.get_config(), default=str)
    if _graphs.get(preprocessor, (None,))[0] != key:
        own = weakref.proxy(preprocessor)  # a graph that held it would keep it in the dictionary
        graph = tf.function(
            lambda texts: own(texts),
            input_signature=[tf.TensorSpec([None], tf.string)],
            autograph=False,  # whose cache would hold it as well
        )
        _graphs[preprocessor] = (key, graph)
    return _graphs[preprocessor][1]


def _tokenized_dataset(preprocessor: Any, data: Any, has_texts_as_labels: bool) -> Any:
    """Return a data set of the same kind whose batches have tokens."""

    def convert(batch: Any) -> Any:
        if not isinstance(batch, (tuple, list)):
            return tokenized(preprocessor, batch)
        if has_texts_as_labels:
            return tuple(tokenized(preprocessor, part) for part in batch)
        return (tokenized(preprocessor, batch[0]), *batch[1:])

    if isinstance(data, types.GeneratorType):
        return _converted(convert, data)
    if isinstance(data, keras.utils.PyDataset):
        return _TokenizedDataset(data, convert) if _holds_texts(data[0]) else data
    spec = getattr(data, "element_spec", None)
    if spec is not None:
        leaves = [str(getattr(own, "dtype", "")) for own in keras.tree.flatten(spec)]
        if not any("string" in dtype for dtype in leaves):
            return data
        _check_batches(spec)
        return data.map(lambda *parts: _traced_batch(preprocessor, parts, has_texts_as_labels))
    dataset: Any = getattr(data, "dataset", None)
    collate = getattr(data, "collate_fn", None)
    if callable(collate) and hasattr(dataset, "__getitem__"):
        if _holds_texts(collate([dataset[0]])):
            raise ValueError(
                "A DataLoader of PyTorch must give tensors. "
                "Received: one whose batches hold strings. Give the texts as lists, or a "
                "keras.utils.PyDataset of them, or tokenize in its collate_fn."
            )
    return data


def _check_batches(spec: Any) -> None:
    """Raise `ValueError` unless a `tf.data.Dataset` of strings gives batches of one text a row."""
    for own in keras.tree.flatten(spec):
        is_ragged, shape = hasattr(own, "ragged_rank"), own.shape
        if "string" in str(own.dtype) and (is_ragged or shape.rank == 0):
            received = "ragged tensors" if is_ragged else "single texts"
            raise ValueError(
                "A data set of texts must give batches of one text a row. "
                f"Received: {received}. Write dataset.batch(32), or join the texts of a row."
            )


def _converted(convert: Callable[[Any], Any], batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        yield convert(batch)


def _traced_batch(preprocessor: Any, parts: tuple[Any, ...], has_texts_as_labels: bool) -> Any:
    """Return a batch of a `tf.data.Dataset` with tokens, as a graph."""
    import tensorflow as tf

    def tokens(own: Any) -> Any:
        if own.dtype != tf.string:
            return own
        flat = preprocessor(cleaned(tf.reshape(own, [-1])))
        if own.shape.rank == 1:
            return flat
        return keras.tree.map_structure(
            lambda part: tf.reshape(part, tf.concat([tf.shape(own), tf.shape(part)[1:]], 0)), flat
        )

    changed = len(parts) if has_texts_as_labels else 1
    made = (*keras.tree.map_structure(tokens, parts[:changed]), *parts[changed:])
    return made if len(made) > 1 else made[0]


class _TokenizedDataset(keras.utils.PyDataset):
    """A data set that tokenizes what another one gives."""

    def __init__(self, inner: Any, convert: Callable[[Any], Any]) -> None:
        super().__init__(workers=inner.workers, max_queue_size=inner.max_queue_size)
        self._inner, self._convert = inner, convert

    @property
    def num_batches(self) -> Any:
        """As of the other."""
        return self._inner.num_batches

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> Any:
        return self._convert(self._inner[index])

    def on_epoch_begin(self) -> None:
        """As of the other."""
        self._inner.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """As of the other."""
        self._inner.on_epoch_end()
