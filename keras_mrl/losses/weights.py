"""The c_m of a nested loss: given, computed, or drawn anew for every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from .._dims import check_weights

Weights: TypeAlias = Sequence[float] | Callable[[int], Sequence[float]] | None


@keras.saving.register_keras_serializable(package="keras_mrl")
def first_boosted(num_dims: int, boost: float = 2.0) -> tuple[float, ...]:
    """The preset of the paper's ablation: the first dim counts more, all others 1.

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


def stored(weights: Weights) -> tuple[float, ...] | Callable[[int], Sequence[float]] | None:
    """Return `weights` as a loss keeps them: a checked tuple, the callable, or None."""
    return weights if weights is None or callable(weights) else check_weights(weights, len(weights))


def resolve(weights: Weights, num_dims: int) -> tuple[float, ...]:
    """Return one number per dim."""
    return check_weights(weights(num_dims) if callable(weights) else weights, num_dims)


def check_dims_per_step(dims_per_step: int | None) -> int | None:
    """Return `dims_per_step` if it is None or a positive integer; raise otherwise."""
    is_integer = hasattr(dims_per_step, "__index__") and not isinstance(dims_per_step, bool)
    if dims_per_step is not None and (not is_integer or dims_per_step < 1):
        raise ValueError(
            "dims_per_step must be a positive integer. "
            f"Received: dims_per_step={dims_per_step!r}. "
            "Count the dims that a step trains, the widest included, or give None for all."
        )
    return None if dims_per_step is None else int(dims_per_step)


def draw(weights: tuple[float, ...], dims_per_step: int, seed: Any) -> Any:
    """Return `(num_dims,)` weights, all but `dims_per_step` of them set to zero.

    The widest dim of positive weight is always among those that stay; the others are drawn with
    equal chances from the dims of positive weight. Shapes never change, so a compiled step stays
    compiled.

    Raises:
        ValueError: If there are fewer dims of positive weight than `dims_per_step`.
    """
    counted = np.flatnonzero(weights)
    if len(counted) < dims_per_step:
        raise ValueError(
            "dims_per_step must not exceed the number of dims. "
            f"Received: dims_per_step={dims_per_step} for {len(counted)} dims of positive weight. "
            "Lower it, or leave it out to train all dims in every step."
        )
    order = np.full(len(weights), 2.0, "float32")  # a dim of weight 0 comes after all others
    order[counted] = 0.0
    order[counted[-1]] = -2.0  # and the widest before them
    drawn = keras.random.uniform((len(weights),), seed=seed) + ops.convert_to_tensor(order)
    ranks = ops.argsort(ops.argsort(drawn))
    return ops.where(ranks < dims_per_step, ops.convert_to_tensor(weights, "float32"), 0.0)


def trained(weights: Weights, dims: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the dims of positive weight and their weights: the others are as if absent."""
    pairs = zip(dims, resolve(weights, len(dims)), strict=True)
    kept = [(dim, weight) for dim, weight in pairs if weight]
    return tuple(dim for dim, _ in kept), tuple(weight for _, weight in kept)


def of_step(weights: tuple[float, ...], dims_per_step: int | None, seed: Any) -> Any:
    """Return `weights`, or what a training step with `seed` draws of them."""
    if dims_per_step is None or seed is None:
        return weights
    return draw(weights, dims_per_step, seed)


def is_nested(loss: Any) -> bool:
    """Whether `loss` is one of the nested losses of this package."""
    return hasattr(loss, "dims_per_step")


def named(loss: Any) -> str:
    """Return how an error calls a loss that does not fit."""
    return type(loss).__name__ if isinstance(loss, keras.losses.Loss) else repr(loss)


def no_seed(loss: Any) -> ValueError:
    """What a loss with `dims_per_step` says where nobody draws for it."""
    return ValueError(
        "dims_per_step draws dims from a seed that the model carries from step to step. "
        f"Received: {type(loss).__name__} with dims_per_step={loss.dims_per_step}, called alone or "
        "by a model that carries none. Train a MatryoshkaClassifier (of a functional model: "
        "MatryoshkaClassifier(*split(model))) or a MatryoshkaEncoder, or leave dims_per_step out."
    )


def step_loss(rows: Callable[[Any, Any], Any], like: keras.losses.Loss) -> keras.losses.Loss:
    """Return a loss with the values `rows(y_true, y_pred)`, reduced and named as `like`."""
    return _StepLoss(rows, like)


class _StepLoss(keras.losses.Loss):
    def __init__(self, rows: Callable[[Any, Any], Any], like: keras.losses.Loss) -> None:
        super().__init__(name=like.name, reduction=like.reduction, dtype=like.dtype)
        self.rows = rows

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self.rows(y_true, y_pred)
