"""The best classes of a large vocabulary without scoring all of it at the full width."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_mrl_serving.funnel import FunnelSchedule

from ..layers import MatryoshkaHead


def funnel_top_k(head: MatryoshkaHead, features: Any, schedule: FunnelSchedule) -> tuple[Any, Any]:
    """Return the best classes of each row: shortlisted by few dims, reranked by more.

    Every class is scored at the first dim of the schedule, by that dim's own kernel; the best are
    scored anew at the next dim, and so on. Where the shortlist is every class, the answer is that
    of the last dim alone.

    Args:
        head: A built head; its classes are the gallery.
        features: What the head reads; raw, not scaled.
        schedule: Dims of the head, shortlists, and k.

    Shapes:
        features: `(rows, width)`. Result: ids int32 and logits, both `(rows, k)`, best first.
        A shortlist of s classes reads `rows * s * dim` numbers: give long texts in parts.

    Raises:
        ValueError: If the schedule names other dims or more classes than the head has.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.3.1, over a vocabulary.

    Examples:
        >>> from keras_mrl_serving import FunnelSchedule
        >>> head = MatryoshkaHead(1000, dims=(4, 16), tied=True)
        >>> features = keras.random.normal((2, 16), seed=0)
        >>> logits = head(features)[:, -1]
        >>> ids, _ = funnel_top_k(head, features, FunnelSchedule((4, 16), (1000,), k=3))
        >>> bool(keras.ops.all(ids == keras.ops.top_k(logits, 3)[1]))
        True
    """
    first, *others = schedule.dims
    sizes = (*schedule.shortlists, schedule.k)
    if sizes[0] > head.num_classes:
        raise ValueError(
            "A shortlist must not hold more classes than there are. "
            f"Received: {sizes[0]} of {head.num_classes} classes. "
            f"Shorten it to at most {head.num_classes}."
        )
    scores, best = ops.top_k(head.logits_at(features[..., :first], first), sizes[0])
    ids = ops.cast(best, "int32")
    for dim, size in zip(others, sizes[1:], strict=True):
        kernel, bias = head.weights_at(dim)
        rows = ops.take(ops.transpose(kernel), ids, axis=0)
        logits = ops.squeeze(ops.matmul(rows, features[..., :dim, None]), axis=-1)
        if bias is not None:
            logits = logits + ops.take(bias, ids, axis=0)
        scores, best = ops.top_k(logits, size)
        ids = ops.take_along_axis(ids, ops.cast(best, "int32"), axis=-1)
    return ids, scores
