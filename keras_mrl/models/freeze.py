"""How much of a pretrained backbone may change."""

from __future__ import annotations

import keras


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
