"""How far the similarities of a batch are from those that a teacher gives its rows.

For every anchor the teacher's cosines to the candidates, over the temperature, make a softmax, and
so do those of every dim. The divergence of the two is their cross-entropy less that of the
teacher's softmax with itself. Both come from `NestedRows`, so a `chunk_size` bounds their memory.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from .similarity import TINY, NestedRows, Task


def similarity_divergences(
    anchors: Any,
    candidates: Any,
    taught_anchors: Any,
    taught_candidates: Any,
    dims: tuple[int, ...],
    scale: Any,
    chunk_size: int | None = None,
    is_one_set: bool = False,
) -> Any:
    """Return the divergence of every anchor at every dim.

    Args:
        anchors: Embeddings.
        candidates: Embeddings that the anchors are compared with.
        taught_anchors: The teacher's embeddings of the anchors. No gradient reaches them.
        taught_candidates: The teacher's embeddings of the candidates.
        dims: Strictly increasing prefix lengths; the teacher is read at the widest.
        scale: One over the temperature. No gradient reaches it.
        chunk_size: Anchors at a time; None for all.
        is_one_set: Whether the candidates are the anchors: none is compared with itself.

    Shapes:
        anchors: `(rows, width)`. candidates: `(candidates, width)`. Result: `(num_dims, rows)`.

    Formula:
        KL(softmax_j(cos(t_i, t_j) / T) || softmax_j(cos(a_i[1:m], b_j[1:m]) / T))

    Examples:
        >>> from keras_mrl.losses.distillation import similarity_divergences
        >>> x = keras.ops.convert_to_tensor(np.eye(4, dtype="float32"))
        >>> tuple(similarity_divergences(x, x, x, x, (2, 4), 1.0).shape)
        (2, 4)
        >>> bool(keras.ops.max(similarity_divergences(x, x, x, x, (4,), 1.0)) < 1e-6)
        True
    """
    width, scale = dims[-1], ops.stop_gradient(ops.convert_to_tensor(scale, "float32"))
    taught, others = (
        ops.stop_gradient(own[:, :width]) for own in (taught_anchors, taught_candidates)
    )
    directions, other_directions = _directions(taught), _directions(others)

    def compared(numbers: Any) -> Any:
        all_numbers = ops.arange(ops.shape(others)[0], dtype="int32")
        return ops.not_equal(ops.expand_dims(numbers, 1), all_numbers)

    def targets(numbers: Any) -> Any:
        rows = ops.take(directions, ops.minimum(numbers, ops.shape(directions)[0] - 1), axis=0)
        logits = ops.matmul(rows, ops.transpose(other_directions)) * scale
        return ops.softmax(ops.where(compared(numbers), logits, -1e30) if is_one_set else logits)

    task = Task(targets, compared if is_one_set else None)
    crossed, _ = NestedRows(dims, task, chunk_size)(anchors, candidates, scale)
    entropy, _ = NestedRows((width,), task, chunk_size)(taught, others, scale)
    return crossed - ops.stop_gradient(entropy)


def _directions(vectors: Any) -> Any:
    """Return vectors of unit length; zeros for those of no direction."""
    square = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    root = ops.rsqrt(ops.maximum(square, TINY))
    return vectors * ops.where(square > TINY, root, ops.zeros_like(root))


def check_distillation(distillation: Any) -> None:
    """Raise unless the weight of a divergence is a number of at least 0.

    Examples:
        >>> from keras_mrl.losses.distillation import check_distillation
        >>> check_distillation(0.5)
    """
    is_number = isinstance(distillation, (int, float)) and not isinstance(distillation, bool)
    if not is_number or not 0 <= distillation < float("inf"):
        raise ValueError(
            "distillation must be a number of at least 0. "
            f"Received: distillation={distillation!r}. Give for example 1.0, or 0 for none."
        )
