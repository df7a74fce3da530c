"""Adaptive classification inside the graph: one backbone pass, each wider head for fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_mrl_serving.cascade.policy import CascadePolicy

from .likeliest import Likeliest

Tensors = dict[str, Any]


def classify_adaptively(
    features: Any,
    policy: CascadePolicy,
    logits_at: Callable[[Any, int], Any],
    classification: Callable[[Likeliest, Any], Tensors],
) -> Tensors:
    """Run the cascade on `features`; a row leaves at the first stage that is sure of it.

    The best classes are picked once per row, where it leaves.

    Args:
        features: `(batch, width)`.
        policy: The stages.
        logits_at: Logits of a prefix at a dim.
        classification: The outputs for some rows of what a stage finds likely.

    Returns:
        The outputs of `classification`, and `dim` int32 `(batch,)`, in the order of the rows.
    """
    unsure = tf.range(tf.shape(features)[0])
    decided: list[Tensors] = []
    for stage in policy.stages:
        logits = logits_at(tf.gather(features[:, : stage.dim], unsure), stage.dim)
        likeliest = Likeliest(logits, stage.temperature)
        if stage.threshold is None:
            sure = tf.ones_like(unsure, tf.bool)
        else:
            sure = likeliest.confidence(policy.confidence) > stage.threshold
        accepted = tf.boolean_mask(unsure, sure)
        outputs = classification(likeliest, tf.cast(tf.where(sure)[:, 0], tf.int32))
        decided.append({**outputs, "dim": tf.fill(tf.shape(accepted), stage.dim), "row": accepted})
        unsure = tf.boolean_mask(unsure, ~sure)
    columns = {name: tf.concat([part[name] for part in decided], 0) for name in decided[0]}
    back = tf.math.invert_permutation(columns.pop("row"))
    return {name: tf.gather(column, back) for name, column in columns.items()}
