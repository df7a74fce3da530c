"""The embedding of tokens that a tied head takes its kernel from."""

from __future__ import annotations

from typing import Any

import keras


def check_embedding(head: Any) -> None:
    """Raise where the head cannot take its kernel from its `embedding`.

    Raises:
        TypeError: If it is no `keras.layers.Embedding`.
        ValueError: If the head is not tied, has other classes, or would regularize the table.
    """
    embedding = head.embedding
    if not isinstance(embedding, keras.layers.Embedding):
        raise TypeError(
            "embedding must be the layer that embeds the tokens. "
            f"Received: embedding={embedding!r}. "
            "Give the keras.layers.Embedding that the backbone calls on its tokens."
        )
    if not head.tied or head.kernel_regularizer is not None:
        raise ValueError(
            "A head with an embedding has one kernel, which is the embedding's own. "
            f"Received: tied={head.tied}, kernel_regularizer={head.kernel_regularizer!r}. "
            "Write tied=True, and give the regularizer to the embedding."
        )
    if embedding.input_dim != head.num_classes:
        raise ValueError(
            "An embedding and the head that reads it must have the same tokens. "
            f"Received: num_classes={head.num_classes} for an embedding of "
            f"{embedding.input_dim} tokens. Write num_classes={embedding.input_dim}."
        )


def check_table(embedding: keras.layers.Embedding, dims: tuple[int, ...]) -> None:
    """Raise a `ValueError` where the embedding has no table yet, or one narrower than `dims`."""
    if not embedding.built:
        raise ValueError(
            "The embedding a head reads must be built before the head. "
            f"Received: {embedding.name!r}, which has no weights yet. "
            "Give the very layer that the backbone calls on its tokens, and build that first."
        )
    if embedding.output_dim < dims[-1]:
        raise ValueError(
            "dims must not exceed the width of the embedding the head reads. "
            f"Received: dims={dims} for an embedding of width {embedding.output_dim}. "
            f"Drop the dims above {embedding.output_dim}, or widen the embedding."
        )


def to_config(embedding: keras.layers.Embedding) -> dict[str, Any]:
    """Return the embedding as configuration, unbuilt.

    In a `.keras` file Keras knows a shared layer again and builds it where the backbone holds it.
    A second one, made of a configuration alone, must have no weights: `check_table` then says so.
    """
    config: dict[str, Any] = keras.saving.serialize_keras_object(embedding)
    config.pop("build_config", None)
    return config


def shared(head: dict[str, Any], backbone: keras.layers.Layer) -> dict[str, Any]:
    """Return the serialized `head`, its embedding replaced by the layer of the backbone."""
    embedding = head["config"].get("embedding")
    if embedding is None:
        return head
    name = embedding["config"]["name"]
    # Found by its name: a configuration copied outside a .keras file knows no shared objects.
    found = [layer for layer in backbone._flatten_layers() if layer.name == name]
    return {**head, "config": {**head["config"], "embedding": found[0] if found else embedding}}
