"""The quality of every dim of a model: one number per measure and dim, as in a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mrl_serving.cascade.confidence import max_probability, softmax
from keras_mrl_serving.inputs import as_float32, check_class_ids, check_holdout
from keras_mrl_serving.integers import check_positive_integer

from .._arrays import (
    Array,
    as_labels,
    check_features,
    check_kinds,
    check_labels_for,
    check_labels_of,
    check_unmasked,
    head_arrays,
    is_dataset,
    labelled_batches,
)
from .._dims import check_dims
from .._tokens import tokenized
from ..models.activation import activation_of, check_activation
from ..models.cut import as_model, check_one_vector, gallery_backbone, split
from ..models.outputs import one_output
from ..text import preprocessor_of
from .inputs import dims_of
from .multilabel import check_targets, check_zeros_and_ones, score_multilabel
from .neighbors import (
    BLOCK_ROWS,
    check_gallery,
    mean_average_precision_at_k,
    nearest_by_dim,
    precision_at_k,
)
from .probe import check_probe, linear_probe
from .quality import Quality, progress_bar
from .regression import score_regression

_HEAD_ROWS = 4096  # rows whose logits are held at a time


def evaluate(
    model: keras.Model,
    inputs: Any,
    labels: Any = None,
    gallery: Any = None,
    dims: Sequence[int] | None = None,
    k: int = 10,
    probe: bool = False,
    batch_size: int = 256,
    verbose: int = 1,
    activation: str | None = None,
    output: str | None = None,
    exit: str | None = None,
) -> Quality:
    """Return what every dim of a model is worth on labelled rows, from one pass of each.

    With a head: `top1`, `top5` and `ece` (expected calibration error). Where a row may have several
    classes: `ap_macro`, `ap_micro`, `f1_macro`, `f1_micro` (see `score_multilabel`); of values:
    `mae`, `rmse` and `r2` (see `score_regression`). The loss says which. With a gallery: `nn1`
    (1-NN accuracy), `knn` (the vote of the k nearest), `p10` and `map10` (both definitions of
    precision at k) and `recall10` (the share of the full dim's k nearest among those of this dim).
    With `probe`: `probe`, the accuracy of a linear classifier newly trained on the gallery's
    features. `export_saved_model(quality=...)` takes the result.

    The gallery of a `MatryoshkaEncoder` of two towers goes through the other tower.

    Args:
        model: A model that ends in a `MatryoshkaHead`, or whose output is the embedding.
        inputs: The rows to judge on, as `model.predict` takes them, strings of a model with a
            preprocessor; or a `tf.data.Dataset`, a
            `keras.utils.PyDataset` or a PyTorch `DataLoader` of batches `(x, y)`.
        labels: Their class ids, `(rows,)` or, as Keras's data sets give them, `(rows, 1)`; where a
            row may have several classes, 0 or 1 for each, `(rows, num_classes)`; of values, those.
            None beside a data set.
        gallery: Inputs and labels `(x, y)` of other rows, to look for neighbours among; or a data
            set of them. Not where a row may have several classes, or has values.
        dims: None means those of the head, or of the loss of a compiled `MatryoshkaEncoder`.
        k: How many neighbours; the names say so: `p10`, `map10`, `recall10`.
        probe: Whether linear classifiers are trained; scikit-learn takes minutes for 100 classes.
        batch_size: Of the pass; a data set has batches of its own.
        verbose: 1 shows progress (of both passes, of the search, of the probes), 0 does not.
        activation: What the head's outputs are, as `export_saved_model` takes it; None takes it
            from the loss, and without one a row has one class.
        output: Which output is judged, of a model with several.
        exit: Which exit is judged, of a model with exits; None for the last. Its neighbours are
            looked for among what it makes of the gallery itself.

    Raises:
        ValueError: If inputs and labels do not fit, labels of the two sides are of different
            kinds, a dim cannot be measured, or the gallery has fewer than k rows. Nothing is
            embedded before, unless the check needs the features or the labels of a data set.
        ImportError: If `probe` is true and scikit-learn is not installed.

    Examples:
        >>> backbone = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(3, dims=(4, 16)))
        >>> x, y = np.random.default_rng(0).normal(size=(40, 20)), np.arange(40) % 3
        >>> quality = evaluate(model, x[:10], y[:10], gallery=(x[10:], y[10:]), k=5, verbose=0)
        >>> list(quality), list(quality[4])
        ([4, 16], ['top1', 'top5', 'ece', 'nn1', 'knn', 'p5', 'map5', 'recall5'])
    """
    preprocessor = preprocessor_of(model)
    inputs = tokenized(preprocessor, inputs, has_texts_as_labels=False)
    if isinstance(gallery, (tuple, list)) and gallery:
        gallery = (tokenized(preprocessor, gallery[0]), *gallery[1:])
    else:
        gallery = tokenized(preprocessor, gallery, has_texts_as_labels=False)
    model = one_output(model, output)
    backbone, head = split(model, exit=exit)
    check_one_vector(model, backbone)
    dims = dims_of("evaluate", model, head, dims) if head is None else dims
    if head is None and gallery is None:
        raise ValueError(
            "Without a head dims are judged by their neighbours. "
            f"Received: gallery=None for {type(model).__name__} {model.name!r}. "
            "Give gallery=(x, y), rows of training for example."
        )
    # Check first: embedding the data may take hours.
    if head is None or head.dims is not None:
        _dims_to_judge(head, dims, gallery)
    kind = None if head is None else _kind_of(model, activation)
    if kind in ("sigmoid", "none"):
        judged = _score_outputs(
            backbone, head, kind, inputs, labels, gallery, dims, batch_size, verbose
        )
        return Quality(judged, output)
    gallery_rows, gallery_labels = (
        (gallery, None) if is_dataset(gallery) else gallery or (None,) * 2
    )
    truth = _labels_in_memory(inputs, labels)
    if gallery is not None:
        gallery_labels = _labels_in_memory(gallery_rows, gallery_labels)

    def check_labels() -> None:
        if truth is not None and head is not None:
            if dims is None or set(dims) & set(head.dims or ()):
                check_class_ids(truth, head.num_classes)
        if truth is not None and gallery_labels is not None:
            check_kinds(truth, gallery_labels)
        if gallery_labels is not None:
            check_gallery(len(gallery_labels), k)
            if probe:
                check_probe(gallery_labels)

    check_labels()
    body, other = as_model(backbone), gallery_backbone(model, backbone)
    features, truth = _embed("inputs", body, inputs, truth, batch_size, verbose)
    check_labels()
    if head is not None and not head.built:
        head.build(features.shape)
    quality = Quality({dim: {} for dim in _dims_to_judge(head, dims, gallery)}, output)
    if head is not None:
        for dim in [dim for dim in quality if dim in (head.dims or ())]:
            quality[dim] |= score_head(features, truth, *head_arrays(head, dim))
    if gallery is not None:
        part = body if other is backbone else as_model(other)
        rows, gallery_labels = _embed(
            "gallery", part, gallery_rows, gallery_labels, batch_size, verbose
        )
        check_labels()
        scores = score_embeddings(features, truth, rows, gallery_labels, tuple(quality), k, verbose)
        progress = progress_bar(len(scores), "probe", verbose if probe else 0)
        for dim, measures in scores.items():
            quality[dim] |= measures
            if probe:
                trained = linear_probe(rows[:, :dim], gallery_labels)
                quality[dim]["probe"] = float((trained.predict(features[:, :dim]) == truth).mean())
                progress()
    return quality


def _labels_in_memory(inputs: Any, labels: Any) -> Array | None:
    """The labels of arrays, checked; None of a data set, which has its own."""
    if not is_dataset(inputs):
        check_unmasked(inputs)
        return check_labels_for(inputs, labels)
    if labels is not None:
        raise ValueError(
            "A data set gives its own labels. "
            f"Received: labels beside a {type(inputs).__name__}. Leave labels out."
        )
    return None


def _embed(
    name: str,
    part: keras.Model,
    rows: Any,
    labels: Any,
    batch_size: int,
    verbose: int,
    has_columns: bool = False,
) -> tuple[Array, Any]:
    """Return float32 features of arrays or of a data set, and their labels, perhaps its own."""
    if is_dataset(rows):
        labelled = labelled_batches(name, rows, has_columns)
        batches = [(part.predict_on_batch(x), y) for x, y in labelled]
        features, labels = map(np.concatenate, zip(*batches, strict=True))
    else:
        features = part.predict(rows, batch_size=batch_size, verbose=verbose)
    return np.asarray(keras.ops.convert_to_numpy(features), np.float32), labels


def _kind_of(model: keras.Model, activation: str | None) -> str | None:
    return activation_of(model) if activation is None else check_activation(activation)


def _score_outputs(
    backbone: keras.Model,
    head: Any,
    activation: str,
    inputs: Any,
    labels: Any,
    gallery: Any,
    dims: Sequence[int] | None,
    batch_size: int,
    verbose: int,
) -> Quality:
    """Judge a head of several classes a row, or of values, at every dim."""
    if gallery is not None:
        has = "several classes a row" if activation == "sigmoid" else "values"
        raise ValueError(
            "Neighbours are judged by the one class of a row. "
            f"Received: a gallery for a model of {has}. Leave it out, or give embeddings and class "
            "ids to score_embeddings."
        )

    def check(labels: Any) -> Array:
        targets = check_targets(labels, (None, head.num_classes))
        if activation == "sigmoid":
            check_zeros_and_ones(targets)
        return targets

    if is_dataset(inputs):
        _labels_in_memory(inputs, labels)  # none may be given
    else:
        labels = check(labels)
        check_unmasked(inputs)
    part = as_model(backbone)
    rows, labels = _embed("inputs", part, inputs, labels, batch_size, verbose, has_columns=True)
    features, targets = check_features(rows), check(labels)
    if not head.built:
        head.build(features.shape)
    score = score_multilabel if activation == "sigmoid" else score_regression
    quality = Quality()
    for dim in _dims_to_judge(head, dims, None):
        kernel, bias = head_arrays(head, dim)
        quality[dim] = score(features[:, :dim] @ kernel + bias, targets)
    return quality


def _dims_to_judge(head: Any, dims: Sequence[int] | None, gallery: Any) -> tuple[int, ...]:
    """The requested dims, or those of the head; each can be judged by head or gallery."""
    of_head = () if head is None else head.dims
    requested = check_dims(of_head if dims is None else dims)
    if gallery is None and not set(requested) <= set(of_head):
        raise ValueError(
            f"Without a gallery dims are judged by the head, which has {of_head}. "
            f"Received: dims={requested}. Give those of the head, or gallery=(x, y)."
        )
    return requested


def score_embeddings(
    queries: Any,
    query_labels: Any,
    gallery: Any,
    gallery_labels: Any,
    dims: Sequence[int],
    k: int = 10,
    verbose: int = 0,
) -> Quality:
    """Return `nn1`, `knn`, precision and recall of the neighbours at every dim: see `evaluate`.

    Args:
        queries: Embeddings `(queries, width)`, none of them in the gallery.
        query_labels: `(queries,)`, or `(queries, 1)`.
        gallery: Embeddings `(rows, width)`, at least k.
        gallery_labels: `(rows,)`, or `(rows, 1)`; of the same kind, integers best.
        dims: Prefix lengths; recall is that of the widest.
        k: How many neighbours.
        verbose: 1 shows progress, 0 does not.

    Raises:
        ValueError: If embeddings and labels do not fit, the labels of both sides are of different
            kinds, or the gallery has fewer than k rows.

    Examples:
        >>> gallery = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [0.2, 1.0]]
        >>> scores = score_embeddings([[2.0, 0.0]], [7], gallery, [8, 7, 7, 8], dims=(1, 2), k=2)
        >>> scores[2]
        {'nn1': 1.0, 'knn': 1.0, 'p2': 1.0, 'map2': 1.0, 'recall2': 1.0}
    """
    ladder = check_dims(dims)
    queries, gallery = check_features(queries, ladder[-1]), check_features(gallery, ladder[-1])
    expected = check_labels_of(queries, query_labels)
    labels = check_labels_of(gallery, gallery_labels)
    check_kinds(expected, labels)
    k = check_gallery(len(gallery), k)
    progress = progress_bar(-(-len(gallery) // BLOCK_ROWS), "block", verbose)
    nearest = nearest_by_dim(gallery, queries, ladder, k, progress)
    exact = nearest[ladder[-1]]
    scores = Quality()
    for dim, ids in nearest.items():
        hits = labels[ids] == expected[:, None]
        shared = [len(np.intersect1d(a, b)) for a, b in zip(ids, exact, strict=True)]
        scores[dim] = {
            "nn1": float(hits[:, 0].mean()),
            "knn": float((_vote(labels[ids]) == expected).mean()),
            f"p{k}": precision_at_k(hits),
            f"map{k}": mean_average_precision_at_k(hits),
            f"recall{k}": float(np.mean(shared) / k),
        }
    return scores


def _vote(labels: Array) -> Array:
    """The most frequent of the labels `(queries, k)` of each row; of equals the smallest."""
    ordered = np.sort(labels, axis=1)
    places = np.arange(ordered.shape[1])
    starts = np.ones(ordered.shape, bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)  # equals before it
    return np.take_along_axis(ordered, run.argmax(axis=1)[:, None], axis=1)[:, 0]


def score_head(features: Any, labels: Any, kernel: Any, bias: Any) -> dict[str, float]:
    """Return `top1`, `top5` and `ece` of a linear head on the first coordinates of features.

    Of classes with equal logits the first is the likelier one, as for `argmax`.

    Args:
        features: `(rows, width)`.
        labels: Class ids, `(rows,)` or `(rows, 1)`.
        kernel: `(dim, num_classes)`.
        bias: `(num_classes,)`, or None.

    Raises:
        ValueError: If features and labels do not fit, a label names no class, or kernel, bias or
            logits are not finite.

    Examples:
        >>> features, kernel = [[9.0, 0.0, 5.0], [0.0, 9.0, 5.0]], np.eye(2)
        >>> score_head(features, [0, 0], kernel, None)["top1"]
        0.5
    """
    weights, offsets = _check_head(kernel, bias)
    dim, num_classes = weights.shape
    table = check_features(features, dim)
    truth = check_labels_of(table, labels)
    check_class_ids(truth, num_classes)
    classes = np.arange(num_classes)
    ranks, confidences = [], []
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        for start in range(0, len(table), _HEAD_ROWS):
            part = slice(start, start + _HEAD_ROWS)
            logits = table[part, :dim] @ weights + offsets
            label = truth[part, None]
            logit = np.take_along_axis(logits, label, axis=1)
            is_ahead = np.where(classes < label, logits >= logit, logits > logit)
            ranks.append(np.count_nonzero(is_ahead, axis=1))
            confidences.append(max_probability(logits))
    rank, confidence = np.concatenate(ranks), np.concatenate(confidences)
    if not np.isfinite(confidence).all():
        raise ValueError(
            "logits must be finite. "
            f"Received: NaN or infinity in {int((~np.isfinite(confidence)).sum())} of {len(rank)} "
            "rows. Scale the features, or train the head to a finite loss."
        )
    return {
        "top1": float((rank == 0).mean()),
        "top5": float((rank < 5).mean()),
        "ece": _calibration_error(confidence, rank == 0),
    }


def _off_the_backend(values: Any) -> Any:
    """An array of a tensor, which on PyTorch may have a gradient; anything else as it is."""
    return keras.ops.convert_to_numpy(values) if keras.ops.is_tensor(values) else values


def _check_head(kernel: Any, bias: Any) -> tuple[Array, Array]:
    """A kernel and a bias as float32; without one, zeros."""
    kernel, bias = map(_off_the_backend, (kernel, bias))
    weights = as_float32("kernel", kernel)
    fits = weights.ndim == 2 and bool(weights.size)
    offsets = np.zeros(weights.shape[-1:], np.float32) if bias is None else as_float32("bias", bias)
    if not fits or offsets.shape != weights.shape[1:]:
        raise ValueError(
            "kernel must be (dim, num_classes), and bias (num_classes,) or None. "
            f"Received: kernel of shape {weights.shape}, bias of shape {offsets.shape}. "
            "Give what head.weights_at(dim) returns."
        )
    if not np.isfinite(weights).all() or not np.isfinite(offsets).all():
        raise ValueError(
            "kernel and bias must be finite. "
            "Received: NaN or infinity. Train the head to a finite loss."
        )
    return weights, offsets


def expected_calibration_error(logits: Any, labels: Any, bins: int = 15) -> float:
    """Return by how much the confidence of the best class misses the accuracy, in the mean.

    Args:
        logits: `(rows, num_classes)`.
        labels: Class ids, `(rows,)`.
        bins: Number of bins of equal width that confidences from 0 to 1 are put in.

    Formula:
        ECE = sum_b |b| / rows * |accuracy of b - mean confidence of b|

    Raises:
        ValueError: If shapes do not fit, there are no rows, or these are probabilities.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599.

    Examples:
        >>> sure = [[9.0, 0.0], [9.0, 0.0]]
        >>> round(expected_calibration_error(sure, [0, 0]), 3)
        0.0
        >>> round(expected_calibration_error(sure, [0, 1]), 3)  # sure of both, right once
        0.5
    """
    count = check_positive_integer("bins", bins, "Give for example 15.")
    scores, truth = as_float32("logits", logits), as_labels(labels)
    if scores.ndim != 2 or truth.shape != scores.shape[:1]:
        raise ValueError(
            "logits must be (rows, num_classes) with one label per row. "
            f"Received: logits of shape {scores.shape} and labels of shape {truth.shape}. "
            "Give what predict() returns at one dim, and class ids."
        )
    nested, truth = check_holdout(scores[:, None], truth, 1)
    shares = softmax(nested[:, 0])
    return _calibration_error(shares.max(axis=-1), shares.argmax(axis=-1) == truth, count)


def _calibration_error(confidence: Array, right: Array, bins: int = 15) -> float:
    sure = np.asarray(confidence, np.float64)
    bin_of_row = np.minimum((sure * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(bin_of_row, right - sure, minlength=bins)).sum() / len(sure))
