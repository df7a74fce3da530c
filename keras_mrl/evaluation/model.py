"""What every dim of a model is worth: one number per measure and dim, as a manifest carries it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mrl_serving.inputs import check_class_ids

from .._dims import check_dims
from .._features import Array
from .._labels import check_kinds, check_labels_for
from ..models.cut import split
from .heads import score_head
from .neighbors import check_gallery
from .probe import check_probe, linear_probe
from .progress import show_progress
from .scores import Quality, score_embeddings


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
        labels: Their class ids, `(rows,)` or, as Keras's data sets give them, `(rows, 1)`.
        gallery: Inputs and labels `(x, y)` of other rows, to look for neighbours among.
        dims: None means those of the head.
        k: How many neighbours; the names say so: `p10`, `map10`, `recall10`.
        probe: Whether linear classifiers are trained; scikit-learn takes minutes for 100 classes.
        batch_size: Of the pass.
        verbose: 1 shows progress (of both passes, of the search, of the probes), 0 does not.

    Raises:
        ValueError: If inputs and labels do not fit, labels of the two sides are of different
            kinds, a dim cannot be measured, or the gallery has fewer than k rows. All that is
            refused before anything is embedded, but for what needs the features to tell.
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
    # All that can be told before the data is embedded, which may take hours.
    if head is None or head.dims is not None:
        _ladder(head, dims, gallery)
    truth, named = check_labels_for(inputs, labels), None
    if head is not None and (dims is None or set(dims) & set(head.dims or ())):
        check_class_ids(truth, head.num_classes)
    if gallery is not None:
        named = check_labels_for(*gallery)
        check_kinds(truth, named)
        k = check_gallery(len(named), k)
        if probe:
            check_probe(named)
    body = backbone if hasattr(backbone, "predict") else keras.Sequential([backbone])

    def embed(rows: Any) -> Array:
        found = body.predict(rows, batch_size=batch_size, verbose=verbose)
        return np.asarray(keras.ops.convert_to_numpy(found), np.float32)

    features = embed(inputs)
    if head is not None and not head.built:
        head.build(features.shape)
    quality: Quality = {dim: {} for dim in _ladder(head, dims, gallery)}
    if head is not None:
        for dim in [dim for dim in quality if dim in (head.dims or ())]:
            quality[dim] |= score_head(features, truth, *_weights(head, dim))
    if gallery is not None:
        shown = embed(gallery[0])
        found = score_embeddings(features, truth, shown, named, tuple(quality), k, verbose)
        progress = show_progress(len(found), "probe", verbose if probe else 0)
        for dim, measures in found.items():
            quality[dim] |= measures
            if probe:
                fitted = linear_probe(shown[:, :dim], named)
                quality[dim]["probe"] = float((fitted.predict(features[:, :dim]) == truth).mean())
                progress()
    return quality


def _ladder(head: Any, dims: Sequence[int] | None, gallery: Any) -> tuple[int, ...]:
    """The dims to judge, each of which there is a way to judge by."""
    known = () if head is None else head.dims
    chosen = check_dims(known if dims is None else dims)
    if gallery is None and not set(chosen) <= set(known):
        raise ValueError(
            f"Without a gallery dims are judged by the head, which has {known}. "
            f"Received: dims={chosen}. Give those of the head, or gallery=(x, y)."
        )
    return chosen


def _weights(head: Any, dim: int) -> tuple[Any, Any]:
    kernel, bias = head.weights_at(dim)
    numpy = keras.ops.convert_to_numpy
    return numpy(kernel), None if bias is None else numpy(bias)
