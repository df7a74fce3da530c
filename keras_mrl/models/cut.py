"""The parts of a nested model, plain Keras models of one of its dims, and frozen layers."""

from __future__ import annotations

from copy import copy
from typing import Any

import keras

from .._dims import check_dims, check_width
from ..layers import MatryoshkaHead
from ..layers.truncate import unit_length
from ..text import without_preprocessor
from ._shapes import _NestedModel, inputs_like
from .outputs import (
    check_output,
    graph_of,
    head_at,
    holds_head,
    is_plain_nested,
    not_built_error,
    one_output,
)


def freeze_before(backbone: keras.Model, layer: str) -> None:
    """Freeze the layers of `backbone` before the one of this name; unfreeze it and those after.

    Sets Keras's own `layer.trainable` in the order of `backbone.layers`. Call it before `compile`.
    Frozen batch normalization also keeps its statistics.

    Args:
        backbone: A functional or sequential model; not a model around it.
        layer: Name of the first layer that trains, such as "conv5_block1_1_conv" in a ResNet50.

    Raises:
        ValueError: If the backbone has no layer of that name.

    Examples:
        >>> layers = [keras.layers.Dense(4, name=name) for name in ("first", "second", "third")]
        >>> backbone = keras.Sequential([keras.Input((3,)), *layers])
        >>> freeze_before(backbone, "third")
        >>> [layer.trainable for layer in backbone.layers]
        [False, False, True]
    """
    names = [own.name for own in backbone.layers]
    if layer not in names:
        owner = _owner_of(backbone, layer)
        if owner is not None:
            raise ValueError(
                "Layers are frozen in the order of the model that has them. "
                f"Received: layer={layer!r} for {backbone.name!r}, within which {owner.name!r} has "
                f"it. Give that model: freeze_before(model.get_layer({owner.name!r}), {layer!r})."
            )
        raise ValueError(
            "layer must be the name of one of the backbone's layers. "
            f"Received: layer={layer!r} for {backbone.name!r}, whose last layers are "
            f"{names[-5:]}. Print [layer.name for layer in backbone.layers]."
        )
    backbone.trainable = True  # of every layer too; the layers of a frozen model never train
    for earlier in backbone.layers[: names.index(layer)]:
        earlier.trainable = False


def _owner_of(model: keras.Model, name: str) -> keras.Model | None:
    """Return the model within `model` that has a layer of this name."""
    for own in model.layers:
        if isinstance(own, keras.Model):
            if name in [layer.name for layer in own.layers]:
                return own
    return None


def split(
    model: keras.Model,
    output: str | None = None,
    *,
    other_tower: bool = False,
    exit: str | None = None,
) -> tuple[keras.Model, MatryoshkaHead | None]:
    """Return the part of `model` that makes features, and its nested head.

    Args:
        model: A built model: a `MatryoshkaClassifier`, a functional or sequential model, one with
            such a model inside, or a class of your own. The parts are its own layers, not copies.
        output: Which output, if there are several: its key, or the name that Keras has for it.
        other_tower: Whether to return the part that makes features of positives and of galleries:
            the other tower of a `MatryoshkaEncoder` of two, and the same part of any other model.
        exit: Name of an exit of a model with exits; None means the last.

    Returns:
        The backbone and the head. Of a `MatryoshkaEncoder` one of its towers and None; of any other
        model that does not end in a head, the model itself (or a model of `output`) and None.

    Raises:
        ValueError: If the model ends in a nested head and has not been built, if `output` is not
            one of its outputs, or is left out where there are several with a nested head among
            them, or if layers come after the head.

    Examples:
        >>> inputs = keras.Input((20,))
        >>> features = keras.layers.Dense(8)(inputs)
        >>> model = keras.Model(inputs, MatryoshkaHead(10, dims=(4, 8))(features))
        >>> backbone, head = split(model)
        >>> backbone.output_shape, head.dims
        ((None, 8), (4, 8))
        >>> scaled = keras.Sequential([keras.Input((20,)), keras.layers.Rescaling(0.5), model])
        >>> split(scaled)[1] is head
        True
    """
    if is_plain_nested(model):
        check_output(model, output, [])
        backbone, head = model.parts(exit)
        backbone = without_preprocessor(backbone)
        return (gallery_backbone(model, backbone) if other_tower else backbone), head
    if exit is not None:
        raise ValueError(
            "Only a MatryoshkaClassifier or MatryoshkaEncoder has exits. "
            f"Received: exit={exit!r} for {type(model).__name__} {model.name!r}. Leave exit out."
        )
    if output is None and not holds_head(model):
        model = without_preprocessor(model)
        return (gallery_backbone(model, model) if other_tower else model), None
    inputs, tensors = graph_of(model)
    name = check_output(model, output, list(tensors))
    end = head_at(model, tensors[name])
    if end is None:
        return one_output(model, output), None
    features, head = end
    return keras.Model(inputs, features, name=f"{model.name}_features"), head


def gallery_backbone(model: keras.Model, backbone: keras.Model) -> keras.Model:
    """Return the part of `model` that galleries go through.

    Args:
        model: Any model.
        backbone: The part that queries go through, as `split` returns it.

    Raises:
        ValueError: If a `MatryoshkaEncoder` of two towers is within the model, or is of a class
            with a `call` of its own: what comes before or after the towers is of queries alone.

    Examples:
        >>> from keras_mrl.models.cut import gallery_backbone
        >>> users, items = (keras.Sequential([keras.layers.Dense(16)]) for _ in range(2))
        >>> gallery_backbone(MatryoshkaEncoder(users, items), users) is items
        True
        >>> gallery_backbone(MatryoshkaEncoder(users), users) is users
        True
    """
    if not is_plain_nested(model):
        _check_one_tower(model)
        return backbone
    other = model.gallery_part()
    return backbone if other is None else without_preprocessor(other)


def _check_one_tower(model: keras.Model) -> None:
    layers = [] if holds_head(model) else model._flatten_layers()  # a head reads one tower
    for own in layers:
        if isinstance(own, _NestedModel) and own.gallery_part() is not None:
            raise ValueError(
                "Galleries go through the other tower of a MatryoshkaEncoder as through the first. "
                f"Received: {type(model).__name__} {model.name!r}, which goes on from the first "
                f"tower of {own.name!r} alone. Put into each tower what comes before and after it: "
                "MatryoshkaEncoder(keras.Sequential([layer, tower]), "
                "keras.Sequential([layer, other_tower]))."
            )


def check_one_vector(model: keras.Model, backbone: keras.Model) -> None:
    """Raise unless the features of a row are one vector, where their shape is known.

    Args:
        model: Any model, for the error.
        backbone: The part that makes its features.

    Raises:
        ValueError: If they are of another shape.

    Examples:
        >>> from keras_mrl.models.cut import check_one_vector
        >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> check_one_vector(model, model)
    """
    shape = getattr(backbone, "output_shape", None) if backbone.built else None
    if isinstance(backbone, _NestedModel):  # of two towers Keras may name the shape of both
        return
    if isinstance(shape, tuple) and len(shape) != 2:
        raise ValueError(
            "An embedding is one vector a row, (batch, width). "
            f"Received: features of shape {shape} of {type(model).__name__} {model.name!r}. Add a "
            "pooling layer before the head; of a language model take next_token(model), or judge "
            "its tokens by score_tokens."
        )


def dims_of_loss(model: keras.Model) -> tuple[int, ...] | None:
    """Return the dims of the compiled loss of a `MatryoshkaEncoder`; None of any other model."""
    is_nested = isinstance(model, _NestedModel)
    return getattr(getattr(model, "loss", None), "dims", None) if is_nested else None


def as_model(backbone: keras.layers.Layer) -> keras.Model:
    """Return a backbone that may be a single layer as a model, which can `predict`.

    Examples:
        >>> from keras_mrl.models.cut import as_model
        >>> as_model(keras.layers.Dense(8)).predict(np.ones((3, 5)), verbose=0).shape
        (3, 8)
    """
    return backbone if hasattr(backbone, "predict") else keras.Sequential([backbone])


def cut(
    model: keras.Model, dim: int, output: str | None = None, *, exit: str | None = None
) -> keras.Model:
    """Return a plain Keras model of one dim, which loads without keras_mrl.

    It shares nothing with `model`: it can be quantised, frozen or trained on by itself.

    Args:
        model: A built model that `split` finds a nested head in.
        dim: One of the head's dims.
        output: Which of several outputs; None means all of them.
        exit: Name of an exit, after which the model ends; None means the last.

    Returns:
        A model from inputs to logits `(batch, num_classes)`: a copy of the backbone, which must be
        one that Keras can save; its first `dim` features; and a `keras.layers.Dense` with copies of
        that dim's kernel and bias. Of several outputs a dict of such logits by name; outputs
        without a nested head stay as they are.

    Raises:
        ValueError: If the model has no nested head or has not been built, `output` is none of its
            outputs, or `dim` is not one of the head's dims.

    Examples:
        >>> backbone = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=(4, 16)))
        >>> logits = model(keras.ops.ones((2, 20)))
        >>> tuple(cut(model, 4)(keras.ops.ones((2, 20))).shape)
        (2, 10)
    """
    if output is None and not is_plain_nested(model) and holds_head(model):
        inputs, tensors = graph_of(model)
        if len(tensors) > 1:
            return _cut_all(model, dim, inputs, tensors)
    backbone, head = split(model, output, exit=exit)
    if head is None:
        raise ValueError(
            "Only a model that ends in a MatryoshkaHead can be cut to a dim. "
            f"Received: {type(model).__name__} {model.name!r}. "
            "Use MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes))."
        )
    if not head.built:
        raise not_built_error(model)
    head.index_of(dim)
    backbone = copy_of(backbone)
    inputs = inputs_like(backbone)
    # A name unlike the backbone's, and unique in the model.
    logits = _logits_at(head, dim, backbone(inputs), f"{backbone.name}_head")
    name = f"{model.name}_{dim}" if exit is None else f"{model.name}_{exit}_{dim}"
    return keras.Model(inputs, logits, name=name)


def embedder(
    model: keras.Model, dim: int, output: str | None = None, *, other_tower: bool = False
) -> keras.Model:
    """Return a plain Keras model of the embedding of one dim, which loads without keras_mrl.

    It gives what `embed_<dim>` of an exported model gives. It shares nothing with `model`, and
    Keras exports it: `embedder(model, 16).export("bird.onnx", format="onnx")`, or "litert".

    Args:
        model: A built model that `split` finds a nested head in, a `MatryoshkaEncoder`, or a model
            whose output is the embedding.
        dim: Length of the prefix, one that was trained or any other up to the width.
        output: As for `split`.
        other_tower: As for `split`.

    Returns:
        A model from inputs to embeddings `(batch, dim)` of unit length.

    Raises:
        ValueError: If the model has not been built, its features are not one vector a row, or `dim`
            is no length of a prefix.

    Examples:
        >>> backbone = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=(4, 16)))
        >>> tuple(embedder(model, 4)(keras.ops.ones((2, 20))).shape)
        (2, 4)
    """
    backbone, _ = split(model, output, other_tower=other_tower)
    if not backbone.built:
        raise not_built_error(model)
    backbone = copy_of(backbone)
    inputs = inputs_like(backbone)
    features = backbone(inputs)
    check_one_vector(model, backbone)
    check_width(check_dims((dim,)), features.shape[-1])
    return keras.Model(inputs, unit_length(features[..., :dim]), name=f"{model.name}_embed_{dim}")


def _cut_all(model: keras.Model, dim: int, inputs: Any, tensors: dict[str, Any]) -> keras.Model:
    """Return a model of all outputs at one dim, over one copy of what comes before the heads."""
    features: dict[str, Any] = {}
    heads: dict[str, MatryoshkaHead | None] = {}
    for name, tensor in tensors.items():
        end = head_at(model, tensor)
        features[name], heads[name] = (tensor, None) if end is None else end
        if end is not None:
            end[1].index_of(dim)
    body = copy_of(keras.Model(inputs, features, name=f"{model.name}_features"))
    inputs = inputs_like(body)
    outputs = body(inputs)
    for name, head in heads.items():
        if head is not None:
            outputs[name] = _logits_at(head, dim, outputs[name], f"{body.name}_{name}")
    return keras.Model(inputs, outputs, name=f"{model.name}_{dim}")


def _logits_at(head: MatryoshkaHead, dim: int, features: Any, name: str) -> Any:
    head.check_linear()
    kernel, bias = head.weights_at(dim)
    dense = keras.layers.Dense(
        head.num_classes, use_bias=head.use_bias, dtype=head.float_policy, name=name
    )
    logits = dense(features[..., :dim])
    dense.set_weights([keras.ops.convert_to_numpy(w) for w in (kernel, bias) if w is not None])
    return logits


def copy_of(backbone: keras.Model) -> keras.Model:
    """Return the backbone as Keras pickles it: by its saved form, with what its layers learned."""
    classes = {type(layer).__name__: type(layer) for layer in backbone._flatten_layers()}
    with keras.saving.custom_object_scope(classes):  # the user's own, registered or not
        duplicate: keras.Model = copy(backbone)
    return duplicate
