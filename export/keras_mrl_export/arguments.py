"""What may be given to an export, and the form in which it travels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keras_mrl import log_spaced_dims
from keras_mrl._dims import check_weights
from keras_mrl_serving.cascade import CascadePolicy
from keras_mrl_serving.contract import check_dims
from keras_mrl_serving.index import ExactIndex


def check_top_k(top_k: int) -> None:
    """Raise `ValueError` unless `top_k` is a positive integer."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(
            f"top_k must be an integer of at least 1. Received: top_k={top_k!r}. "
            "Give for example 5."
        )


def check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    """Raise `ValueError` unless warm-up batch sizes are positive integers."""
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batch_sizes):
        raise ValueError(
            "warmup_batch_sizes must be positive integers. "
            f"Received: {tuple(batch_sizes)}. Give for example (1, 32), or () for no warm-up."
        )


def served_dims(
    asked: Sequence[int] | None, trained: tuple[int, ...] | None, width: int
) -> tuple[int, ...]:
    """The dims to export: those asked for, or all that the head has, or log-spaced ones."""
    known = trained or log_spaced_dims(width)
    if asked is None:
        return known
    chosen = check_dims(sorted(set(asked)))
    if any(d not in known if trained else d > width for d in chosen):
        raise ValueError(
            f"dims must be dims of the model: {known if trained else f'1..{width}'}. "
            f"Received: dims={tuple(asked)}. Leave dims out to export all of them."
        )
    return chosen


def quality_by_dim(
    quality: Mapping[int, Mapping[str, float]], dims: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """Quality as JSON: measures come as NumPy scalars, or as a backend's own."""
    known = {
        int(dim): {measure: float(value) for measure, value in measures.items()}
        for dim, measures in quality.items()
    }
    finite = all(math.isfinite(value) for measures in known.values() for value in measures.values())
    if not finite or not set(known) <= set(dims):
        raise ValueError(
            f"quality must give finite numbers for exported dims: {dims}. "
            f"Received: quality={known}. Leave out what was not measured."
        )
    return {str(dim): known[dim] for dim in sorted(known)}


def weights_of(weights: Sequence[float], dims: tuple[int, ...], head: Any) -> tuple[float, ...]:
    """The c_m of the exported dims, from those of all dims."""
    trained = dims if head is None else head.dims
    by_dim = dict(zip(trained, check_weights(weights, len(trained)), strict=True))
    return tuple(by_dim[dim] for dim in dims)


def check_index(index: ExactIndex, dims: tuple[int, ...], normalize: bool) -> None:
    """Raise unless `index` is a gallery of embeddings as the model's are served."""
    if not isinstance(index, ExactIndex):
        raise TypeError(
            "A gallery in the graph has an exact first stage, as ExactIndex has. "
            f"Received: {type(index).__name__}. "
            "Build one of the same embeddings: ExactIndex.build(gallery, schedule, ids)."
        )
    if index.width != dims[-1]:
        raise ValueError(
            "An index that is exported with a model is as wide as the model's last dim. "
            f"Received: an index of width {index.width} for dims={dims}. "
            "Give dims= up to its width, or build it at the last dim."
        )
    if normalize and index.metric != "cosine":
        raise ValueError(
            "Embeddings of unit length are compared by cosine: their prefixes have other lengths. "
            f"Received: an index with metric={index.metric!r} and normalize=True. "
            "Give normalize=False, or build the index with cosine."
        )


def check_head_arguments(
    num_classes: int | None,
    dims: tuple[int, ...],
    policy: CascadePolicy | None,
    labels: Sequence[str] | None,
) -> None:
    """Raise `ValueError` unless the policy and the labels fit the model's head."""
    if num_classes is None and (policy is not None or labels is not None):
        raise ValueError(
            "policy and labels belong to a model with a head. "
            "Received: a model that does not end in a MatryoshkaHead. "
            "Leave them out, or export a MatryoshkaClassifier."
        )
    if policy is not None and not set(policy.dims) <= set(dims):
        raise ValueError(
            "The policy's dims must be exported dims. "
            f"Received: a policy over {policy.dims} for dims={dims}. Learn it on these dims."
        )
    if labels is not None and (
        len(labels) != num_classes or not all(_is_class_name(label) for label in labels)
    ):
        raise ValueError(
            f"labels must name each of the {num_classes} classes on one line. "
            f"Received: {len(labels)} labels {list(labels[:5])}. "
            "Give one non-empty string per class id, without line breaks or outer blanks."
        )


def _is_class_name(label: object) -> bool:
    return isinstance(label, str) and label == label.strip() != "" and "\n" not in label
