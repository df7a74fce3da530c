"""The constants of a graph that another policy changes, by names under which they are found again.

`publish_policy` writes other values into them, so that a graph need not be traced again.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.cascade.stages import StageKey

MANIFEST = "keras_mrl_manifest"
MODEL_ID = "keras_mrl_model_id"
THRESHOLD = "keras_mrl_threshold"
TEMPERATURE = "keras_mrl_temperature"


def threshold(policy: CascadePolicy, stage: int) -> Any:
    """Return the threshold of a stage that is not the last, for a graph.

    Args:
        policy: The policy.
        stage: Index of the stage.
    """
    limit = policy.stages[stage].threshold
    return tf.constant(limit, tf.float32, name=f"{THRESHOLD}_{stage}")


def temperature(policy: CascadePolicy | None, key: StageKey) -> Any:
    """Return what divides the logits of an exit and a dim, for a graph.

    It is None where the policy has no such stage. One of 1 is a constant, too, since another policy
    may have another; TensorFlow leaves out a division by 1 when it loads a graph.

    Args:
        policy: The policy; None without one.
        key: Exit and dim.
    """
    if policy is None or key not in policy.keys:
        return None
    stage = policy.keys.index(key)
    divisor = policy.stages[stage].temperature
    return tf.constant(divisor, tf.float32, name=f"{TEMPERATURE}_{stage}")
