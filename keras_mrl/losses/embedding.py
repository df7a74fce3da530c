"""Any Keras loss on embeddings, at every prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from .._dims import check_dims, check_width
from . import similarity as _rows
from . import weights as _weights
from .similarity import TINY, Task


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaEmbeddingLoss(keras.losses.Loss):
    """The weighted sum of one Keras loss over prefixes of the embeddings, each of unit length.

    A prefix is cut first and scaled afterwards, in float32. An all-zero prefix stays zero and has
    a gradient of zero. For pairs and labels there are losses that multiply every coordinate once:
    `ContrastiveLoss` and `SupervisedContrastiveLoss`.

    Args:
        loss: A `keras.losses.Loss` on embeddings of any width. Its reduction is the reduction of
            the sum.
        dims: Strictly increasing prefix lengths, the widest at most the embeddings' width.
        weights: The c_m, one per dim, or a function from the number of dims to them; None means
            ones.
        nested_targets: Whether `y_true` holds embeddings that are cut and scaled alike, such as a
            teacher's; otherwise `loss` takes it as it is.
        dims_per_step: How many dims a training step of `MatryoshkaEncoder` counts, the widest
            included; None means all.
        name: Name of the loss.

    Shapes:
        `y_pred`: `(..., width)`. `y_true`: what `loss` takes; `(..., width)` if nested.

    Formula:
        L = sum_m c_m * loss(y_true, y_pred[..., :m] / |y_pred[..., :m]|)

    Raises:
        TypeError: If `loss` is not a `keras.losses.Loss` on embeddings.
        ValueError: If `dims`, `weights` or `dims_per_step` do not fit.

    Examples:
        >>> loss = MatryoshkaEmbeddingLoss(
        ...     keras.losses.CosineSimilarity(), dims=(1, 2), nested_targets=True
        ... )
        >>> teacher, student = keras.ops.array([[3.0, 4.0]]), keras.ops.array([[1.0, 0.0]])
        >>> round(float(loss(teacher, student)), 3)  # -1 at 1 dim, -0.6 at 2
        -1.6
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        dims: Sequence[int],
        weights: _weights.Weights = None,
        *,
        nested_targets: bool = False,
        dims_per_step: int | None = None,
        name: str = "matryoshka_embedding_loss",
    ) -> None:
        if (
            not isinstance(loss, keras.losses.Loss)
            or _weights.is_nested(loss)
            or isinstance(loss, _OF_CLASSES)
        ):
            raise TypeError(
                "loss must be a Keras loss on embeddings of one width. "
                f"Received: {_weights.named(loss)}. Give an instance, for example "
                "keras.losses.CosineSimilarity(); logits of classes need a MatryoshkaHead and "
                "MatryoshkaLoss."
            )
        super().__init__(name=name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss = loss
        self.dims = check_dims(dims)
        self.weights = _weights.stored(weights)
        self.nested_targets = nested_targets
        self.dims_per_step = _weights.check_dims_per_step(dims_per_step)
        self.trained_dims, self._weights = _weights.trained(self.weights, self.dims)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the weighted sum over dims, one value per sample."""
        if self.dims_per_step is not None:
            raise _weights.no_seed(self)
        return self.measure(y_true, y_pred)[0]

    def measure(
        self, y_true: Any, y_pred: Any, seed: Any = None, temperature: Any = None
    ) -> tuple[Any, None]:
        """Return the loss of every sample, and None: of hits such a loss knows nothing.

        Args:
            y_true: As for the loss.
            y_pred: As for the loss.
            seed: In a training step, the `keras.random.SeedGenerator` of the model.
            temperature: Not used.
        """
        del temperature
        check_width(self.dims, y_pred.shape[-1])
        if self.nested_targets:
            check_width(self.dims, y_true.shape[-1])
        weights = _weights.of_step(self._weights, self.dims_per_step, seed)
        total: Any = 0.0
        for index, dim in enumerate(self.trained_dims):
            target = unit_prefix(y_true, dim) if self.nested_targets else y_true
            total = total + weights[index] * self.loss.call(target, unit_prefix(y_pred, dim))
        return total, None

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {
            "loss": keras.saving.serialize_keras_object(self.loss),
            "dims": self.dims,
            "weights": keras.saving.serialize_keras_object(self.weights),
            "nested_targets": self.nested_targets,
            "dims_per_step": self.dims_per_step,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatryoshkaEmbeddingLoss:
        """Make the loss again."""
        inner = keras.saving.deserialize_keras_object(config["loss"])
        weights = keras.saving.deserialize_keras_object(config["weights"])
        return cls(**{**config, "loss": inner, "weights": weights})


_OF_CLASSES = (
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
)


def unit_prefix(embeddings: Any, dim: int) -> Any:
    """Return the first `dim` coordinates scaled to unit length, in float32; zero stays zero."""
    prefix = ops.cast(embeddings[..., :dim], "float32")
    square = ops.sum(ops.square(prefix), axis=-1, keepdims=True)
    root = ops.rsqrt(ops.maximum(square, TINY))
    return prefix * ops.where(square > TINY, root, ops.zeros_like(root))


# Pairs and triplets: every anchor finds its own among the batch's candidates, at every dim.


@keras.saving.register_keras_serializable(package="keras_mrl")
class ContrastiveLoss(keras.losses.Loss):
    """The softmax over in-batch negatives (InfoNCE), summed over nested prefixes of both sides.

    Row i of the first embeddings is the anchor, row i of the second its positive; the positives of
    all other rows are its negatives, and so is every row of the third embeddings, if there are
    any (hard negatives). Prefixes are cut first and then scaled to unit length, each by its own.
    A coordinate is multiplied once for all the dims it is in.

    With a `chunk_size` only so many anchors are compared at a time: the same values and gradients
    from memory that grows with the batch and not with its square, for one matrix product more.

    Args:
        dims: Strictly increasing prefix lengths, the widest at most the embeddings' width.
        weights: The c_m, one per dim, or a function from the number of dims to them; None means
            ones. A dim of weight 0 is not computed.
        temperature: What cosines are divided by. `MatryoshkaEncoder` can learn it instead.
        symmetric: Whether positives look for their anchors as well; the two losses are averaged.
        chunk_size: How many anchors are compared at a time; None means all.
        dims_per_step: How many dims a training step of `MatryoshkaEncoder` counts, the widest
            included; None means all.
        reduction: As in every Keras loss.
        name: Name of the loss.

    Shapes:
        `y_pred`: `(batch, 2, width)` for pairs, `(batch, 3, width)` for triplets. `y_true` is not
        used.

    Formula:
        L_i = sum_m c_m * -log softmax_j(cos(a_i[1:m], b_j[1:m]) / temperature)[j = i]

    Raises:
        ValueError: If an argument or the shape of `y_pred` is wrong, or a batch is empty.

    Reference:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, arXiv
        1807.03748; Kusupati et al., arXiv 2205.13147, section 3.

    Examples:
        >>> loss = ContrastiveLoss(dims=(2, 4))
        >>> pairs = keras.ops.ones((3, 2, 4))  # all alike: each of three is as likely
        >>> round(float(loss(keras.ops.zeros(3), pairs)), 3)  # 2 dims x log 3
        2.197
    """

    def __init__(
        self,
        dims: Sequence[int],
        weights: _weights.Weights = None,
        *,
        temperature: float = 0.05,
        symmetric: bool = False,
        chunk_size: int | None = None,
        dims_per_step: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "contrastive_loss",
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self.dims = check_dims(dims)
        self.weights = _weights.stored(weights)
        self.temperature = _rows.check_temperature(temperature)
        self.symmetric = symmetric
        self.chunk_size = _rows.check_chunk_size(chunk_size)
        self.dims_per_step = _weights.check_dims_per_step(dims_per_step)
        self.trained_dims, self._weights = _weights.trained(self.weights, self.dims)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the weighted sum over dims, one value per pair."""
        if self.dims_per_step is not None:
            raise _weights.no_seed(self)
        return self.measure(y_true, y_pred)[0]

    def measure(
        self, y_true: Any, y_pred: Any, seed: Any = None, temperature: Any = None
    ) -> tuple[Any, Any]:
        """Return the loss of every pair, and at which dims an anchor's nearest is its own.

        Args:
            y_true: Not used.
            y_pred: As for the loss.
            seed: In a training step, the `keras.random.SeedGenerator` of the model.
            temperature: What to use in place of the loss's own.

        Returns:
            `(batch,)` losses and `(num_dims, batch)` hits, zeros and ones, over `trained_dims`.
        """
        del y_true
        if len(y_pred.shape) != 3 or y_pred.shape[1] not in (2, 3):
            raise ValueError(
                "ContrastiveLoss needs embeddings of pairs (batch, 2, width) or of triplets "
                f"(batch, 3, width). Received: y_pred of shape {tuple(y_pred.shape)}. "
                "Train a MatryoshkaEncoder, or stack the two embeddings: ops.stack([a, b], axis=1)."
            )
        check_width(self.dims, y_pred.shape[-1])
        _rows.check_rows(self, y_pred)
        precise = ops.cast(y_pred, "float32")
        anchors, *others = (precise[:, side] for side in range(y_pred.shape[1]))
        losses, hits = _rows.nested_rows(
            anchors,
            ops.concatenate(others, axis=0),
            self.trained_dims,
            1.0 / (self.temperature if temperature is None else temperature),
            Task(symmetric=self.symmetric),
            self.chunk_size,
        )
        weights = _weights.of_step(self._weights, self.dims_per_step, seed)
        return _rows.weighted(losses, weights), hits

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {
            **super().get_config(),
            "dims": self.dims,
            "weights": keras.saving.serialize_keras_object(self.weights),
            "temperature": self.temperature,
            "symmetric": self.symmetric,
            "chunk_size": self.chunk_size,
            "dims_per_step": self.dims_per_step,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ContrastiveLoss:
        """Make the loss again."""
        weights = keras.saving.deserialize_keras_object(config["weights"])
        return cls(**{**config, "weights": weights})


# Labels instead of pairs: rows of one class are near each other, at every dim.


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
