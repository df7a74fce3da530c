"""The checks of dims and weights, and the default ladder of dims."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from keras_mrl_serving.integers import check_dims as check_dims


def log_spaced_dims(width: int, smallest: int = 8) -> tuple[int, ...]:
    """Return the paper's ladder of dims: `smallest`, doubled until `width`, which ends it.

    Args:
        width: Width of the full representation, d.
        smallest: First dim; a `width` at or below it gives a ladder of one.

    Returns:
        Strictly increasing dims, the last one `width`.

    Raises:
        ValueError: If `width` or `smallest` is not a positive integer.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 3: log spacing beats uniform.

    Examples:
        >>> log_spaced_dims(64)
        (8, 16, 32, 64)
        >>> log_spaced_dims(100, smallest=16)
        (16, 32, 64, 100)
    """
    (width,) = check_dims((width,))
    (dim,) = check_dims((smallest,))
    dims = []
    while dim < width:
        dims.append(dim)
        dim *= 2
    return (*dims, width)


def check_width(dims: tuple[int, ...], width: int) -> None:
    """Raise a `ValueError` if the widest of `dims` exceeds features of `width`."""
    if dims[-1] > width:
        raise ValueError(
            "dims must not exceed the width of the features. "
            f"Received: dims={dims} for features of width {width}. "
            f"Drop the dims above {width}, or widen the layer that makes the features."
        )


def blocks(dims: Sequence[int]) -> list[tuple[int, int]]:
    """Return the coordinates that each dim adds to the next narrower one, as (start, stop).

    Examples:
        >>> from keras_mrl._dims import blocks
        >>> blocks((2, 4, 8))
        [(0, 2), (2, 4), (4, 8)]
    """
    return list(zip((0, *dims[:-1]), dims, strict=True))


def warn_long_ladder(dims: tuple[int, ...], width: int) -> None:
    """Warn if there are more `dims` than the paper's floor(log2 width): each costs, few gain."""
    longest = max(1, width.bit_length() - 1)
    if len(dims) > longest:
        warnings.warn(
            f"Features of width {width} should have at most floor(log2 {width}) = {longest} dims. "
            f"Received: {len(dims)} dims {dims}. "
            "Drop some: dims between two that were trained are nearly as good as trained ones.",
            UserWarning,
            stacklevel=3,
        )


def check_weights(weights: Sequence[float] | None, num_dims: int) -> tuple[float, ...]:
    """Return the c_m of a nested loss, one per dim; None stands for ones.

    Raises:
        ValueError: If a weight is negative or not finite, none is positive, or their number is
            not `num_dims`.
    """
    if weights is None:
        return (1.0,) * num_dims
    checked = tuple(float(weight) for weight in weights)
    if len(checked) != num_dims:
        raise ValueError(
            "weights must hold one number per dim. "
            f"Received: {len(checked)} weights {checked} for {num_dims} dims. "
            "Give as many weights as the head has dims, or weights=None for ones."
        )
    if not all(math.isfinite(w) and w >= 0 for w in checked) or not any(checked):
        raise ValueError(
            "weights must be finite, not negative, and not all zero. "
            f"Received: weights={checked}. "
            "Give a dim weight 0 to leave it out, a larger one to favour it."
        )
    return checked
