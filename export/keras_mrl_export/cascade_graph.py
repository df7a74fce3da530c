"""Adaptive classification inside the graph: one backbone pass, each wider head for fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_mrl_serving.cascade import CascadePolicy

Tensors = dict[str, Any]


def classify_adaptively(
    features: Any,
    policy: CascadePolicy,
    logits_at: Callable[[Any, int], Any],
    classification: Callable[[Any, int], Tensors],
) -> Tensors:
    """Run the cascade on `features`; a row leaves at the first stage that is sure of it.

    The best classes are picked once per row, where it leaves: a stage that passes a row on needs
    its largest probability alone, which is one over the sum of the shifted exponentials.

    Args:
        features: `(batch, width)`.
        policy: The stages.
        logits_at: Logits of a prefix at a dim.
        classification: The outputs of one stage from its logits.

    Returns:
        The outputs of `classification`, and `dim` int32 `(batch,)`, in the order of the rows.
    """
    unsure = tf.range(tf.shape(features)[0])
    decided: list[Tensors] = []
    for stage in policy.stages:
        logits = logits_at(tf.gather(features[:, : stage.dim], unsure), stage.dim)
        if stage.threshold is None:
            sure = tf.ones_like(unsure, tf.bool)
        else:
            sure = _max_probability(logits / stage.temperature) > stage.threshold
        accepted = tf.boolean_mask(unsure, sure)
        outputs = classification(tf.boolean_mask(logits, sure), stage.dim)
        decided.append({**outputs, "dim": tf.fill(tf.shape(accepted), stage.dim), "row": accepted})
        unsure = tf.boolean_mask(unsure, ~sure)
    columns = {name: tf.concat([part[name] for part in decided], 0) for name in decided[0]}
    back = tf.math.invert_permutation(columns.pop("row"))
    return {name: tf.gather(column, back) for name, column in columns.items()}


def _max_probability(logits: Any) -> Any:
    shifted = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    return 1.0 / tf.reduce_sum(tf.exp(shifted), axis=-1)
