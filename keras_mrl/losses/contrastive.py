"""Pairs and triplets: every anchor finds its own among the batch's candidates, at every dim."""

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
