"""The prefix of an embedding in NumPy, as `embed_<m>` and `keras_mrl.Truncate` compute it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .inputs import as_float32
from .integers import check_dims

# A vector whose squared length is below this counts as zero, in the layer and exported graph too.
MIN_SQUARE = np.float32(1e-12)


def truncate(x: npt.ArrayLike, dim: int) -> npt.NDArray[np.float32]:
    """Return the first `dim` coordinates of embeddings, *then* scaled to unit length.

    The prefix of a unit vector is not a unit vector, so the scaling comes last. An all-zero prefix
    stays zero.

    Args:
        x: Embeddings, raw or scaled.
        dim: Number of coordinates to keep.

    Shapes:
        x: `(..., width)`. Returns float32 `(..., dim)`.

    Raises:
        ValueError: If `dim` is not a positive integer or exceeds the width of `x`, or `x` is not an
            array of real numbers, finite with finite squared lengths.

    Examples:
        >>> truncate([[3.0, 4.0, 12.0]], 2).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    check_dims((dim,))
    embeddings = as_float32("Embeddings", x)
    if embeddings.ndim == 0 or embeddings.shape[-1] < dim:
        raise ValueError(
            "dim must not exceed the width of the embeddings. "
            f"Received: dim={dim} for embeddings of shape {embeddings.shape}. "
            "Ask for fewer coordinates, or embed at a wider dim."
        )
    prefix = embeddings[..., :dim]
    check_finite("Embeddings", prefix)
    return prefix * inverse_length(np.sum(np.square(prefix), axis=-1, keepdims=True))


def inverse_length(square: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return one over the length of vectors whose squared lengths are `square`.

    Examples:
        >>> inverse_length(np.float32([4.0, 0.0])).tolist()
        [0.5, 1000000.0]
    """
    return 1 / np.sqrt(np.maximum(square, MIN_SQUARE))


def check_finite(name: str, embeddings: npt.NDArray[np.float32]) -> None:
    """Raise a `ValueError` unless embeddings and their squared lengths are finite.

    Args:
        name: Name of the embeddings, for the error.
        embeddings: `(..., width)`.

    Examples:
        >>> check_finite("Embeddings", np.float32([[3.0, 4.0]]))
    """
    with np.errstate(over="ignore"):
        # One sum is faster. It may be infinite and no row be.
        if np.isfinite(np.vdot(embeddings, embeddings)):
            return
        squares = np.einsum("...d,...d->...", embeddings, embeddings)
    if not np.isfinite(squares).all():
        raise ValueError(
            f"{name} must be finite, and so must the squares of their lengths in float32. "
            "Received: NaN, infinity, or rows longer than 1e19. "
            "Look for failed rows where the embeddings were made."
        )
