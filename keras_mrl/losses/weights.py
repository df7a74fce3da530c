"""The base of the nested losses, and their weights c_m: fixed, or drawn for every step.

A dim that a step leaves out has weight zero; shapes do not change, so a compiled step stays
compiled. That saves no time: drawing dims is a regularizer.

The seed to draw from belongs to the model. A loss has no state, and a seed inside it would stand
still on JAX, whose compiled steps update the model's variables alone. So `MatryoshkaClassifier` and
`MatryoshkaEncoder` own a seed generator, started alike in every process so that all replicas draw
the same dims, and pass it to their loss in training. Evaluation counts all dims. A loss with
`dims_per_step` that is called without a model raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_mrl_serving.integers import check_positive_integer

from .._dims import check_weights

Weights: TypeAlias = Sequence[float] | Callable[[int], Sequence[float]] | None


@keras.saving.register_keras_serializable(package="keras_mrl")
def first_boosted(num_dims: int, boost: float = 2.0) -> tuple[float, ...]:
    """Return the weights of the paper's ablation: the first dim counts more, all others 1.

    Give it to a nested loss as it is, `weights=first_boosted`. In the paper it gains about 3
    points at 8 dims and costs at most 0.1 at the wide end.

    Args:
        num_dims: Number of dims.
        boost: The c_m of the first dim.

    Returns:
        One weight per dim.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147, ablations.

    Examples:
        >>> first_boosted(4)
        (2.0, 1.0, 1.0, 1.0)
    """
    return (float(boost), *(1.0,) * (num_dims - 1))


class _WeightedRows(keras.losses.Loss):
    """The base of losses in which the weight of a row may be one for all its positions."""

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Return the reduced loss, as Keras does; of sequences, too, by weights `(batch,)`."""
        return super().__call__(y_true, y_pred, with_positions(sample_weight, y_pred))


def with_positions(sample_weight: Any, outputs: Any) -> Any:
    """Return weights with an axis for every axis of the losses of nested outputs.

    Args:
        sample_weight: `(batch,)`, or one for every position; None for none.
        outputs: `(batch, ..., num_dims, num_outputs)`.

    Examples:
        >>> from keras_mrl.losses.weights import with_positions
        >>> tuple(with_positions(np.ones(2), np.zeros((2, 7, 3, 5))).shape)
        (2, 1)
    """
    if sample_weight is None:
        return None
    weights = ops.convert_to_tensor(sample_weight)
    is_unknown = getattr(weights.shape, "rank", 0) is None  # of a tf.data.Dataset
    missing = 0 if is_unknown else len(outputs.shape) - 2 - len(weights.shape)
    for _ in range(missing):
        weights = ops.expand_dims(weights, -1)
    return weights


class _NestedLoss(_WeightedRows):
    """The base of the nested losses: weights of dims, and how many dims a training step counts."""

    def __init__(self, weights: Weights, dims_per_step: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if weights is not None and not callable(weights):
            weights = check_weights(weights, len(weights))
        if dims_per_step is not None:
            remedy = "Count the dims that a step trains, the widest included, or give None for all."
            dims_per_step = check_positive_integer("dims_per_step", dims_per_step, remedy)
        self.weights = weights
        self.dims_per_step = dims_per_step

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the weighted sum over dims, one value per row."""
        if self.dims_per_step is not None:
            raise ValueError(
                "dims_per_step draws dims from a seed that the model carries from step to step. "
                f"Received: {type(self).__name__} with dims_per_step={self.dims_per_step}, called "
                "alone or by a model that carries none. Train a MatryoshkaClassifier (of a "
                "functional model: MatryoshkaClassifier(*split(model))) or a MatryoshkaEncoder, or "
                "leave dims_per_step out."
            )
        return self.rows(y_true, y_pred)

    def rows(self, y_true: Any, y_pred: Any, seed: Any = None) -> Any:
        """Return the weighted sum over the dims of one step, one value per row.

        Args:
            y_true: As for the loss.
            y_pred: As for the loss.
            seed: In a training step, the `keras.random.SeedGenerator` of the model.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {
            **super().get_config(),
            "weights": keras.saving.serialize_keras_object(self.weights),
            "dims_per_step": self.dims_per_step,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make the loss again."""
        weights = keras.saving.deserialize_keras_object(config["weights"])
        return cls(**{**config, "weights": weights})


def weights_by_dim(weights: Weights, num_dims: int) -> tuple[float, ...]:
    """Return one checked number per dim."""
    return check_weights(weights(num_dims) if callable(weights) else weights, num_dims)


def positive_weights(
    weights: Weights, dims: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the dims of positive weight, and their weights."""
    pairs = zip(dims, weights_by_dim(weights, len(dims)), strict=True)
    positive = [(dim, weight) for dim, weight in pairs if weight]
    return tuple(dim for dim, _ in positive), tuple(weight for _, weight in positive)


def step_weights(weights: tuple[float, ...], dims_per_step: int | None, seed: Any) -> Any:
    """Return the weights of one step: `weights`, or with `dims_per_step` and a `seed` a draw.

    A draw is a float32 tensor `(num_dims,)`, zero but for `dims_per_step` of the dims. The widest
    dim of positive weight is always among these; the others are drawn with equal chances.

    Raises:
        ValueError: If fewer than `dims_per_step` dims have a positive weight.
    """
    if dims_per_step is None or seed is None:
        return weights
    counted = np.flatnonzero(weights)
    if len(counted) < dims_per_step:
        raise ValueError(
            "dims_per_step must not exceed the number of dims. "
            f"Received: dims_per_step={dims_per_step} for {len(counted)} dims of positive weight. "
            "Lower it, or leave it out to train all dims in every step."
        )
    # The dims of the lowest keys are drawn: the widest first, then at random, weight zero last.
    offsets = np.full(len(weights), 2.0, "float32")
    offsets[counted] = 0.0
    offsets[counted[-1]] = -2.0
    keys = keras.random.uniform((len(weights),), seed=seed) + ops.convert_to_tensor(offsets)
    ranks = ops.argsort(ops.argsort(keys))
    return ops.where(ranks < dims_per_step, ops.convert_to_tensor(weights, "float32"), 0.0)


def name_in_error(loss: Any) -> str:
    """Return the class of a Keras loss, or the `repr` of anything else."""
    return type(loss).__name__ if isinstance(loss, keras.losses.Loss) else repr(loss)


class _RowLoss(_WeightedRows):
    """A loss of the values `rows(y_true, y_pred)`, reduced and named as `like`."""

    def __init__(self, rows: Callable[[Any, Any], Any], like: keras.losses.Loss) -> None:
        super().__init__(name=like.name, reduction=like.reduction, dtype=like.dtype)
        self.rows = rows

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return one value per row."""
        return self.rows(y_true, y_pred)
