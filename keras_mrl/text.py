"""`TextEncoder`: keras-hub's text backbones as one vector a text, with their preprocessor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from ._tokens import are_texts as are_texts
from ._tokens import as_texts as as_texts
from ._tokens import check_one_axis, tokenized
from ._tokens import cleaned as cleaned
from ._tokens import tokenize as tokenize

_POOLINGS = ("mean", "first", "last")
_FROM_KERAS_HUB = {"mean": "mean", "cls": "first", "last": "last"}
_MASK = "padding_mask"


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
            the pooling needs one, the pooling is unknown, or the preprocessor has more tokens or
            places than the backbone.

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
        self.preprocessor = check_preprocessor(preprocessor, backbone)
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
        check_one_axis(x)
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
    tokenizer: Any = getattr(preprocessor, "tokenizer", None)
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


def check_preprocessor(preprocessor: Any, *models: Any) -> Any:
    """Return `preprocessor`, a layer or None, if every model has room for what it makes.

    Args:
        preprocessor: From strings to tokens.
        *models: Backbones of keras-hub, or models with one as `backbone`; others pass.

    Raises:
        TypeError: If it is neither a layer nor None.
        ValueError: If its length is no positive integer, or it makes more tokens or places than a
            backbone has vectors for.
    """
    if preprocessor is None:
        return None
    if not isinstance(preprocessor, keras.layers.Layer):
        raise TypeError(
            "preprocessor must be a Keras layer from strings to the inputs of the model. "
            f"Received: preprocessor={preprocessor!r}. Give for example "
            "keras_hub.models.BertTextEmbedderPreprocessor.from_preset(FOLDER)."
        )
    length = getattr(preprocessor, "sequence_length", None)
    if length is not None and not (isinstance(length, (int, np.integer)) and length > 0):
        raise ValueError(
            "sequence_length must be a positive integer: how many tokens a text has. "
            f"Received: sequence_length={length!r}. Give for example 128."
        )
    for model in models:
        backbone = getattr(model, "backbone", model)
        tokens, rows = _tokens(preprocessor), getattr(backbone, "vocabulary_size", None)
        if tokens is not None and isinstance(rows, int) and tokens > rows:
            raise ValueError(
                "A preprocessor must have the vocabulary that the backbone was trained with. "
                f"Received: a tokenizer of {tokens} tokens for a {type(backbone).__name__} of "
                f"{rows}. Load both from one preset."
            )
        places = _places(backbone)
        if places is not None and (length or 0) > places:
            raise ValueError(
                "A text must have no more tokens than the backbone has places. "
                f"Received: sequence_length={length} for a {type(backbone).__name__} of {places}. "
                f"Give sequence_length={places} or less."
            )
    return preprocessor


def _tokens(preprocessor: Any) -> int | None:
    """Return how many tokens a preprocessor has; None while a file has not given them to it."""
    try:
        return int(preprocessor.tokenizer.vocabulary_size())
    except (AttributeError, ValueError):
        return None


def _places(backbone: Any) -> int | None:
    """Return for how many places a backbone has vectors; None where it reckons them."""
    for layer in getattr(backbone, "layers", ()):
        own = getattr(layer, "position_embedding", layer)
        if type(own).__name__ == "PositionEmbedding":  # of keras-hub
            return int(own.sequence_length)
    return None


def shared_preprocessor(given: Any, towers: tuple[Any, ...]) -> Any:
    """Return the one preprocessor that the towers of a model share; None if there is none.

    Args:
        given: The caller's, which wins, or None.
        towers: Models that may have their own.

    Raises:
        TypeError: If the caller's is no layer.
        ValueError: If two towers have tokenizers that differ, or the caller's does not fit one.
    """
    if given is not None:
        return check_preprocessor(given, *towers)
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
