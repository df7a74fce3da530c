"""What every dim is worth: one number per measure and dim, as a manifest carries it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mrl_serving.confidence import max_probability

from .._dims import check_dims
from .._features import Array, check_features, check_labels_of
from ..models.cut import split
from .calibration import calibration_error
from .neighbors import check_gallery, nearest_ids
from .probe import linear_probe
from .retrieval import mean_average_precision_at_k, precision_at_k

Quality = dict[int, dict[str, float]]

_ROWS = 4096  # whose logits are made at a time


def evaluate(
    model: keras.Model,
    inputs: Any,
    labels: Any,
    gallery: tuple[Any, Any] | None = None,
    dims: Sequence[int] | None = None,
    k: int = 10,
    probe: bool = False,
    batch_size: int = 256,
    verbose: int = 1,
) -> Quality:
    """Return what every dim of a model is worth on labelled rows, from one pass of each.

    With a head: `top1`, `top5` and `ece` (expected calibration error). With a gallery: `nn1`
    (1-NN accuracy), `knn` (the vote of the k nearest), `p10` and `map10` (both definitions of
    precision at k) and `recall10` (the share of the full dim's k nearest that are found). With
    `probe`: `probe`, the accuracy of a linear classifier newly trained on the gallery's features.
    The result is what `export_saved_model(quality=...)` takes.

    Args:
        model: A model that ends in a `MatryoshkaHead`, or whose output is the embedding.
        inputs: The rows to judge on, as `model.predict` takes them.
        labels: Their class ids, `(rows,)`.
        gallery: Inputs and labels `(x, y)` of other rows, to look for neighbours among.
        dims: None means those of the head.
        k: How many neighbours; the names say so: `p10`, `map10`, `recall10`.
        probe: Whether linear classifiers are trained; scikit-learn takes minutes for 100 classes.
        batch_size: Of the pass.
        verbose: 1 shows progress, 0 does not.

    Raises:
        ValueError: If inputs and labels do not fit, a dim cannot be measured, or the gallery has
            fewer than k rows.
        ImportError: If `probe` is asked for and scikit-learn is not installed.

    Examples:
        >>> backbone = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(3, dims=(4, 16)))
        >>> x, y = np.random.default_rng(0).normal(size=(40, 20)), np.arange(40) % 3
        >>> quality = evaluate(model, x[:10], y[:10], gallery=(x[10:], y[10:]), k=5, verbose=0)
        >>> list(quality), list(quality[4])
        ([4, 16], ['top1', 'top5', 'ece', 'nn1', 'knn', 'p5', 'map5', 'recall5'])
    """
    backbone, head = split(model)
    if dims is None and head is None:
        raise ValueError(
            "evaluate needs dims for a model that ends in no MatryoshkaHead. "
            f"Received: dims=None for {type(model).__name__} {model.name!r}. "
            "Give the prefix lengths to judge: dims=(8, 16, 32)."
        )
    if head is None and gallery is None:
        raise ValueError(
            "Without a head dims are judged by their neighbours. "
            f"Received: gallery=None for {type(model).__name__} {model.name!r}. "
            "Give gallery=(x, y), rows of training for example."
        )
    body = backbone if hasattr(backbone, "predict") else keras.Sequential([backbone])

    def embed(rows: Any) -> Array:
        found = body.predict(rows, batch_size=batch_size, verbose=verbose)
        return np.asarray(keras.ops.convert_to_numpy(found), np.float32)

    features = embed(inputs)
    if head is not None and not head.built:
        head.build(features.shape)
    known = () if head is None else head.dims or ()
    chosen = check_dims(known if dims is None else dims)
    bare = [dim for dim in chosen if dim not in known]
    if bare and gallery is None:
        raise ValueError(
            f"Without a gallery dims are judged by the head, which has {known}. "
            f"Received: dims={chosen}. Give those of the head, or gallery=(x, y)."
        )
    quality: Quality = {dim: {} for dim in chosen}
    if head is not None:
        for dim in [dim for dim in chosen if dim in known]:
            quality[dim] |= score_head(features, labels, *_weights(head, dim))
    if gallery is not None:
        shown = embed(gallery[0])
        found = score_embeddings(features, labels, shown, gallery[1], chosen, k, verbose)
        for dim in chosen:
            quality[dim] |= found[dim]
            if probe:
                fitted = linear_probe(shown[:, :dim], gallery[1])
                right = fitted.predict(features[:, :dim]) == np.asarray(labels)
                quality[dim]["probe"] = float(right.mean())
    return quality


def _check_classes(labels: Array, num_classes: int) -> Array:
    """Refuse labels that name no logit of a head."""
    integers = labels.dtype.kind in "iu"
    if not integers or labels.min() < 0 or labels.max() >= num_classes:
        seen = f" from {labels.min()} to {labels.max()}" if integers else ""
        raise ValueError(
            f"labels must be class ids in 0..{num_classes - 1}. "
            f"Received: {labels.dtype} labels{seen}. Number the classes from 0, as in training."
        )
    return labels


def score_head(features: Any, labels: Any, kernel: Any, bias: Any) -> dict[str, float]:
    """Return `top1`, `top5` and `ece` of a linear head on the first coordinates of features.

    Args:
        features: `(rows, width)`.
        labels: Class ids, `(rows,)`.
        kernel: `(dim, num_classes)`.
        bias: `(num_classes,)`, or None.

    Raises:
        ValueError: If features and labels do not fit, or a label names no class.

    Examples:
        >>> features, kernel = [[9.0, 0.0, 5.0], [0.0, 9.0, 5.0]], np.eye(2)
        >>> score_head(features, [0, 0], kernel, None)["top1"]
        0.5
    """
    weights = np.asarray(kernel, np.float32)
    table = check_features(features, len(weights))
    truth = _check_classes(check_labels_of(table, labels), weights.shape[1])
    right, ahead, sure = [], [], []
    for start in range(0, len(table), _ROWS):
        part = slice(start, start + _ROWS)
        logits = table[part, : len(weights)] @ weights + (0 if bias is None else np.asarray(bias))
        of = truth[part]
        ahead.append((logits > np.take_along_axis(logits, of[:, None], axis=1)).sum(axis=1))
        right.append(logits.argmax(axis=1) == of)
        sure.append(max_probability(logits))
    best = np.concatenate(right)
    return {
        "top1": float(best.mean()),
        "top5": float((np.concatenate(ahead) < 5).mean()),
        "ece": calibration_error(np.concatenate(sure), best),
    }


def score_embeddings(
    queries: Any,
    query_labels: Any,
    gallery: Any,
    gallery_labels: Any,
    dims: Sequence[int],
    k: int = 10,
    verbose: int = 0,
) -> Quality:
    """Return what the neighbours at every dim are worth: see `evaluate`.

    Args:
        queries: Embeddings `(queries, width)`, none of them in the gallery.
        query_labels: `(queries,)`.
        gallery: Embeddings `(rows, width)`, at least k.
        gallery_labels: `(rows,)`.
        dims: Prefix lengths; recall is that of the widest.
        k: How many neighbours.
        verbose: 1 shows progress, 0 does not.

    Raises:
        ValueError: If embeddings and labels do not fit, or the gallery has fewer than k rows.

    Examples:
        >>> gallery = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [0.2, 1.0]]
        >>> scores = score_embeddings([[2.0, 0.0]], [7], gallery, [8, 7, 7, 8], dims=(1, 2), k=2)
        >>> scores[2]
        {'nn1': 1.0, 'knn': 1.0, 'p2': 1.0, 'map2': 1.0, 'recall2': 1.0}
    """
    ladder = check_dims(dims)
    asked, rows = check_features(queries, ladder[-1]), check_features(gallery, ladder[-1])
    wanted, labels = check_labels_of(asked, query_labels), check_labels_of(rows, gallery_labels)
    check_gallery(len(rows), k)
    shown = keras.utils.Progbar(len(ladder), unit_name="dim") if verbose else None
    exact = nearest_ids(rows, asked, ladder[-1], k)
    scores: Quality = {}
    for dim in ladder:
        ids = exact if dim == ladder[-1] else nearest_ids(rows, asked, dim, k)
        named = labels[ids]
        hits = named == wanted[:, None]
        found = [len(np.intersect1d(a, b)) for a, b in zip(ids, exact, strict=True)]
        scores[dim] = {
            "nn1": float(hits[:, 0].mean()),
            "knn": float((_vote(named) == wanted).mean()),
            f"p{k}": precision_at_k(hits),
            f"map{k}": mean_average_precision_at_k(hits),
            f"recall{k}": float(np.mean(found) / k),
        }
        if shown is not None:
            shown.add(1)
    return scores


def _vote(named: Array) -> Array:
    """The most frequent label of each row; of equal ones the smallest."""
    classes, numbers = np.unique(named, return_inverse=True)
    numbers = numbers.reshape(named.shape)
    votes = np.zeros((len(named), len(classes)), np.int32)
    for column in numbers.T:
        votes[np.arange(len(named)), column] += 1
    return np.asarray(classes[votes.argmax(axis=1)])


def _weights(head: Any, dim: int) -> tuple[Any, Any]:
    kernel, bias = head.weights_at(dim)
    numpy = keras.ops.convert_to_numpy
    return numpy(kernel), None if bias is None else numpy(bias)
