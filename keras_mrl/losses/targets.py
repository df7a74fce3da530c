"""Operands and result of the nested cross-entropy: kernels, labels, and the sums over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from .._dims import blocks

# Losses of the one class that a row has.
SINGLE_LABEL_LOSSES = (
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
    keras.losses.CategoricalHinge,
)
# Losses that compare each output of a row with a label of its own.
MULTILABEL_LOSSES = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)
REGRESSION_LOSSES = (
    keras.losses.MeanSquaredError,
    keras.losses.MeanAbsoluteError,
    keras.losses.MeanAbsolutePercentageError,
    keras.losses.MeanSquaredLogarithmicError,
    keras.losses.Huber,
    keras.losses.LogCosh,
    keras.losses.Poisson,
    keras.losses.CosineSimilarity,
)
# Losses of a margin: the sign of an output says whether a row has the class.
MARGIN_LOSSES = (keras.losses.Hinge, keras.losses.SquaredHinge)


class Kernels(NamedTuple):
    """Kernels and biases of a nested head: one per dim, or one for all (tied); or no biases."""

    kernels: Sequence[Any]
    biases: Sequence[Any]
    dims: tuple[int, ...]

    @property
    def is_tied(self) -> bool:
        """Whether all dims read one kernel."""
        return len(self.kernels) == 1

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The rows of a tied kernel that each dim adds, as (start, stop)."""
        return blocks(self.dims)


class Sums(NamedTuple):
    """Losses, ranks and divergences `(rows, num_dims)`, and the gradients of the weighted sum.

    The sum is over the losses and the teacher's weight times the divergences.
    """

    losses: Any
    ranks: Any
    divergences: Any
    d_features: Any
    d_kernels: list[Any]
    d_biases: list[Any]


class Teacher(NamedTuple):
    """A linear head whose probabilities other heads are to give, too. No gradient reaches it.

    Attributes:
        features: What it reads, `(rows, dim)`.
        kernel: `(dim, num_classes)`.
        bias: `(num_classes,)`, or None.
        weight: Weight of the divergence from it beside a loss of weight 1.

    Examples:
        >>> features, kernel = keras.ops.ones((3, 4)), keras.ops.zeros((4, 10))
        >>> tuple(Teacher(features, kernel, None, weight=1.0).logits().shape)
        (3, 10)
    """

    features: Any
    kernel: Any
    bias: Any
    weight: float

    def logits(self) -> Any:
        """Return the logits of the rows, `(rows, num_classes)`."""
        features, kernel = (ops.cast(own, "float32") for own in (self.features, self.kernel))
        logits = ops.matmul(features, kernel)
        return logits if self.bias is None else logits + ops.cast(self.bias, "float32")


class Lesson(NamedTuple):
    """What a teacher says of some rows.

    `probabilities` are `(rows, num_classes)`, `negative_entropy` is the sum of p log p `(rows, 1)`.
    """

    probabilities: Any
    negative_entropy: Any
    weight: float


@dataclass(frozen=True)
class Targets:
    """Integer labels or probabilities of a batch, with label smoothing.

    `classes` are the right (or likeliest) classes `(rows,)`. `outside` is true where a label named
    no class; the row's entry in `classes` is then 0. `shares` are the probabilities
    `(rows, num_classes)`, None for integers. `teacher` and `lesson` are None without a teacher.
    """

    classes: Any
    outside: Any
    shares: Any
    num_classes: int
    smoothing: float
    teacher: Teacher | None = None
    lesson: Lesson | None = None

    @classmethod
    def of(
        cls, labels: Any, num_classes: int, smoothing: float, teacher: Teacher | None = None
    ) -> Targets:
        """Return the targets of `labels`, `(rows,)` or `(rows, num_classes)`."""
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(
                "label_smoothing must lie in 0..1, 1 excluded. "
                f"Received: label_smoothing={smoothing!r}. Give for example 0.1."
            )
        if len(labels.shape) == 1:
            outside = names_no_class(labels, num_classes)
            classes = ops.cast(ops.where(outside, ops.zeros_like(labels), labels), "int32")
            return cls(classes, outside, None, num_classes, smoothing, teacher)
        if len(labels.shape) != 2 or labels.shape[1] != num_classes:
            raise ValueError(
                "labels must be integers (rows,) or probabilities (rows, num_classes). "
                f"Received: labels of shape {tuple(labels.shape)} for {num_classes} classes. "
                "Give one label per row of features."
            )
        shares = ops.cast(labels, "float32")
        classes = ops.cast(ops.argmax(shares, axis=-1), "int32")
        no_row = ops.zeros_like(classes) > 0
        return cls(classes, no_row, shares, num_classes, smoothing, teacher)

    def map(self, function: Any) -> Targets:
        """Return the targets with `function` applied to every tensor."""
        shares, teacher = self.shares, self.teacher
        return replace(
            self,
            classes=function(self.classes),
            outside=function(self.outside),
            shares=None if shares is None else function(shares),
            teacher=teacher and teacher._replace(features=function(teacher.features)),
        )

    def taught(self) -> Targets:
        """Return the targets with what the teacher says of all their rows, if there is one."""
        if self.teacher is None:
            return self
        log_shares = ops.log_softmax(self.teacher.logits(), axis=-1)
        shares = ops.exp(log_shares)
        # The share of a logit of -inf is 0, and adds 0 and not NaN.
        terms = ops.where(shares > 0, shares * log_shares, 0.0)
        negative_entropy = ops.sum(terms, axis=-1, keepdims=True)
        return replace(self, lesson=Lesson(shares, negative_entropy, self.teacher.weight))

    def smooth_shares(self) -> Any:
        """Return the shares `(rows, num_classes)` after label smoothing."""
        uniform = self.smoothing / self.num_classes
        if self.shares is not None:
            return self.shares * (1 - self.smoothing) + uniform
        numbers = ops.arange(self.num_classes, dtype="int32")
        right = ops.expand_dims(self.classes, 1) == ops.expand_dims(numbers, 0)
        return ops.where(right, 1 - self.smoothing + uniform, uniform)

    def total(self) -> Any:
        """Return the sum of each row's shares, `(rows, 1)`, or 1.0 for integer labels."""
        if self.shares is None:
            return 1.0
        sums = ops.sum(self.shares, axis=1, keepdims=True)
        return sums * (1 - self.smoothing) + self.smoothing


def names_no_class(labels: Any, num_classes: int) -> Any:
    """Return where labels, an array or a tensor, are no whole number in 0..num_classes-1."""
    outside = ~((labels >= 0) & (labels < num_classes))  # true of NaN
    if keras.backend.is_float_dtype(keras.backend.standardize_dtype(labels.dtype)):
        outside = outside | (labels % 1 != 0)
    return outside


def check_form(
    labels: Any,
    rows: tuple[int | None, ...],
    num_classes: int,
    is_dense: bool,
    of_shares: str = "CategoricalCrossentropy",
) -> None:
    """Raise unless labels, an array or a tensor, have the form that a cross-entropy takes.

    Args:
        labels: The labels.
        rows: The shape of what is classified: `(batch,)`, or `(batch, time)` for sequences.
        num_classes: Number of classes.
        is_dense: Whether the loss takes a share of every class, not an integer.
        of_shares: Name of the loss, or of a metric, that takes shares.

    Raises:
        ValueError: If they are not numbers, or shares where integers are taken, or the reverse, or
            sequences of another length.
    """
    check_numbers(labels)
    shape = tuple(labels.shape)
    has_classes = len(shape) == len(rows) + 1
    if is_dense and (not has_classes or shape[-1] != num_classes):
        raise ValueError(
            f"{of_shares} takes a share of every class per row. "
            f"Received: labels of shape {shape} for {num_classes} classes. "
            f"Use Sparse{of_shares} for integer labels."
        )
    if not is_dense and has_classes and shape[-1] != 1:
        raise ValueError(
            f"Sparse{of_shares} takes one integer per row. "
            f"Received: labels of shape {shape} for {num_classes} classes. "
            f"Use {of_shares} for one-hot labels, or take their argmax."
        )
    lengths = shape[1:-1] if has_classes else shape[1:]
    if len(lengths) == len(rows) - 1 and any(
        None not in pair and pair[0] != pair[1] for pair in zip(lengths, rows[1:], strict=True)
    ):
        raise ValueError(
            "Sequences have one label per step. "
            f"Received: labels of shape {shape} for sequences of {', '.join(map(str, rows[1:]))} "
            "steps. Cut or pad the labels to the length of the inputs."
        )


def check_numbers(labels: Any) -> None:
    """Raise a `ValueError` if labels, an array or a tensor, are names."""
    if not _is_number(labels.dtype):
        raise ValueError(
            "Labels must be numbers: a model gives classes by their ids. "
            f"Received: labels of {labels.dtype}. "
            "Number the names: names, labels = numpy.unique(labels, return_inverse=True)."
        )


def check_labels_of_outputs(loss: Any, labels: Any, outputs: tuple[int | None, ...]) -> None:
    """Raise if a loss that compares every output with a label gets another number of labels.

    Keras would broadcast one label to all outputs.

    Args:
        loss: The loss of one dim.
        labels: The labels, an array or a tensor.
        outputs: Shape of the outputs of one dim.

    Raises:
        ValueError: If the last axis of the labels is not that of the outputs; labels of one output
            may lack it.
    """
    is_unknown = getattr(labels.shape, "rank", 0) is None  # of a tf.data.Dataset
    if not isinstance(loss, (*MULTILABEL_LOSSES, *REGRESSION_LOSSES, *MARGIN_LOSSES)) or is_unknown:
        return
    shape, num_outputs = tuple(labels.shape), outputs[-1]
    if None in shape[-1:]:
        return
    if shape[-1:] == (num_outputs,) and len(shape) == len(outputs):
        return
    if num_outputs != 1 or len(shape) != len(outputs) - 1:
        raise ValueError(
            f"{type(loss).__name__} compares every output with a label of its own. "
            f"Received: labels of shape {shape} for {num_outputs} outputs a row. "
            f"Give labels (rows, {num_outputs}), or a head with as many outputs as labels."
        )


def _is_number(dtype: Any) -> bool:
    if isinstance(dtype, np.dtype):
        return dtype.kind in "biufV"  # "V" is bfloat16
    return keras.backend.standardize_dtype(dtype) != "string"
