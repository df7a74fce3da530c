"""Labels instead of pairs: rows of one class are near each other, at every dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from .._dims import check_dims, check_width
from . import rows as _rows
from . import weights as _weights
from .similarity import Task


@keras.saving.register_keras_serializable(package="keras_mrl")
class SupervisedContrastiveLoss(keras.losses.Loss):
    """The supervised contrastive loss, summed over nested prefixes of unit length.

    Every row of the batch is compared with all others; those of its label are right. A row whose
    label no other row has adds nothing, so batches need at least two rows of most classes.

    Args:
        dims: Strictly increasing prefix lengths, the widest at most the embeddings' width.
        weights: The c_m, one per dim, or a function from the number of dims to them; None means
            ones. A dim of weight 0 is not computed.
        temperature: What cosines are divided by. `MatryoshkaEncoder` can learn it instead.
        chunk_size: How many rows are compared at a time; None means all.
        dims_per_step: How many dims a training step of `MatryoshkaEncoder` counts, the widest
            included; None means all.
        reduction: As in every Keras loss.
        name: Name of the loss.

    Shapes:
        `y_true`: integer labels `(batch,)` or `(batch, 1)`. `y_pred`: embeddings `(batch, width)`,
        or `(batch, views, width)` for several views of every row.

    Formula:
        L_i = sum_m c_m * -mean_{p: y_p = y_i, p != i} log softmax_{j != i}(cos_m(i, j) / T)[j = p]

    Raises:
        ValueError: If an argument or a shape is wrong, or a batch is empty.

    Reference:
        Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362, equation 2.

    Examples:
        >>> loss = SupervisedContrastiveLoss(dims=(2, 4))
        >>> embeddings = keras.ops.ones((3, 4))
        >>> round(float(loss(keras.ops.array([7, 7, 7]), embeddings)), 3)  # 2 dims x log 2
        1.386
    """

    def __init__(
        self,
        dims: Sequence[int],
        weights: _weights.Weights = None,
        *,
        temperature: float = 0.1,
        chunk_size: int | None = None,
        dims_per_step: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "supervised_contrastive_loss",
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self.dims = check_dims(dims)
        self.weights = _weights.stored(weights)
        self.temperature = _rows.check_temperature(temperature)
        self.chunk_size = _rows.check_chunk_size(chunk_size)
        self.dims_per_step = _weights.check_dims_per_step(dims_per_step)
        self.trained_dims, self._weights = _weights.trained(self.weights, self.dims)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the weighted sum over dims, one value per row."""
        if self.dims_per_step is not None:
            raise _weights.no_seed(self)
        return self.measure(y_true, y_pred)[0]

    def measure(
        self, y_true: Any, y_pred: Any, seed: Any = None, temperature: Any = None
    ) -> tuple[Any, Any]:
        """Return the loss of every row, and at which dims its nearest has its label.

        Args:
            y_true: As for the loss.
            y_pred: As for the loss.
            seed: In a training step, the `keras.random.SeedGenerator` of the model.
            temperature: What to use in place of the loss's own.

        Returns:
            `(batch,)` losses and `(num_dims, batch)` hits, over `trained_dims`; the mean of the
            views where there are several.
        """
        self._check(y_true, y_pred)
        views = y_pred.shape[1] if len(y_pred.shape) == 3 else 1
        embeddings = ops.cast(ops.reshape(y_pred, (-1, y_pred.shape[-1])), "float32")
        labels = ops.repeat(ops.reshape(y_true, (-1,)), views)
        losses, hits = _rows.nested_rows(
            embeddings,
            embeddings,
            self.trained_dims,
            1.0 / (self.temperature if temperature is None else temperature),
            _task(labels),
            self.chunk_size,
        )
        by_view = (len(self.trained_dims), -1, views)
        losses, hits = (ops.mean(ops.reshape(x, by_view), axis=2) for x in (losses, hits))
        weights = _weights.of_step(self._weights, self.dims_per_step, seed)
        return _rows.weighted(losses, weights), hits

    def _check(self, y_true: Any, y_pred: Any) -> None:
        labels = None if y_true is None else tuple(y_true.shape)
        column = labels is not None and (len(labels) == 1 or (len(labels) == 2 and labels[1] == 1))
        if len(y_pred.shape) not in (2, 3) or not column:
            raise ValueError(
                "SupervisedContrastiveLoss needs one integer label per row, and embeddings of "
                "shape (batch, width) or (batch, views, width). "
                f"Received: y_true of shape {labels} and y_pred of shape "
                f"{tuple(y_pred.shape)}. Of one-hot labels take the argmax."
            )
        check_width(self.dims, y_pred.shape[-1])
        _rows.check_rows(self, y_pred)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {
            **super().get_config(),
            "dims": self.dims,
            "weights": keras.saving.serialize_keras_object(self.weights),
            "temperature": self.temperature,
            "chunk_size": self.chunk_size,
            "dims_per_step": self.dims_per_step,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SupervisedContrastiveLoss:
        """Make the loss again."""
        weights = keras.saving.deserialize_keras_object(config["weights"])
        return cls(**{**config, "weights": weights})


def _task(labels: Any) -> Task:
    """Every other row of the same label is as right as the next; a row is not its own neighbour."""

    def allowed(numbers: Any) -> Any:
        everyone = ops.arange(ops.shape(labels)[0], dtype="int32")
        return ops.not_equal(ops.expand_dims(numbers, 1), everyone)

    def targets(numbers: Any) -> Any:
        own = ops.take(labels, ops.minimum(numbers, ops.shape(labels)[0] - 1))
        same = ops.equal(ops.expand_dims(own, 1), labels)
        right = ops.cast(ops.logical_and(same, allowed(numbers)), "float32")
        return right / ops.maximum(ops.sum(right, axis=1, keepdims=True), 1.0)

    return Task(targets, allowed)
