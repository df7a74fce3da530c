"""The graph of a cascade: rows that are sure leave, and nothing more is computed for them.

A stage that passes a row on needs only its confidence; classes are picked in the stage that accepts
it. Over exits, the rows still unsure are taken out of every tensor that crosses a cut, and the next
segment of the backbone runs for these alone. It stands under a condition: convolutions of no rows
fail in TensorFlow with oneDNN, and a segment that no row needs should cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import tensorflow as tf

from keras_mrl_serving.cascade.policy import CascadePolicy

from . import constants
from .graph import Tensors
from .likeliest import Likeliest

LogitsAt = Callable[[Any, int], Any]  # of a prefix of features and its dim
Classification = Callable[[Likeliest, Any], Tensors]  # of some rows of a stage


@dataclass(frozen=True)
class ExitGraph:
    """One exit of a model, as a graph needs it.

    Args:
        position: Its place among the exits in the manifest.
        segment: The part of the backbone from the exit before it: a state to features
            `(rows, width)` and the next state.
        logits_at: Makes its logits.
    """

    position: int
    segment: Callable[[Mapping[str, Any]], tuple[Any, Mapping[str, Any]]]
    logits_at: LogitsAt


def classify_adaptively(
    features: Any,
    policy: CascadePolicy,
    logits_at: LogitsAt,
    classification: Classification,
) -> Tensors:
    """Run a cascade over dims on `features`: a row leaves at the first stage that is sure of it.

    Each wider head is computed only for the rows that have not left.

    Args:
        features: `(batch, width)`.
        policy: The stages.
        logits_at: Makes logits of a prefix and its dim.
        classification: Makes the outputs for some rows of a stage.

    Returns:
        The outputs of `classification`, and `dim` int32 `(batch,)`, in the order of the rows.
    """
    stages = range(len(policy.stages))
    outputs, _ = _ask(features, policy, stages, logits_at, classification)
    return _in_order(_joined(outputs))


def classify_through_exits(
    state: Mapping[str, Any],
    rows: Any,
    policy: CascadePolicy,
    exits: Sequence[ExitGraph],
    classification: Classification,
) -> Tensors:
    """Run a cascade over exits and dims, from the state before the first segment.

    Args:
        state: What the first segment reads, with one row per row of the batch.
        rows: How many rows the batch has.
        policy: The stages.
        exits: The exits that the policy asks, shallow to deep.
        classification: Makes the outputs for some rows of a stage.

    Returns:
        As `classify_adaptively`, and `exit` int32 `(batch,)`: the position of the exit.
    """
    by_exit = groupby(range(len(policy.stages)), lambda index: policy.stages[index].exit)
    stages = [list(own) for _, own in by_exit]

    def run(state: Mapping[str, Any], row: Any, step: int) -> Tensors:
        own = exits[step]
        features, next_state = own.segment(state)
        outputs, unsure = _ask(features, policy, stages[step], own.logits_at, classification)
        left = _joined(outputs)
        left["exit"] = tf.fill(tf.shape(left["row"]), own.position)
        left["row"] = tf.gather(row, left["row"])
        if step + 1 == len(exits):
            return left

        def go_on() -> Tensors:
            kept = {name: tf.gather(tensor, unsure) for name, tensor in next_state.items()}
            return run(kept, tf.gather(row, unsure), step + 1)

        def stop() -> Tensors:
            return {name: tensor[:0] for name, tensor in left.items()}

        return _joined([left, tf.cond(tf.size(unsure) > 0, go_on, stop)])

    return _in_order(run(state, tf.range(rows), 0))


def _ask(
    features: Any,
    policy: CascadePolicy,
    stages: Sequence[int],
    logits_at: LogitsAt,
    classification: Classification,
) -> tuple[list[Tensors], Any]:
    """Ask some stages of a policy about the rows of `features`.

    Returns:
        The outputs of the rows that leave, for each stage, with `dim` and `row`, the row of
        `features`; and the rows that do not leave.
    """
    unsure = tf.range(tf.shape(features)[0])
    outputs_by_stage: list[Tensors] = []
    for index in stages:
        stage = policy.stages[index]
        prefix = features[:, : stage.dim]
        if outputs_by_stage:
            prefix = tf.gather(prefix, unsure)
        likeliest = Likeliest.of_logits(
            logits_at(prefix, stage.dim), constants.temperature(policy, stage.key)
        )
        if stage.threshold is None:
            is_sure = tf.ones_like(unsure, tf.bool)
        else:
            confidence = likeliest.confidence(policy.confidence)
            is_sure = confidence > constants.threshold(policy, index)
        leaving = tf.boolean_mask(unsure, is_sure)
        outputs = classification(likeliest, tf.cast(tf.where(is_sure)[:, 0], tf.int32))
        dims = tf.fill(tf.shape(leaving), stage.dim)
        outputs_by_stage.append({**outputs, "dim": dims, "row": leaving})
        unsure = tf.boolean_mask(unsure, ~is_sure)
    return outputs_by_stage, unsure


def _joined(parts: Sequence[Tensors]) -> Tensors:
    return {name: tf.concat([part[name] for part in parts], 0) for name in parts[0]}


def _in_order(columns: Tensors) -> Tensors:
    """Return columns in the order of `row`, which is left out.

    LiteRT has no `invert_permutation`.
    """
    row = columns.pop("row")
    order = tf.scatter_nd(row[:, None], tf.range(tf.size(row)), tf.shape(row))
    return {name: tf.gather(column, order) for name, column in columns.items()}
