"""From a nested model to its two halves, and to a plain Keras model of one dim."""

from __future__ import annotations

from typing import Any

import keras

from ..layers import MatryoshkaHead

# How much of a pretrained backbone may change.


def freeze_before(backbone: keras.Model, layer: str) -> None:
    """Freeze every layer of `backbone` before the one named, and unfreeze it and those after it.

    Keras's own switch, `layer.trainable`, set layer by layer in the order of `backbone.layers`:
    call it before `compile`. Batch normalization that is frozen keeps its statistics, too.

    Args:
        backbone: A functional or sequential model, itself and not a model around it.
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
    names = [known.name for known in backbone.layers]
    if layer not in names:
        raise ValueError(
            "layer must be the name of one of the backbone's layers. "
            f"Received: layer={layer!r} for {backbone.name!r}, whose last layers are "
            f"{names[-5:]}. Print [layer.name for layer in backbone.layers]."
        )
    backbone.trainable = True  # which sets every layer; a frozen model would hide its layers' own
    for known in backbone.layers[: names.index(layer)]:
        known.trainable = False


def split(model: keras.Model) -> tuple[keras.Model, MatryoshkaHead | None]:
    """Return the part of `model` that makes features, and its nested head.

    Args:
        model: A built `MatryoshkaClassifier`, or any functional or sequential model. The parts
            are the model's own layers, not copies.

    Returns:
        The backbone and the head; the tower of a `MatryoshkaEncoder` and None; the model itself and
        None where it does not end in a head.

    Raises:
        ValueError: If the model ends in a nested head and has not been built.

    Examples:
        >>> inputs = keras.Input((20,))
        >>> features = keras.layers.Dense(8)(inputs)
        >>> model = keras.Model(inputs, MatryoshkaHead(10, dims=(4, 8))(features))
        >>> backbone, head = split(model)
        >>> backbone.output_shape, head.dims
        ((None, 8), (4, 8))
    """
    from .classifier import MatryoshkaClassifier  # which needs this module, for its `at`
    from .encoder import MatryoshkaEncoder

    if isinstance(model, MatryoshkaClassifier):
        return model.backbone, model.head
    if isinstance(model, MatryoshkaEncoder):
        return model.tower, None
    last = model.layers[-1] if model.layers else None
    if isinstance(last, MatryoshkaHead) and not last.built:  # a sequential model without an Input
        raise _not_built(model)
    if isinstance(last, MatryoshkaHead) and len(getattr(model, "outputs", None) or ()) == 1:
        return keras.Model(_input_of(model), last.input, name=f"{model.name}_features"), last
    return model, None


def cut(model: keras.Model, dim: int) -> keras.Model:
    """Return a plain Keras model of one dim, which loads without keras_mrl.

    Args:
        model: A built `MatryoshkaClassifier`, or a functional model that ends in a
            `MatryoshkaHead`.
        dim: One of the head's dims.

    Returns:
        Inputs to logits `(batch, num_classes)`: the same backbone (shared, not copied), its first
        `dim` features, and a `keras.layers.Dense` that holds a copy of that dim's kernel and bias.

    Raises:
        ValueError: If the model has no nested head or has not been built, or `dim` is not one of
            the head's dims.

    Examples:
        >>> backbone = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=(4, 16)))
        >>> logits = model(keras.ops.ones((2, 20)))
        >>> tuple(cut(model, 4)(keras.ops.ones((2, 20))).shape)
        (2, 10)
    """
    backbone, head = split(model)
    if head is None:
        raise ValueError(
            "Only a model that ends in a MatryoshkaHead can be cut to a dim. "
            f"Received: {type(model).__name__} {model.name!r}. "
            "Use MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes))."
        )
    if not head.built:
        raise _not_built(model)
    kernel, bias = head.weights_at(dim)
    inputs = _inputs_like(backbone)
    prefix = backbone(inputs)[..., :dim]
    dense = keras.layers.Dense(
        head.num_classes,
        use_bias=head.use_bias,
        dtype=head.dtype_policy,
        name=f"{backbone.name}_head",  # names are unique in a model, and the backbone has one
    )
    logits = dense(prefix)
    dense.set_weights([keras.ops.convert_to_numpy(w) for w in (kernel, bias) if w is not None])
    return keras.Model(inputs, logits, name=f"{model.name}_{dim}")


def _not_built(model: keras.Model) -> ValueError:
    return ValueError(
        "A model must be built before it is cut. "
        f"Received: {model.name!r}, which has no weights yet. Call it on a batch or train it."
    )


def _inputs_like(backbone: keras.layers.Layer) -> Any:
    """New symbolic inputs with the names, shapes and dtypes the backbone was built with."""
    if getattr(backbone, "inputs", None):
        return keras.tree.map_structure(
            lambda known: keras.Input(batch_shape=known.shape, dtype=known.dtype, name=known.name),
            _input_of(backbone),
        )
    # A subclassed backbone knows only the shapes it was built with.
    shapes = backbone.get_build_config()["input_shape"]
    named = shapes if isinstance(shapes, dict) else {None: shapes}
    inputs = {
        name: keras.Input(batch_shape=(None, *shape[1:]), dtype=backbone.compute_dtype, name=name)
        for name, shape in named.items()
    }
    return inputs if isinstance(shapes, dict) else inputs[None]


def _input_of(model: keras.Model) -> Any:
    """The symbolic input; a sequential model's own `input` is that of the model around it."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input
