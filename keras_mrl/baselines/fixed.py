"""Fixed features (FF): a net per dim, all trained alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

from .._dims import check_dims
from ..layers import MatryoshkaHead
from ..models import MatryoshkaClassifier


def fixed_features(
    make_backbone: Callable[[int], keras.layers.Layer],
    num_classes: int,
    dims: Sequence[int],
    train: Callable[[MatryoshkaClassifier], Any],
) -> dict[int, MatryoshkaClassifier]:
    """Make and train one classifier per dim, each with a backbone of that very width.

    A net of one dim is a `MatryoshkaClassifier` whose head has this dim alone, so `train` can be
    the recipe of the Matryoshka model itself: the same loss, optimizer, batches and log names.

    Args:
        make_backbone: Takes a dim and returns a new backbone with features of that width.
        num_classes: Number of classes.
        dims: Strictly increasing widths, one net each.
        train: The recipe: compiles the model it is given, and fits it.

    Returns:
        The trained models by dim.

    Raises:
        ValueError: If a backbone has not the width it was asked for.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4: the baseline FF.

    Examples:
        >>> def make_backbone(dim):
        ...     return keras.Sequential([keras.Input((5,)), keras.layers.Dense(dim)])
        >>> def train(model):
        ...     loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        ...     model.compile("sgd", MatryoshkaLoss(loss))
        ...     model.fit(np.ones((4, 5)), np.arange(4) % 3, verbose=0)
        >>> models = fixed_features(make_backbone, 3, dims=(2, 4), train=train)
        >>> {dim: model.head.dims for dim, model in models.items()}
        {2: (2,), 4: (4,)}
    """
    models = {}
    for dim in check_dims(dims):
        backbone = make_backbone(dim)
        width = (getattr(backbone, "output_shape", None) or (dim,))[-1]
        if width != dim:
            raise ValueError(
                "make_backbone must return features of the width it is asked for. "
                f"Received: a backbone of width {width} for dim {dim}. "
                "End it with keras.layers.Dense(dim)."
            )
        head = MatryoshkaHead(num_classes, dims=(dim,))
        models[dim] = MatryoshkaClassifier(backbone, head, name=f"fixed_feature_{dim}")
        train(models[dim])
    return models
