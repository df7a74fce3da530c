"""Texts for models: keras-hub's backbones as one vector a text, and its preprocessors before them.

A string is no tensor on JAX and PyTorch, so a model that has a preprocessor tokenizes before
`fit`, `evaluate` and `predict` begin, outside the compiled step. Where tensorflow-text is installed
the preprocessor runs as a TensorFlow graph on every backend, since that is what a served model
does; else keras-hub's Python code runs. `docs/text.md` names the characters on which they differ.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from ._arrays import Array, is_dataset

_POOLINGS = ("mean", "first", "last")
_FROM_KERAS_HUB = {"mean": "mean", "cls": "first", "last": "last"}
_ROWS = 1024  # tokenized together
_MASK = "padding_mask"
_graphs: Any = weakref.WeakKeyDictionary()  # of preprocessors, by their configuration


@keras.saving.register_keras_serializable(package="keras_mrl")
class TextEncoder(keras.Model):
    """A text backbone of keras-hub, and one vector a text: the tower of a `MatryoshkaEncoder`.

    Its inputs are those of the backbone, token ids and masks. With a preprocessor, `predict` takes
    strings, and so do `fit`, `evaluate` and `predict` of a `MatryoshkaEncoder` or a
    `MatryoshkaClassifier` of it. keras-hub's own `TextEmbedder` does as well in its place.

    Args:
        backbone: Such as `keras_hub.models.BertBackbone`, whose output is one vector a token.
        preprocessor: From strings to the inputs of the backbone, such as
            `keras_hub.models.BertTextEmbedderPreprocessor`; None means that inputs are tokens.
        pooling: The vector of a text: "mean" of all its tokens, of the "first" (`[CLS]`), or of
            the "last" that is no padding.
        **kwargs: Arguments of every Keras model (`name`).

    Shapes:
        Output: `(batch, width)`, not scaled.

    Raises:
        TypeError: If the backbone is not a functional Keras model, or the preprocessor no layer.
        ValueError: If the backbone does not give one vector a token, it has no padding mask where
            the pooling needs one, or the pooling is unknown.

    Examples:
        >>> tokens = keras.Input((None,), dtype="int32", name="token_ids")
        >>> mask = keras.Input((None,), dtype="int32", name="padding_mask")
        >>> vectors = keras.layers.Embedding(100, 16)(tokens)
        >>> backbone = keras.Model({"token_ids": tokens, "padding_mask": mask}, vectors)
        >>> TextEncoder(backbone, pooling="mean").output_shape
        (None, 16)
    """

    def __init__(
        self,
        backbone: keras.Model,
        preprocessor: keras.layers.Layer | None = None,
        *,
        pooling: str = "mean",
        **kwargs: Any,
    ) -> None:
        if pooling not in _POOLINGS:
            raise ValueError(
                f"pooling must be one of {', '.join(map(repr, _POOLINGS))}. "
                f"Received: pooling={pooling!r}. "
                "A keras_hub.models.TextEmbedder keeps its own pooling: give it as the tower."
            )
        if not getattr(backbone, "inputs", None):
            raise TypeError(
                "A TextEncoder is made of a text backbone, a functional Keras model. "
                f"Received: {backbone!r}. Give for example "
                "keras_hub.models.BertBackbone.from_preset(FOLDER), or write "
                "TextEncoder.from_preset(FOLDER)."
            )
        vectors = _vectors(backbone, backbone.output)
        pooled = _pooled(backbone, vectors, backbone.input, pooling)
        super().__init__(inputs=backbone.input, outputs=pooled, **kwargs)
        # Its layers are layers of this model. Tracked by itself it would add those that the pooled
        # vector does not need, such as the pooler of BERT, which no gradient reaches.
        object.__setattr__(self, "backbone", backbone)
        self.preprocessor = check_preprocessor(preprocessor)
        self.pooling = pooling

    @classmethod
    def from_preset(
        cls,
        preset: str | Path,
        *,
        pooling: str | None = None,
        sequence_length: int | None = None,
        **kwargs: Any,
    ) -> TextEncoder:
        """Load a backbone and its tokenizer, as `keras_hub.models.Backbone.from_preset` does.

        Args:
            preset: A folder, of keras-hub or of Hugging Face, or a handle such as
                `"hf://sentence-transformers/all-MiniLM-L6-v2"`.
            pooling: As of the class; None means the preset's own, which keras-hub knows for the
                families that it has a `TextEmbedder` of.
            sequence_length: Tokens that a text is cut and padded to; None means the preset's own.
            **kwargs: Arguments of `keras_hub.models.Backbone.from_preset`, such as `dtype`.

        Raises:
            ImportError: If keras-hub is not installed.
            ValueError: If keras-hub cannot load the preset, has no preprocessor for it that makes
                one sequence of a text, or knows no pooling and none is given.
        """
        hub = _keras_hub()
        preset = str(preset)
        backbone = hub.models.Backbone.from_preset(preset, **kwargs)
        preprocessor = _preprocessor_from(hub, preset, backbone, sequence_length)
        own = _own_pooling(hub, preset, backbone) if pooling is None else pooling
        return cls(backbone, preprocessor, pooling=own)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this model again."""
        return {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "preprocessor": keras.saving.serialize_keras_object(self.preprocessor),
            "pooling": self.pooling,
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make the model again."""
        parts = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects)
            for name in ("backbone", "preprocessor")
        }
        return cls(**{**config, **parts})

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the vectors of tokens, or of strings if there is a preprocessor."""
        return super().predict(tokenized(self.preprocessor, x), *args, **kwargs)


def _vectors(backbone: keras.Model, output: Any) -> Any:
    """Return the output of a backbone that has a vector a token."""
    vectors = output.get("sequence_output") if isinstance(output, dict) else output
    if len(getattr(vectors, "shape", ())) != 3:
        shapes = keras.tree.map_structure(lambda own: tuple(own.shape), output)
        raise ValueError(
            "A text backbone must give one vector a token, (batch, time, width), alone or under "
            f"'sequence_output'. Received: {type(backbone).__name__} with outputs {shapes}. "
            "Make a model of the one to pool: keras.Model(backbone.input, backbone.output[...])."
        )
    return vectors


def _pooled(backbone: keras.Model, vectors: Any, inputs: Any, pooling: str) -> Any:
    """Return one vector a text, by layers and operations of Keras alone."""
    if pooling == "first":
        return vectors[:, 0]
    mask = inputs.get(_MASK) if isinstance(inputs, dict) else None
    if mask is None:
        names = list(inputs) if isinstance(inputs, dict) else "one tensor"
        raise ValueError(
            f"pooling={pooling!r} must know which tokens are padding, from an input {_MASK!r}. "
            f"Received: {type(backbone).__name__} with inputs {names}. Use pooling='first'."
        )
    if pooling == "mean":
        return keras.layers.GlobalAveragePooling1D(name="mean_of_tokens")(vectors, mask=mask)
    counts = ops.cast(mask, vectors.dtype)
    is_last = counts * (1 - ops.pad(counts, [[0, 0], [0, 1]])[:, 1:])
    return ops.sum(vectors * ops.expand_dims(is_last, -1), axis=1)


def _keras_hub() -> Any:
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            "Text presets are loaded by keras-hub. "
            f"Received: {error}. Install it: pip install 'keras-mrl[text]'."
        ) from error
    return keras_hub


def _preprocessor_from(hub: Any, preset: str, backbone: Any, length: int | None) -> Any:
    arguments = {} if length is None else {"sequence_length": length}
    for name in ("TextEmbedderPreprocessor", "TextClassifierPreprocessor"):
        base = getattr(hub.models, name)
        kind = _subclass_for(base, backbone)
        if kind is not None:
            preprocessor = kind.from_preset(preset, **arguments)
            _strip_accents_as_trained(Path(preset), preprocessor)
            return preprocessor
    raise ValueError(
        "keras-hub must have a preprocessor that makes one sequence of a text, of its "
        "TextEmbedder or TextClassifier. "
        f"Received: {preset!r}, a {type(backbone).__name__}, which has neither. Give one: "
        "TextEncoder(backbone, preprocessor, pooling='last'), a Keras layer from strings to the "
        "inputs of the backbone."
    )


def _subclass_for(base: Any, backbone: Any) -> Any:
    """Return the class of keras-hub below `base` that is for such a backbone."""
    waiting = [base]
    while waiting:
        kind = waiting.pop()
        if kind.backbone_cls is type(backbone):
            return kind
        waiting.extend(kind.__subclasses__())
    return None


def _own_pooling(hub: Any, preset: str, backbone: Any) -> str:
    """Return the pooling that a preset was trained with."""
    received = f"a {type(backbone).__name__}"
    if _subclass_for(hub.models.TextEmbedder, backbone) is not None:
        embedder = hub.models.TextEmbedder.from_preset(
            preset, load_weights=False, preprocessor=None
        )
        if embedder.pooling_mode in _FROM_KERAS_HUB:
            return _FROM_KERAS_HUB[embedder.pooling_mode]
        received = f"a TextEmbedder with pooling_mode={embedder.pooling_mode!r}"
    raise ValueError(
        "from_preset must know the pooling that the preset was trained with. "
        f"Received: pooling=None for {preset!r}, {received}. Say one: pooling='mean', 'first' or "
        "'last'; or give keras_hub.models.TextEmbedder.from_preset(...) as the tower."
    )


def _strip_accents_as_trained(folder: Path, preprocessor: Any) -> None:
    """Let a BERT tokenizer from a folder of Hugging Face drop accents if it was trained so.

    keras-hub reads `do_lower_case` alone; the original drops accents wherever it lowers, unless
    `strip_accents` says otherwise.
    """
    file = folder / "tokenizer_config.json"
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if not hasattr(tokenizer, "strip_accents") or not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    own = config.get("strip_accents")
    tokenizer.strip_accents = bool(config.get("do_lower_case") if own is None else own)


def preprocessor_of(model: Any) -> Any:
    """Return the preprocessor of a model that takes strings; None of any other.

    Args:
        model: A `MatryoshkaEncoder`, a `MatryoshkaClassifier`, a `TextEncoder`, or a task of
            keras-hub.

    Examples:
        >>> from keras_mrl.text import preprocessor_of
        >>> preprocessor_of(keras.Sequential([keras.layers.Dense(2)])) is None
        True
    """
    own = getattr(model, "preprocessor", None)
    return own if isinstance(own, keras.layers.Layer) else None


def pooling_of(model: Any) -> str | None:
    """Return how a model makes one vector of a text: "mean", "first", "last", or None of others.

    Args:
        model: As of `preprocessor_of`.

    Examples:
        >>> from keras_mrl.text import pooling_of
        >>> pooling_of(keras.Sequential([keras.layers.Dense(2)])) is None
        True
    """
    for part in (model, getattr(model, "tower", None), getattr(model, "backbone", None)):
        mode = getattr(part, "pooling_mode", None)
        own = _FROM_KERAS_HUB.get(mode) if isinstance(mode, str) else getattr(part, "pooling", None)
        if isinstance(own, str):
            return own
    return None


def without_preprocessor(model: Any) -> Any:
    """Return a model that tokenizes by itself as a plain model from tokens, on its own layers.

    Examples:
        >>> from keras_mrl.text import without_preprocessor
        >>> model = keras.Sequential([keras.layers.Dense(2)])
        >>> without_preprocessor(model) is model
        True
    """
    if preprocessor_of(model) is None or not getattr(model, "inputs", None):
        return model
    return keras.Model(model.input, model.output, name=model.name)


def check_preprocessor(preprocessor: Any) -> Any:
    """Return `preprocessor`, a layer or None; raise `TypeError` for anything else."""
    if preprocessor is not None and not isinstance(preprocessor, keras.layers.Layer):
        raise TypeError(
            "preprocessor must be a Keras layer from strings to the inputs of the model. "
            f"Received: preprocessor={preprocessor!r}. Give for example "
            "keras_hub.models.BertTextEmbedderPreprocessor.from_preset(FOLDER)."
        )
    return preprocessor


def shared_preprocessor(given: Any, towers: tuple[Any, ...]) -> Any:
    """Return the one preprocessor that the towers of a model share; None if there is none.

    Args:
        given: The caller's, which wins, or None.
        towers: Models that may have their own.

    Raises:
        TypeError: If the caller's is no layer.
        ValueError: If two towers have tokenizers that differ.
    """
    if given is not None:
        return check_preprocessor(given)
    owned = [own for own in map(preprocessor_of, towers) if own is not None]
    if any(_identity(own) != _identity(owned[0]) for own in owned[1:]):
        raise ValueError(
            "Both towers must read texts by one preprocessor. "
            "Received: towers with preprocessors that differ in vocabulary or settings. "
            "Give preprocessor=, the one for both, or towers without and tokens in fit."
        )
    return owned[0] if owned else None


def _identity(preprocessor: Any) -> tuple[str, Any]:
    config = preprocessor.get_config()
    settings = {name: own for name, own in config.items() if name not in ("name", "tokenizer")}
    tokenizer = getattr(preprocessor, "tokenizer", None)
    vocabulary = getattr(tokenizer, "get_vocabulary", lambda: None)()
    return f"{type(preprocessor)}{json.dumps(settings, default=str)}", vocabulary


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
        given["x"] = tokenized(preprocessor, given.get("x"), has_texts_as_labels)
        validation = given.get("validation_data")
        if has_texts_as_labels:
            if given.get("y") is not None:
                given["y"] = tokenized(preprocessor, given["y"])
        if isinstance(validation, (tuple, list)) and not has_texts_as_labels:
            given["validation_data"] = (tokenized(preprocessor, validation[0]), *validation[1:])
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
        >>> from keras_mrl.text import tokenized
        >>> tokenized(None, ["as it is"])
        ['as it is']
    """
    if preprocessor is None or data is None:
        return data
    if isinstance(data, (str, bytes)):
        raise ValueError(
            f"Texts come in a list or an array. Received: one {type(data).__name__}. Write [text]."
        )
    if are_texts(data):
        return tokenize(preprocessor, data)
    if is_dataset(data) or isinstance(data, types.GeneratorType):
        return _tokenized_dataset(preprocessor, data, has_texts_as_labels)
    if isinstance(data, dict):
        return {name: tokenized(preprocessor, own) for name, own in data.items()}
    if isinstance(data, (tuple, list)) and any(map(_holds_texts, data)):
        return tuple(tokenized(preprocessor, own) for own in data)
    return data


def _holds_texts(part: Any) -> bool:
    """Whether a part of a structure is texts, or has them within."""
    if isinstance(part, dict):
        return any(map(_holds_texts, part.values()))
    if isinstance(part, (tuple, list)) and not are_texts(part):
        return any(_holds_texts(own) for own in part if isinstance(own, (tuple, list, dict)))
    return are_texts(part)


def are_texts(data: Any) -> bool:
    """Whether `data` is a list or an array of strings, by its first entry.

    Examples:
        >>> from keras_mrl.text import are_texts
        >>> are_texts(["a", "b"]), are_texts(np.array([b"a"])), are_texts([1, 2])
        (True, True, False)
    """
    if isinstance(data, (list, tuple)):
        return bool(data) and isinstance(data[0], (str, bytes))
    dtype = getattr(data, "dtype", None)
    if dtype is None or not getattr(data, "shape", ()):
        return False
    if getattr(dtype, "kind", None) in ("U", "S", "T"):
        return True
    if getattr(dtype, "kind", None) == "O":
        entries = np.asarray(data).ravel()
        return bool(entries.size) and isinstance(entries[0], (str, bytes))
    return "str" in str(getattr(dtype, "name", dtype))  # TensorFlow's and pandas's


def tokenize(preprocessor: Any, texts: Any) -> dict[str, Array]:
    """Return the tokens of texts, as the preprocessor cuts and pads them.

    Args:
        preprocessor: A layer from strings to a dict of tokens.
        texts: Strings, or bytes of UTF-8, `(...)`.

    Shapes:
        Output: `(..., sequence_length)` each.

    Raises:
        ValueError: If an entry is no text, or a text is not UTF-8.
    """
    array = as_texts(texts)
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


def _utf8(text: Any, row: int) -> bytes:
    try:
        if isinstance(text, str):
            return text.encode()
        if isinstance(text, bytes):
            text.decode()
            return text
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

    key = json.dumps(preprocessor.get_config(), default=str)
    if _graphs.get(preprocessor, (None,))[0] != key:
        own = weakref.proxy(preprocessor)  # a graph that held it would keep it in the dictionary
        graph = tf.function(
            lambda texts: own(texts), input_signature=[tf.TensorSpec([None], tf.string)]
        )
        _graphs[preprocessor] = (key, graph)
    graph = _graphs[preprocessor][1]
    return lambda texts: keras.tree.map_structure(
        lambda own: own.numpy(), graph(tf.constant(texts, tf.string))
    )


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
        return data.map(lambda *parts: _traced(preprocessor, parts, has_texts_as_labels))
    dataset, collate = getattr(data, "dataset", None), getattr(data, "collate_fn", None)
    if callable(collate) and hasattr(dataset, "__getitem__"):
        if _holds_texts(collate([dataset[0]])):
            raise ValueError(
                "A DataLoader of PyTorch must give tensors. "
                "Received: one whose batches hold strings. Give the texts as lists, or a "
                "keras.utils.PyDataset of them, or tokenize in its collate_fn."
            )
    return data


def _converted(convert: Callable[[Any], Any], batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        yield convert(batch)


def _traced(preprocessor: Any, parts: tuple[Any, ...], has_texts_as_labels: bool) -> Any:
    """Return a batch of a `tf.data.Dataset` with tokens, as a graph."""
    import tensorflow as tf

    def tokens(own: Any) -> Any:
        if own.dtype != tf.string:
            return own
        flat = preprocessor(tf.reshape(own, [-1]))
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
