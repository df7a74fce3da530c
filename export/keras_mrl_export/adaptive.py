"""The graph of a cascade: rows that are sure leave, and nothing more is computed for them.

A stage that passes a row on needs only its confidence; classes are picked in the stage that accepts
it. Over exits, the rows still unsure are taken out of every tensor that crosses a cut, and the next
segment of the backbone runs for these alone. It stands under a condition: convolutions of no rows
fail in TensorFlow with oneDNN, and a segment that no row needs should cost nothing.

A condition hands on every variable of its branches by two operations each. So conditions stand one
after the other: within each other, they would hand on what is behind them, too.
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
    left, _ = _ask(features, policy, stages, logits_at, classification)
    return _with_dims(_in_order(left), policy)


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
        rows: How many rows the batch has, at least one.
        policy: The stages.
        exits: The exits that the policy asks, shallow to deep.
        classification: Makes the outputs for some rows of a stage.

    Returns:
        As `classify_adaptively`, and `exit` int32 `(batch,)`: the position of the exit.
    """
    by_exit = groupby(range(len(policy.stages)), lambda index: policy.stages[index].exit)
    asked = [list(own) for _, own in by_exit]
    row = tf.range(rows)
    parts: list[Tensors] = []
    for own, stages in zip(exits, asked, strict=True):
        step = _step(own, stages, policy, classification)
        run = _where_rows_are(step) if parts else step
        left, state, row = run(state, row)
        parts.append(left)
    outputs = _in_order(_joined(parts))
    positions = [own.position for own, stages in zip(exits, asked, strict=True) for _ in stages]
    outputs["exit"] = tf.gather(tf.constant(positions, tf.int32), outputs["stage"])
    return _with_dims(outputs, policy)


def _step(
    exit: ExitGraph,
    stages: Sequence[int],
    policy: CascadePolicy,
    classification: Classification,
) -> Any:
    """Return a function that asks an exit: the rows that leave, and the state of those that do not.

    It takes a state and the row of the batch that each of its rows is, and returns the outputs of
    `_ask`, with rows of the batch, and both of the rows that go on.
    """

    @tf.function(autograph=False)
    def step(state: Mapping[str, Any], row: Any) -> tuple[Tensors, Tensors, Any]:
        given = {name: _of_known_shape(own) for name, own in state.items()}
        features, next_state = exit.segment(given)
        left, unsure = _ask(features, policy, stages, exit.logits_at, classification)
        left["row"] = tf.gather(row, left["row"])

        def some() -> Tensors:
            return {name: tf.gather(tensor, unsure) for name, tensor in next_state.items()}

        # A state can be large: where all rows go on, it is not copied.
        go_on = dict(next_state)
        if go_on:
            are_all = tf.equal(tf.size(unsure), tf.size(row))
            go_on = tf.cond(are_all, lambda: dict(next_state), some)
        return left, go_on, tf.gather(row, unsure)

    return step


def _where_rows_are(step: Any) -> Callable[[Mapping[str, Any], Any], tuple[Tensors, Tensors, Any]]:
    """Return a step that does nothing where it is given no rows."""

    def run(state: Mapping[str, Any], row: Any) -> tuple[Tensors, Tensors, Any]:
        made = step.get_concrete_function(state, row).structured_outputs

        def no_rows() -> Any:
            return tf.nest.map_structure(_no_rows, made)

        answer: tuple[Tensors, Tensors, Any] = tf.cond(
            tf.size(row) > 0, lambda: step(state, row), no_rows
        )
        return answer

    return run


def _of_known_shape(tensor: Any) -> Any:
    """Return a tensor of at least one row whose shape LiteRT's converter knows, too.

    Behind a condition it knows none, and a convolution needs it. TensorFlow copies nothing here.
    """
    sizes = tensor.shape[1:].as_list()
    if None in sizes:
        now = tf.shape(tensor)
        sizes = [now[1 + axis] if size is None else size for axis, size in enumerate(sizes)]
    return tf.reshape(tensor, [-1, *sizes])


def _no_rows(spec: Any) -> Any:
    return tf.zeros([0, *(size or 0 for size in spec.shape[1:])], spec.dtype)


def _ask(
    features: Any,
    policy: CascadePolicy,
    stages: Sequence[int],
    logits_at: LogitsAt,
    classification: Classification,
) -> tuple[Tensors, Any]:
    """Ask some stages of a policy about the rows of `features`.

    Returns:
        The outputs of the rows that leave, with `stage` and `row`, the row of `features`; and the
        rows that do not leave.
    """
    unsure = tf.range(tf.shape(features)[0])
    parts: list[Tensors] = []
    for index in stages:
        stage = policy.stages[index]
        prefix = features[:, : stage.dim]
        if parts:
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
        stage_of = tf.fill(tf.shape(leaving), index)
        parts.append({**outputs, "stage": stage_of, "row": leaving})
        unsure = tf.boolean_mask(unsure, ~is_sure)
    return _joined(parts), unsure


def _joined(parts: Sequence[Tensors]) -> Tensors:
    if len(parts) == 1:
        return parts[0]
    return {name: tf.concat([part[name] for part in parts], 0) for name in parts[0]}


def _in_order(columns: Tensors) -> Tensors:
    """Return columns in the order of `row`, which is left out.

    LiteRT has no `invert_permutation`.
    """
    row = columns.pop("row")
    order = tf.scatter_nd(row[:, None], tf.range(tf.size(row)), tf.shape(row))
    return {name: tf.gather(column, order) for name, column in columns.items()}


def _with_dims(outputs: Tensors, policy: CascadePolicy) -> Tensors:
    """Return outputs with the `dim` of each row in place of its `stage`."""
    stage = outputs.pop("stage")
    return {**outputs, "dim": tf.gather(tf.constant(policy.dims, tf.int32), stage)}
