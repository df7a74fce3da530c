"""Language models: a causal Transformer as backbone, the next token, the best of many tokens.

A language model has no class of its own. It is a `MatryoshkaClassifier` whose backbone gives
features at every position. Only its answer is different, one token per row: see `next_token`.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_mrl_serving.funnel import FunnelSchedule, check_schedule

from ..layers import LearnedPositions, MatryoshkaHead
from .classifier import MatryoshkaClassifier
from .cut import split


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
    depend on the tokens up to it and on no later one, so a `MatryoshkaHead` that reads them
    predicts the next token. Its token embedding is the layer `tokens_embedding`: give it to
    `MatryoshkaHead(embedding=)` for one table at both ends.

    Args:
        vocabulary_size: Number of tokens; ids count from 0.
        width: Width of the features and of all layers in between; a multiple of `heads`.
        length: The most tokens it reads at once.
        layers: Number of blocks, each of attention and two dense layers.
        heads: Number of heads of the attention.
        dropout: Share that is dropped after the embedding and in every block, in training.
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
            use_bias=False,  # the softmax cancels a bias of the keys, which would never train
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
    """Return a language model that predicts one token per row, the next, to be exported.

    Args:
        model: A built `MatryoshkaClassifier` of tokens, or a functional model that ends in a
            `MatryoshkaHead`, with features at every position.
        padding: Id of the token at the end of short rows; the token before the padding then
            predicts the next. None means that the last position does.

    Returns:
        A model from `tokens` int32 `(batch, time)` to logits `(batch, num_dims, num_classes)`, with
        the same backbone and head, not copies.

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
    last = features[:, -1] if padding is None else _before_padding(padding, tokens, features)
    view = keras.Model(backbone.input, last, name=f"{backbone.name}_last")
    next_token_model = MatryoshkaClassifier(view, head, name=f"{model.name}_next_token")
    next_token_model.build(view.input_shape)
    # One token a row: the export reads from the loss what the outputs are.
    next_token_model.compile(optimizer=None, loss="sparse_categorical_crossentropy")
    return next_token_model


def _before_padding(padding: int, tokens: Any, features: Any) -> Any:
    """Return the features of each row's last token before padding; if all is padding, its first."""
    is_token = ops.cast(ops.not_equal(tokens, padding), "int32")
    last = ops.maximum(ops.sum(is_token, axis=1) - 1, 0)
    return ops.take_along_axis(features, last[:, None, None], axis=1)[:, 0]


def funnel_top_k(head: MatryoshkaHead, features: Any, schedule: FunnelSchedule) -> tuple[Any, Any]:
    """Return the best classes of each row, shortlisted by few dims and reranked by more.

    Every class is scored at the first dim of the schedule, by the kernel of that dim. The best are
    scored again at the next dim, and so on. If the shortlist holds every class, the result is that
    of the last dim. A large vocabulary is so never scored as a whole at full width.

    Args:
        head: A built head; its classes are the gallery.
        features: The features that the head reads, not scaled.
        schedule: Dims of the head, shortlists, and k.

    Shapes:
        features: `(rows, width)`. Result: ids int32 and logits, both `(rows, k)`, best first.
        A shortlist of s classes gathers `rows * s * dim` numbers: give long texts in parts.

    Raises:
        ValueError: If the schedule has a dim that the head has not, or more classes.

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
    first, *others = check_schedule(schedule).dims
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
