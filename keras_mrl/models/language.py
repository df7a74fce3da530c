"""A small causal Transformer as backbone of a language model, and its next token."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_mrl_serving.funnel import FunnelSchedule

from ..layers import LearnedPositions, MatryoshkaHead
from .classifier import MatryoshkaClassifier
from .cut import split

# The best classes of a large vocabulary without scoring all of it at the full width.


def funnel_top_k(head: MatryoshkaHead, features: Any, schedule: FunnelSchedule) -> tuple[Any, Any]:
    """Return the best classes of each row: shortlisted by few dims, reranked by more.

    Every class is scored at the first dim of the schedule, by that dim's own kernel; the best are
    scored anew at the next dim, and so on. Where the shortlist is every class, the answer is that
    of the last dim alone.

    Args:
        head: A built head; its classes are the gallery.
        features: What the head reads; raw, not scaled.
        schedule: Dims of the head, shortlists, and k.

    Shapes:
        features: `(rows, width)`. Result: ids int32 and logits, both `(rows, k)`, best first.
        A shortlist of s classes reads `rows * s * dim` numbers: give long texts in parts.

    Raises:
        ValueError: If the schedule names other dims or more classes than the head has.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.3.1, over a vocabulary.

    Examples:
        >>> from keras_mrl_serving import FunnelSchedule
        >>> head = MatryoshkaHead(1000, dims=(4, 16), tied=True)
        >>> features = keras.random.normal((2, 16), seed=0)
        >>> logits = head(features)[:, -1]
        >>> ids, _ = funnel_top_k(head, features, FunnelSchedule((4, 16), (1000,), k=3))
        >>> bool(keras.ops.all(ids == keras.ops.top_k(logits, 3)[1]))
        True
    """
    first, *others = schedule.dims
    sizes = (*schedule.shortlists, schedule.k)
    if sizes[0] > head.num_classes:
        raise ValueError(
            "A shortlist must not hold more classes than there are. "
            f"Received: {sizes[0]} of {head.num_classes} classes. "
            f"Shorten it to at most {head.num_classes}."
        )
    scores, best = ops.top_k(head.logits_at(features[..., :first], first), sizes[0])
    ids = ops.cast(best, "int32")
    for dim, size in zip(others, sizes[1:], strict=True):
        kernel, bias = head.weights_at(dim)
        rows = ops.take(ops.transpose(kernel), ids, axis=0)
        logits = ops.squeeze(ops.matmul(rows, features[..., :dim, None]), axis=-1)
        if bias is not None:
            logits = logits + ops.take(bias, ids, axis=0)
        scores, best = ops.top_k(logits, size)
        ids = ops.take_along_axis(ids, ops.cast(best, "int32"), axis=-1)
    return ids, scores


def causal_transformer(
    vocabulary_size: int,
    width: int,
    length: int,
    *,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.1,
    name: str = "transformer",
) -> keras.Model:
    """Return a backbone from `tokens` to the features of every position.

    A pre-norm Transformer of Keras's own layers with learned positions. The features of a position
    are made of the tokens up to it and no later one, so a `MatryoshkaHead` that reads them
    predicts the next. Its token embedding is the layer `tokens_embedding`: give that to
    `MatryoshkaHead(embedding=)` for one table at both ends.

    Args:
        vocabulary_size: Number of tokens; ids count from 0.
        width: Of the features and of everything in between; `heads` divides it.
        length: Most tokens it reads at once.
        layers: Number of blocks, each attention and two dense layers.
        heads: Of the attention.
        dropout: Share dropped after the embedding and in every block, in training.
        name: Name of the model.

    Shapes:
        Input: `tokens` int32 `(batch, time)`, time at most `length`.
        Output: `(batch, time, width)`.

    Raises:
        ValueError: If `heads` does not divide `width`.

    Reference:
        Radford et al., Language Models are Unsupervised Multitask Learners, section 2.3.

    Examples:
        >>> backbone = causal_transformer(vocabulary_size=50, width=16, length=8)
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(50, dims=(4, 16)))
        >>> tuple(model(keras.ops.ones((2, 8), dtype="int32")).shape)  # logits of every position
        (2, 8, 2, 50)
    """
    if width % heads:
        raise ValueError(
            "Every head of the attention reads an equal share of the width. "
            f"Received: heads={heads} for width={width}. Choose heads that divide the width."
        )
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(vocabulary_size, width, name="tokens_embedding")(tokens)
    x = keras.layers.Dropout(dropout)(LearnedPositions(length, name="positions")(x))
    for block in range(layers):
        normed = keras.layers.LayerNormalization(epsilon=1e-5, name=f"attention_norm_{block}")(x)
        attention = keras.layers.MultiHeadAttention(
            heads,
            width // heads,
            dropout=dropout,
            use_bias=False,  # of the keys it would never learn: the softmax does not see it
            name=f"attention_{block}",
        )
        attended = attention(normed, normed, use_causal_mask=True)
        x = keras.layers.Add()([x, keras.layers.Dropout(dropout)(attended)])
        normed = keras.layers.LayerNormalization(epsilon=1e-5, name=f"dense_norm_{block}")(x)
        wide = keras.layers.Dense(4 * width, activation="gelu", name=f"expand_{block}")(normed)
        narrow = keras.layers.Dense(width, name=f"contract_{block}")(wide)
        x = keras.layers.Add()([x, keras.layers.Dropout(dropout)(narrow)])
    features = keras.layers.LayerNormalization(epsilon=1e-5, name="features")(x)
    return keras.Model(tokens, features, name=name)


def next_token(model: keras.Model, padding: int | None = None) -> MatryoshkaClassifier:
    """Return a language model whose row answers its next token alone, to be exported.

    Args:
        model: A built `MatryoshkaClassifier` of tokens, or a functional model that ends in a
            `MatryoshkaHead`, with features at every position.
        padding: Id of the token that fills short rows up at their end; the last other token is
            then the one that answers. None reads the last position.

    Returns:
        `tokens` int32 `(batch, time)` to logits `(batch, num_dims, num_classes)`: the same
        backbone and head, not copies.

    Raises:
        ValueError: If the model has no nested head, or its features no positions.

    Examples:
        >>> backbone = causal_transformer(vocabulary_size=50, width=16, length=8)
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(50, dims=(4, 16)))
        >>> tokens = keras.ops.ones((2, 8), dtype="int32")
        >>> every, last = model(tokens), next_token(model)(tokens)
        >>> tuple(last.shape), bool(keras.ops.all(keras.ops.isclose(every[:, -1], last)))
        ((2, 2, 50), True)
    """
    backbone, head = split(model)
    shape = getattr(backbone, "output_shape", None)
    if head is None or shape is None or len(shape) != 3:
        raise ValueError(
            "A language model makes features (batch, time, width) and ends in a MatryoshkaHead. "
            f"Received: {type(model).__name__} {model.name!r}, whose features are {shape}. "
            "Join causal_transformer(...) and a head in a MatryoshkaClassifier."
        )
    tokens, features = backbone.inputs[0], backbone.outputs[0]
    last = features[:, -1] if padding is None else _last_but(padding, tokens, features)
    view = keras.Model(backbone.input, last, name=f"{backbone.name}_last")
    answering = MatryoshkaClassifier(view, head, name=f"{model.name}_next_token")
    answering.build(view.input_shape)
    return answering


def _last_but(padding: int, tokens: Any, features: Any) -> Any:
    """The features of the last token of each row that is no padding; of the first if all are."""
    known = ops.cast(ops.not_equal(tokens, padding), "int32")
    last = ops.maximum(ops.sum(known, axis=1) - 1, 0)
    return ops.take_along_axis(features, last[:, None, None], axis=1)[:, 0]
