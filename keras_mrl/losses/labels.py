"""Integer labels that name no class: found before training, or poisoned inside it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops


def is_outside(loss: keras.losses.Loss, labels: Any, num_classes: int) -> Any:
    """Where sparse `labels` name no class, in their shape; None if `loss` takes no such labels."""
    if not isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        return None
    outside = ~((labels >= 0) & (labels < num_classes))  # asked this way round, NaN is outside
    ignored = loss.get_config().get("ignore_class")
    return outside if ignored is None else outside & (labels != ignored)


def check_labels(loss: Any, labels: Any, num_classes: int) -> None:
    """Raise where in-memory integer `labels` name no class of a head of `num_classes`.

    Args:
        loss: The compiled loss. Only a nested sparse cross-entropy takes integer labels; any
            other loss is left alone.
        labels: What was given to `fit` as `y`. None (a dataset) is left to the loss itself.
        num_classes: Number of classes of the head.

    Raises:
        ValueError: If a label lies outside 0..num_classes-1.
    """
    inner = getattr(loss, "loss", None)
    if labels is None or not isinstance(inner, keras.losses.SparseCategoricalCrossentropy):
        return
    values = ops.convert_to_numpy(labels)
    outside = is_outside(inner, values, num_classes)
    if outside.any():
        wrong = np.unique(values[outside])
        shown = ", ".join(str(label) for label in wrong[:5]) + (", ..." if wrong.size > 5 else "")
        remedy = "Number the classes from 0"
        if wrong.max() >= num_classes:
            remedy += f", or make the head with num_classes={int(wrong.max()) + 1}"
        raise ValueError(
            f"Integer labels must lie in 0..{num_classes - 1}, one for each of the head's "
            f"{num_classes} classes. Received: labels {shown} in {int(outside.sum())} of "
            f"{outside.size} rows. {remedy}."
        )
