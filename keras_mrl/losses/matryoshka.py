"""`MatryoshkaLoss`: any Keras loss at every dim of a nested head.

Integer labels that name no class are refused before training if they are in memory. In a data set
they make the loss NaN: nothing can raise inside a compiled step on JAX, where such a label would
otherwise add a loss of zero and train silently.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from .._masks import with_mask_of
from .targets import check_form, check_labels_of_outputs, check_numbers, names_no_class
from .weights import Weights, _NestedLoss, _RowLoss, name_in_error, step_weights, weights_by_dim


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaLoss(_NestedLoss):
    """The weighted sum of one Keras loss over every dim of the logits.

    Reduction, sample weights and masks are Keras's own: the sum over dims is taken per sample.
    Integer labels that name no class give a loss of NaN (or the backend's own error).

    With `dims_per_step` a training step counts the widest dim and a random choice of the others,
    drawn from a seed that the model owns. Evaluation counts all dims.

    Args:
        loss: A `keras.losses.Loss` on `(..., num_classes)`, `from_logits=True` after a
            `MatryoshkaHead`. Its reduction is the reduction of the sum.
        weights: The c_m, one per dim, or a function from the number of dims to them, such as
            `first_boosted`; None means ones, as in the paper.
        dims_per_step: How many dims a training step counts, the widest included; None means all.
        name: Name of the loss.

    Shapes:
        `y_pred`: `(..., num_dims, num_classes)`. `y_true`: what `loss` takes for one dim.

    Formula:
        L = sum_m c_m * loss(y_true, y_pred[..., m, :])

    Raises:
        TypeError: If `loss` is not a `keras.losses.Loss`.
        ValueError: If `weights` or `dims_per_step` do not fit the logits, the logits have no axis
            of dims, or a loss with `dims_per_step` is called without the seed to draw from.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147, equation 1.

    Examples:
        >>> loss = MatryoshkaLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> logits = keras.ops.zeros((3, 2, 10))
        >>> round(float(loss(keras.ops.array([1, 2, 3]), logits)), 3)  # 2 dims x log 10
        4.605
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        weights: Weights = None,
        dims_per_step: int | None = None,
        name: str = "matryoshka_loss",
    ) -> None:
        if not isinstance(loss, keras.losses.Loss) or isinstance(loss, _NestedLoss):
            raise TypeError(
                "loss must be a Keras loss for one dim. "
                f"Received: {name_in_error(loss)}. Give an instance, for example "
                "keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
            )
        super().__init__(
            weights, dims_per_step, name=name, reduction=loss.reduction, dtype=loss.dtype
        )
        self.loss = loss

    def weights_for(self, num_dims: int, seed: Any = None) -> Any:
        """Return the c_m of one step.

        Args:
            num_dims: Number of dims.
            seed: In a training step, the `keras.random.SeedGenerator` of the model; None in
                evaluation, where all dims count.

        Returns:
            A tuple of floats; with `dims_per_step` and a `seed`, a float32 tensor `(num_dims,)`
            that is drawn anew, zero at the dims that the step leaves out.

        Raises:
            ValueError: If the weights or `dims_per_step` do not fit `num_dims`.
        """
        return step_weights(weights_by_dim(self.weights, num_dims), self.dims_per_step, seed)

    def for_step(self, seed: Any = None) -> keras.losses.Loss:
        """Return a Keras loss for one step: this one, with the weights drawn from `seed`.

        Args:
            seed: As for `weights_for`.
        """
        return _RowLoss(lambda y_true, y_pred: self.rows(y_true, y_pred, seed), self)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the loss of a batch; Keras converts labels, so names are refused before."""
        if hasattr(y_true, "dtype"):
            check_numbers(y_true)
        return super().__call__(y_true, y_pred, sample_weight)

    def rows(self, y_true: Any, y_pred: Any, seed: Any = None, weights: Any = None) -> Any:
        """Return the weighted sum over the dims of one step, one value per sample.

        Args:
            y_true: As for the loss.
            y_pred: As for the loss.
            seed: As for `weights_for`.
            weights: What `weights_for` returned, or other weights; None calls it.
        """
        if len(y_pred.shape) < 3:
            raise ValueError(
                "MatryoshkaLoss needs logits of shape (..., num_dims, num_classes). "
                f"Received: y_pred of shape {tuple(y_pred.shape)}. "
                "End the model with a MatryoshkaHead, or use the inner loss alone."
            )
        is_sparse, is_dense = _forms(self.loss)
        if is_sparse or is_dense:
            check_form(y_true, tuple(y_pred.shape[:-2]), y_pred.shape[-1], is_dense)
        check_labels_of_outputs(self.loss, y_true, (*y_pred.shape[:-2], y_pred.shape[-1]))
        total: Any = 0.0
        losses: Any = None
        if weights is None:
            weights = self.weights_for(y_pred.shape[-2], seed)
        for index in range(y_pred.shape[-2]):
            if not isinstance(weights, tuple) or weights[index]:
                losses = self.loss.call(y_true, y_pred[..., index, :])
                total = total + weights[index] * losses
        outside = _is_outside(self.loss, y_true, y_pred.shape[-1])
        if outside is not None:
            if len(outside.shape) > len(total.shape):  # labels may come as a column
                outside = ops.squeeze(outside, axis=-1)
            total = ops.where(outside, float("nan"), total)
        return with_mask_of(losses, total)  # Keras's mask of ignored labels, left out of the mean

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        config = super().get_config()
        del config["reduction"]  # that of the inner loss
        return {**config, "loss": keras.saving.serialize_keras_object(self.loss)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatryoshkaLoss:
        """Make the loss again."""
        inner = keras.saving.deserialize_keras_object(config["loss"])
        return super().from_config({**config, "loss": inner})


def check_labels(loss: Any, labels: Any, output_shape: tuple[int | None, ...]) -> None:
    """Raise if in-memory `labels` do not fit a nested cross-entropy, or name no class.

    Args:
        loss: The compiled loss. For any other than a nested cross-entropy nothing is checked.
        labels: The argument `y` of `fit`. None (a data set) is not checked.
        output_shape: Shape of the logits, `(batch, ..., num_dims, num_classes)`.

    Raises:
        ValueError: If the labels are not numbers, or have another form than the loss takes, or an
            integer label lies outside 0..num_classes-1.
    """
    inner = getattr(loss, "loss", None)
    is_sparse, is_dense = _forms(inner)
    if hasattr(labels, "shape"):
        check_labels_of_outputs(inner, labels, (*output_shape[:-2], output_shape[-1]))
    if labels is None or not (is_sparse or is_dense):
        return
    values, num_classes = ops.convert_to_numpy(labels), int(output_shape[-1] or 0)
    check_form(values, tuple(output_shape[:-2]), num_classes, is_dense)
    outside = _is_outside(inner, values, num_classes)
    if outside is not None and outside.any():
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


def check_form_of_batch(
    loss: Any, labels: Any, rows: tuple[int | None, ...], num_classes: int
) -> None:
    """Raise if labels of a batch have another form than a nested cross-entropy takes.

    Metrics may read them before the loss, and would raise an error of the backend.

    Args:
        loss: The compiled loss. For any other than a nested cross-entropy nothing is checked.
        labels: The labels, a tensor.
        rows: The shape of what is classified: `(batch,)`, or `(batch, time)` for sequences.
        num_classes: Number of classes.

    Raises:
        ValueError: If they have another form.
    """
    is_sparse, is_dense = _forms(getattr(loss, "loss", None))
    if is_sparse or is_dense:
        check_form(labels, rows, num_classes, is_dense)


def _forms(loss: Any) -> tuple[bool, bool]:
    """Return whether `loss` takes integer labels, and whether it takes a share of every class."""
    dense = (keras.losses.CategoricalCrossentropy, keras.losses.CategoricalFocalCrossentropy)
    return isinstance(loss, keras.losses.SparseCategoricalCrossentropy), isinstance(loss, dense)


def _is_outside(loss: keras.losses.Loss, labels: Any, num_classes: int) -> Any:
    """Return where sparse `labels` name no class; None if `loss` takes labels of another form."""
    if not isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        return None
    outside = names_no_class(labels, num_classes)
    ignored = loss.get_config().get("ignore_class")
    return outside if ignored is None else outside & (labels != ignored)
