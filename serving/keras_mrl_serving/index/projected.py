"""First stages that look at a projection, as parts of the FAISS index that they are saved in.

The shortlist is compared by the embeddings as they are. So what a projection loses costs a longer
shortlist, and no neighbour; and a query is projected inside the one call that answers it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..projection import Projection
from .base import Vectors

PROJECTED = "Projected"

_FACTORY = re.compile(f"{PROJECTED}([0-9]+),(.+)")


def projected_parts(factory: str) -> tuple[int, str] | None:
    """Return the dim of a projection, and the FAISS index over it; None of other factories.

    Examples:
        >>> projected_parts("Projected96,HNSW32_SQ8"), projected_parts("HNSW32")
        ((96, 'HNSW32_SQ8'), None)
    """
    match = _FACTORY.fullmatch(factory)
    return None if match is None else (int(match[1]), match[2])


def check_components(projection: Projection | None, factory: str, dim: int, number: int) -> Vectors:
    """Return the first directions of a projection.

    Args:
        projection: Of embeddings as wide as the first stage.
        factory: Of the first stage, for the error.
        dim: Dim of the first stage.
        number: How many directions.

    Shapes:
        Returns float32 `(number, dim)`.

    Raises:
        ValueError: If there is none, or it is of another width, or has fewer directions.

    Examples:
        >>> check_components(Projection(np.eye(4), (2,)), "Projected2,Flat", 4, 2).shape
        (2, 4)
    """
    if projection is None or projection.width != dim or len(projection.components) < number:
        received = "none" if projection is None else f"one of shape {projection.components.shape}"
        raise ValueError(
            "A projected first stage looks at a projection of embeddings of its dim. "
            f"Received: {received} for {factory!r} over dim {dim}. "
            f"Write FirstStage({factory!r}, projection=projection)."
        )
    components: Vectors = np.ascontiguousarray(projection.components[:number], np.float32)
    return components


def projected_index(faiss: Any, inner: Any, components: Vectors, *, is_scaled: bool) -> Any:
    """Return a FAISS index that projects what it is given, and hands it to another.

    Args:
        faiss: The module.
        inner: The other, which the result owns from here on.
        components: The directions.
        is_scaled: Whether projected rows are scaled to unit length.

    Examples:
        >>> import faiss
        >>> index = projected_index(faiss, faiss.IndexFlatIP(2), np.eye(2, 4), is_scaled=True)
        >>> index.add(np.float32([[3, 4, 7, 7]]))
        >>> index.reconstruct(0).round(3).tolist()[:2]
        [0.6000000238418579, 0.800000011920929]
    """
    number, dim = components.shape
    turn = faiss.LinearTransform(dim, number, False)
    faiss.copy_array_to_vector(np.asarray(components, np.float32).ravel(), turn.A)
    turn.is_trained = True
    turn.set_is_orthonormal()
    index = faiss.IndexPreTransform(inner)
    for transform in (*([faiss.NormalizationTransform(number)] if is_scaled else []), turn):
        index.prepend_transform(transform)
        transform.this.disown()
    inner.this.disown()
    index.own_fields = True
    return index
