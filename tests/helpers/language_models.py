"""A text, and language models small enough for every test to train one."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_mrl import (
    LearnedPositions,
    MatryoshkaClassifier,
    MatryoshkaHead,
    MatryoshkaMetric,
    Perplexity,
    causal_transformer,
)
from tests.helpers.laws import Example, Wrong
from tests.helpers.small_models import NUM_CLASSES, X, Y, compiled

TOKENS, WIDTH, LENGTH = 11, 8, 6
DIMS = (2, 4, 8)
TEXT = np.random.default_rng(4).integers(0, TOKENS, size=(12, LENGTH + 1)).astype("int32")
READ, NEXT = TEXT[:, :-1], TEXT[:, 1:]
EMBEDDED = np.random.default_rng(5).normal(size=(12, LENGTH, WIDTH)).astype("float32")


def language_model(
    tied: bool = False, dropout: float = 0.0, dims: tuple[int, ...] = DIMS, **arguments: Any
) -> Any:
    backbone = causal_transformer(TOKENS, WIDTH, LENGTH, layers=1, heads=2, dropout=dropout)
    embedding = backbone.get_layer("tokens_embedding") if tied else None
    head = MatryoshkaHead(TOKENS, dims, tied=tied, embedding=embedding)
    return MatryoshkaClassifier(backbone, head, **arguments)


def randomised(model: keras.Model, scale: float = 0.5) -> keras.Model:
    """Built, every weight drawn anew: sharp distributions, no weight zero."""
    model(READ)
    random = np.random.default_rng(6)
    model.set_weights([random.normal(0, scale, w.shape) for w in model.get_weights()])
    return model


def embedding(tokens: int = NUM_CLASSES, width: int = 8, built: bool = True) -> Any:
    layer = keras.layers.Embedding(tokens, width, name="tokens")
    if built:
        layer.build()
    return layer


def tied_to(layer: Any, **arguments: Any) -> MatryoshkaHead:
    return MatryoshkaHead(NUM_CLASSES, (2, 8), **{"tied": True, "embedding": layer, **arguments})


def of_tokens(head: Any) -> keras.Model:
    """The head after the embedding it reads."""
    tokens = keras.Input((5,), dtype="int32")
    features = keras.layers.Dense(8)(keras.layers.Flatten()(head.embedding(tokens)))
    return compiled(keras.Model(tokens, head(features)))


def with_positions(layer: LearnedPositions) -> keras.Model:
    inputs = keras.Input((LENGTH, WIDTH))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    return model


def with_perplexity(metric: Perplexity) -> keras.Model:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(NUM_CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=[metric])
    return model


HEADS = (
    Wrong(
        make=lambda: tied_to("tokens"),
        error=TypeError,
        sentence=(
            "embedding must be the layer that embeds the tokens. Received: embedding='tokens'. "
            "Give the keras.layers.Embedding that the backbone calls on its tokens."
        ),
    ),
    Wrong(
        make=lambda: tied_to(embedding(), tied=False),
        error=ValueError,
        sentence=(
            "A head with an embedding has one kernel, which is the embedding's own. "
            "Received: tied=False, kernel_regularizer=None. "
            "Write tied=True, and give the regularizer to the embedding."
        ),
    ),
    Wrong(
        make=lambda: tied_to(embedding(tokens=50)),
        error=ValueError,
        sentence=(
            "An embedding and the head that reads it must have the same tokens. "
            "Received: num_classes=3 for an embedding of 50 tokens. Write num_classes=50."
        ),
    ),
    Wrong(
        make=lambda: tied_to(embedding(built=False)).build((None, 8)),
        error=ValueError,
        sentence=(
            "The embedding a head reads must be built before the head. "
            "Received: 'tokens', which has no weights yet. "
            "Give the very layer that the backbone calls on its tokens, and build that first."
        ),
    ),
    Wrong(
        make=lambda: tied_to(embedding(width=4)).build((None, 8)),
        error=ValueError,
        sentence=(
            "dims must not exceed the width of the embedding the head reads. "
            "Received: dims=(2, 8) for an embedding of width 4. "
            "Drop the dims above 4, or widen the embedding."
        ),
    ),
)
POSITIONS = (
    Wrong(
        make=lambda: LearnedPositions(0),
        error=ValueError,
        sentence=(
            "length must be a positive integer. Received: length=0. "
            "Give the most tokens the model shall read at once."
        ),
    ),
    Wrong(
        make=lambda: LearnedPositions(5).call(keras.ops.convert_to_tensor(EMBEDDED)),
        error=ValueError,
        sentence=(
            "An input must not have more positions than were learned. "
            "Received: 6 tokens for length=5. "
            "Give the last tokens alone, or make the model with a larger length."
        ),
    ),
)
PERPLEXITIES = (
    Wrong(
        make=lambda: Perplexity(ignore_class="<pad>"),  # type: ignore[arg-type]
        error=ValueError,
        sentence=(
            "ignore_class must be the integer that labels no token, or None. "
            "Received: ignore_class='<pad>'. Give for example the id of the padding."
        ),
    ),
)
LANGUAGE_MODELS = (
    Wrong(
        make=lambda: MatryoshkaClassifier(
            causal_transformer(TOKENS, WIDTH, LENGTH, heads=2),
            MatryoshkaHead(TOKENS, (2, 16)),
        )(READ),
        error=ValueError,
        sentence=(
            "dims must not exceed the width of the features. "
            "Received: dims=(2, 16) for features of width 8. "
            "Drop the dims above 8, or widen the layer that makes the features."
        ),
    ),
)


def model_example(tied: bool) -> Example:
    return Example(
        make=lambda: language_model(tied),
        model=compiled,
        x=READ,
        y=NEXT,
        inputs=(READ,),
        wrong=LANGUAGE_MODELS,
        roundings=8,  # a dozen layers one after the other
    )


EXAMPLES: dict[str, Example] = {
    "head-embedding": Example(
        make=lambda: tied_to(embedding()),
        model=of_tokens,
        x=(X > 0).astype("int32"),
        y=Y,
        inputs=(EMBEDDED[:, 0],),
        wrong=HEADS,
    ),
    "positions": Example(
        make=lambda: LearnedPositions(LENGTH + 2),
        model=with_positions,
        x=EMBEDDED,
        y=-EMBEDDED,
        inputs=(EMBEDDED,),
        wrong=POSITIONS,
    ),
    "perplexity": Example(
        make=lambda: Perplexity(ignore_class=0),
        model=with_perplexity,
        x=X,
        y=Y,
        inputs=(),
        wrong=PERPLEXITIES,
    ),
    "language-untied": model_example(tied=False),
    "language-tied": model_example(tied=True),
}


def perplexity_by_dim(ignore_class: int | None = None) -> MatryoshkaMetric:
    return MatryoshkaMetric(Perplexity(ignore_class), DIMS)
