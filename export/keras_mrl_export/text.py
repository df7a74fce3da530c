"""A tokenizer of keras-hub inside the served graph, so that clients send texts as they are.

keras-hub has two ways of making tokens: one in Python, and one in TensorFlow by operations of
tensorflow-text, which it takes inside a graph. TensorFlow Serving has those operations built in.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl.text import cleaned, tokenize
from keras_mrl_serving.text_operations import TEXT_OPERATIONS

from .job import ExportError, TextJob
from .model_file import user_objects

Array = npt.NDArray[Any]

TEXT_INPUT = "text"  # served name of the one input
TOKENS = "token_ids"  # name of the tokens of a tokenizer alone
PADDING_MASK = "padding_mask"  # name that keras-hub gives it, where it is an input
# The classes of keras-hub that a tokenizer may be of, and what a manifest calls them.
_KINDS = {
    "WordPieceTokenizer": "wordpiece",
    "BytePairTokenizer": "bytepair",
    "SentencePieceTokenizer": "sentencepiece",
}


def tokenizer_of(preprocessor: Any) -> Any:
    """Return the tokenizer of a preprocessor, which may be a tokenizer itself."""
    return getattr(preprocessor, "tokenizer", None) or preprocessor


def _kind(preprocessor: Any) -> str | None:
    names = (
        own.__name__
        for own in type(tokenizer_of(preprocessor)).__mro__
        if own.__module__.partition(".")[0] == "keras_hub"
    )
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def check_preprocessor(
    preprocessor: Any, prompts: Any, decoder: object, argument: str = "preprocessor"
) -> None:
    """Raise unless a preprocessor, where there is one, and its prompts can be served.

    Raises:
        TypeError: If it is none of keras-hub's, or prompts are no texts by name.
        ValueError: If there is a decoder, too, or nothing that prompts belong to.
    """
    if preprocessor is None:
        if prompts:
            raise ValueError(
                "prompts stand before texts, which a preprocessor makes tokens of. "
                f"Received: prompts={prompts!r:.80} for a version that takes no texts. "
                "Give the preprocessor too, and a few texts as sample; or leave prompts out."
            )
        return
    kind = _kind(preprocessor)
    length = getattr(preprocessor, "sequence_length", None)
    if kind is None or length is None:
        received = type(preprocessor).__name__
        if kind is not None:
            received += ", which gives as many tokens as a text has"
        raise TypeError(
            f"{argument} must be a preprocessor of keras-hub, or a tokenizer of it with a "
            f"sequence_length: WordPiece, byte-pair or SentencePiece. Received: {received}. "
            f"Give for example {argument}=keras_hub.models.BertTextEmbedderPreprocessor(tokenizer)."
        )
    if decoder is not None:
        raise ValueError(
            "A version takes texts or images. Received: a preprocessor and a decoder. "
            "Leave one of them out."
        )
    are_texts = isinstance(prompts, Mapping) and all(
        isinstance(own, str) for item in prompts.items() for own in item
    )
    if prompts is not None and not are_texts:
        raise TypeError(
            f"prompts must be texts by name. Received: prompts={prompts!r:.80}. "
            "Give for example {'query': 'query: ', 'passage': 'passage: '}, or leave it out."
        )


def _has_text_operations(preprocessor: Any) -> bool:
    """Whether tensorflow-text is there; without it TensorFlow's own operations make the tokens.

    Raises:
        ImportError: If it is missing, and they cannot.
    """
    from keras_mrl_serving._session import register_text_operations

    from .wordpiece import runs_in_core

    try:
        register_text_operations()
    except ImportError:
        if not runs_in_core(preprocessor):
            raise
        return False
    return True


def read_texts(
    preprocessor: Any,
    texts: Array,
    names: Iterable[str],
    prompts: Mapping[str, str],
    pooling: str | None,
) -> TextJob:
    """Return a preprocessor as it travels, with its tokens for some texts.

    Args:
        preprocessor: One that `check_preprocessor` let pass.
        texts: At least one text, `str` or `bytes`.
        names: The inputs of the model, which it must give; () where they are unknown.
        prompts: Name to text.
        pooling: How the model makes one vector of those of its tokens.

    Raises:
        ImportError: If tensorflow-text is missing, and the preprocessor needs it.
        ValueError: If an entry or a prompt is no text in UTF-8, a prompt leaves no room for a text,
            or it does not give the inputs of the model.
    """
    _has_text_operations(preprocessor)
    tokenizer = tokenizer_of(preprocessor)
    tokens = tokenize(preprocessor, texts)
    if prompts:
        _check_room(preprocessor, prompts)
    if isinstance(tokens, (tuple, list)):
        raise ValueError(
            "A preprocessor must give the inputs of a model alone. "
            f"Received: a {type(preprocessor).__name__}, which also gives labels, as for "
            "training. Give the one for embeddings or classes, or its tokenizer with a "
            "sequence_length."
        )
    tokens = dict(tokens) if isinstance(tokens, Mapping) else {TOKENS: tokens}
    expected = sorted(names)
    if len(expected) == 1 and len(tokens) == 1:
        tokens = dict(zip(expected, tokens.values(), strict=True))
    missing = [name for name in expected if name not in tokens]
    if missing:
        raise ValueError(
            "A preprocessor must give every input of the model. "
            f"Received: a {type(preprocessor).__name__}, which gives {', '.join(sorted(tokens))}, "
            f"for a model with {', '.join(expected)}. Give the preprocessor that the model was "
            "trained with."
        )
    with tempfile.TemporaryDirectory(prefix="keras-mrl-text-") as folder:
        tokenizer.save_assets(folder)
        assets = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    return TextJob(
        config=json.dumps(keras.saving.serialize_keras_object(preprocessor), sort_keys=True),
        assets=assets,
        objects=user_objects(preprocessor),
        tokens={name: tokens[name] for name in expected or tokens},
        tokenizer=_kind(preprocessor) or "",
        vocabulary_size=int(tokenizer.vocabulary_size()),
        sequence_length=int(preprocessor.sequence_length),
        lowercase=getattr(tokenizer, "lowercase", None),
        pooling=pooling,
        prompts=dict(prompts),
    )


def _check_room(preprocessor: Any, prompts: Mapping[str, str]) -> None:
    """Raise `ValueError` for a prompt that fills all tokens of a text, so that all are alike."""
    tokens = tokenize(preprocessor, [*prompts.values()])
    masks = tokens.get(PADDING_MASK) if isinstance(tokens, Mapping) else None
    for name, mask in zip(prompts, () if masks is None else masks, strict=False):
        if mask.all():
            raise ValueError(
                "A prompt must leave room for a text. "
                f"Received: prompts[{name!r}], which fills all {mask.size} tokens of a text. "
                "Shorten it, or give a preprocessor with a longer sequence_length."
            )


class TextGraph:
    """A preprocessor as a function of TensorFlow, of texts `(batch,)`.

    A byte that is no UTF-8 is read as U+FFFD, so that one client's text fails no other's in a
    batch; a NUL as a blank.

    Args:
        preprocessor: A preprocessor or a tokenizer of keras-hub, or what stands in for it.
    """

    def __init__(self, preprocessor: Any) -> None:
        self.preprocessor = preprocessor

    @functools.cached_property
    def traced(self) -> Any:
        """Its graph, for any number of texts: tokens by the name of the model's input."""
        import tensorflow as tf

        function = tf.function(self._tokens, autograph=False)
        return function.get_concrete_function(tf.TensorSpec([None], tf.string))

    def _tokens(self, texts: Any) -> dict[str, Any]:
        tokens = self.preprocessor(cleaned(texts))
        return dict(tokens) if isinstance(tokens, Mapping) else {TOKENS: tokens}

    def eager(self, texts: list[bytes]) -> dict[str, Array]:
        """Return the tokens of some texts, as arrays."""
        import tensorflow as tf

        tokens = self.traced(tf.constant(texts))
        return {name: own.numpy() for name, own in tokens.items()}

    def operations(self) -> list[str]:
        """Return the operations it runs by that are none of TensorFlow itself."""
        graph = self.traced.graph.as_graph_def()
        bodies = [graph.node, *(function.node_def for function in graph.library.function)]
        return sorted({node.op for nodes in bodies for node in nodes} & TEXT_OPERATIONS.keys())


def _rebuild(job: TextJob) -> Any:
    """Return the preprocessor, on the backend of this process.

    Raises:
        ExportError: If it does not load.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="keras-mrl-text-") as folder:
            for name, data in job.assets.items():
                (Path(folder) / name).write_bytes(data)
            layer = keras.saving.deserialize_keras_object(
                json.loads(job.config), custom_objects=dict(job.objects)
            )
            tokenizer = tokenizer_of(layer)
            if job.tokenizer == "sentencepiece":  # whose load_assets leaves its file open
                tokenizer.set_proto(*job.assets.values())
            else:
                tokenizer.load_assets(folder)
    except Exception as error:  # any error of keras-hub or of the user's own class
        raise ExportError(
            "The preprocessor must load again from its configuration and its vocabulary. "
            f"Received: {type(error).__name__}: {error} "
            "Give a preprocessor of keras-hub as it is, or give yours a get_config()."
        ) from error
    return layer


def served_graph(job: TextJob) -> TextGraph:
    """Return the graph of a preprocessor that has travelled.

    Raises:
        ExportError: If it does not load, or gives other tokens for the sample than before.
    """
    layer = _rebuild(job)
    if not _has_text_operations(layer):
        from .wordpiece import CoreWordPiece

        return TextGraph(CoreWordPiece(layer))
    tokenizer = tokenizer_of(layer)
    if job.tokenizer == "bytepair":
        tokenizer.cache = _uncached(tokenizer.unsplittable_tokens or ())
    return TextGraph(layer)


def check_tokens(graph: TextGraph, job: TextJob, texts: Array) -> None:
    """Raise `ExportError` unless a graph gives the tokens that the trained model was given."""
    served = graph.eager(list(texts))
    if len(served) == 1 and len(job.tokens) == 1:
        served = dict(zip(job.tokens, served.values(), strict=True))
    for name, expected in sorted(job.tokens.items(), key=lambda item: item[0] != TOKENS):
        differing = np.flatnonzero((served[name] != expected).any(axis=-1))
        if len(differing):
            row = int(differing[0])
            raise ExportError(
                "The served tokenizer must give the tokens of the trained model's. "
                f"Received: other {name} for {len(differing)} of {len(expected)} texts, first "
                f"{texts[row][:60]!r}: {served[name][row][:12].tolist()} for "
                f"{expected[row][:12].tolist()}. Look for settings of the tokenizer that its "
                "get_config() leaves out."
            )


def _uncached(whole: Iterable[str]) -> Any:
    """Return what stands in for the cache of a byte-pair tokenizer, and keeps nothing.

    The cache of keras-hub gains a row by each new word, and is never emptied: in a server it would
    grow by what clients send.

    Args:
        whole: Tokens that stay whole.
    """
    import tensorflow as tf

    class Uncached(tf.Module):
        """Knows the tokens that stay whole; merges of others only within one call."""

        def __init__(self) -> None:
            super().__init__()
            tokens = tf.constant(list(whole) or [""])
            initializer = tf.lookup.KeyValueTensorInitializer(tokens, tokens)
            self.table = tf.lookup.StaticHashTable(initializer, "")
            self.merged: Any = None

        def insert(self, words: Any, merged: Any) -> None:
            del words
            self.merged = merged

        def lookup(self, words: Any) -> Any:
            known, merged = self.table.lookup(words), self.merged
            if merged is None:
                return known
            self.merged = None
            return tf.tensor_scatter_nd_update(known, tf.where(tf.equal(known, "")), merged)

    return Uncached()
