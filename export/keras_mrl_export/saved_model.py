"""The door of this room: a Keras model in, a version that TensorFlow Serving serves out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl import log_spaced_dims, split
from keras_mrl._dims import check_weights
from keras_mrl_serving.cascade import CascadePolicy
from keras_mrl_serving.contract import check_dims
from keras_mrl_serving.index import ExactIndex

from .errors import ExportError
from .inputs import as_declared, check_shapes, name_inputs
from .job import Job
from .publish import check_version
from .rebuild import build_on_tensorflow
from .tolerance import tolerance_of


def export_saved_model(
    model: keras.Model,
    base_path: str | Path,
    sample: Any,
    policy: CascadePolicy | None = None,
    labels: Sequence[str] | None = None,
    quality: Mapping[int, Mapping[str, float]] | None = None,
    version: int | None = None,
    *,
    dims: Sequence[int] | None = None,
    normalize: bool = True,
    top_k: int = 5,
    weights: Sequence[float] | None = None,
    name: str | None = None,
    index: ExactIndex | None = None,
) -> Path:
    """Write `model` as the next version under `base_path`, with a signature per dim.

    The model is rebuilt on TensorFlow from its `.keras` form, in a process of its own when the
    current backend is another one; layers of the user's own travel by value. The version is
    written under a name no server loads, every signature is compared with `model` on `sample`,
    and only then it is renamed to its number: a server sees it whole or not at all.

    Args:
        model: A `MatryoshkaClassifier`, a functional model that ends in a `MatryoshkaHead`, or
            any model without a head, which is exported as an encoder.
        base_path: Folder of the model's versions; what `--model_base_path` names.
        sample: A few real rows, one array or a dict by input name.
        policy: A cascade learned on a holdout; it makes `classify_adaptive` and its temperatures
            those of `classify_<m>`.
        labels: Class names in the order of the class ids.
        quality: What the evaluation found per dim, e.g. `{8: {"top1": 0.93}}`.
        version: Number of the version; None takes the next. None is ever overwritten.
        dims: Which dims to export; None means those of the head, or for an encoder 8, 16, 32, ...
            up to its width.
        normalize: Whether `embed_<m>` scales embeddings to unit length, after truncation.
        top_k: How many classes a classification names.
        weights: The c_m the model was trained with, one per dim of the head, for the manifest;
            None leaves them out.
        name: Name in the manifest; None means the model's.
        index: A gallery of the model's embeddings, as wide as the last dim: the version then also
            has `search`, `search_<m>`, and `retrieve`, which answers inputs with neighbours.

    Returns:
        The folder of the new version.

    Raises:
        ValueError: If an argument does not fit the model.
        FileExistsError: If `version` exists.
        EncoderMismatchError: If `index` was built with embeddings of another model.
        ExportError: If the model cannot be rebuilt on TensorFlow, or a signature differs from it.
    """
    check_version(Path(base_path), version)
    backbone, head = split(model)
    names = name_inputs(backbone, sample)
    _check_rows(sample)
    check_shapes(backbone, sample)
    rows = as_declared(backbone, sample)
    features = _predict(backbone, rows)
    logits = None if head is None else _predict(model, rows)
    if features.ndim != 2:
        raise ValueError(
            "A model is exported with features of shape (batch, width). "
            f"Received: features of shape {features.shape}. "
            "Add a pooling layer before the head; of a language model export next_token(model)."
        )
    served = _served_dims(dims, None if head is None else head.dims, features.shape[1])
    num_classes = None if head is None else head.num_classes
    _check_head_arguments(num_classes, served, policy, labels)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(
            f"top_k must be an integer of at least 1. Received: top_k={top_k!r}. "
            "Give for example 5."
        )
    if index is not None:
        _check_index(index, served, normalize)
    job = Job(
        base_path=Path(base_path).absolute(),
        version=version,
        name=name or model.name,
        dims=served,
        input_names=names,
        normalize=normalize,
        top_k=None if num_classes is None else min(top_k, num_classes),
        policy=policy,
        labels=None if labels is None else tuple(labels),
        quality=None if quality is None else _quality(quality, served),
        weights=None if weights is None else _weights(weights, served, head),
        trained_on=keras.backend.backend(),
        tolerance=tolerance_of(model),
        sample={names[key]: array for key, array in _as_dict(sample).items()},
        features=features[:, : served[-1]],
        logits=logits if head is None or logits is None else _logits_of(logits, head, served),
        index=index,
    )
    return build_on_tensorflow(model, job)


def _predict(model: keras.Model, sample: Any) -> npt.NDArray[np.float32]:
    predicted = model.predict(sample, verbose=0)
    if isinstance(predicted, (list, tuple, Mapping)):
        raise ValueError(
            "A model is exported with one output. "
            f"Received: {len(predicted)} outputs from {model.name!r}. "
            "Name the one that is served: keras.Model(model.input, features)."
        )
    outputs = np.asarray(predicted, dtype=np.float32)
    if not np.isfinite(outputs).all():
        raise ExportError(
            "A model must give finite values to be exported. "
            f"Received: NaN or infinity from {model.name!r} on the sample. "
            "Train it to a finite loss, and look for bad rows in the sample."
        )
    return outputs


def _check_rows(sample: Any) -> None:
    shapes = {name or "sample": array.shape for name, array in _as_dict(sample).items()}
    if any(not shape or not shape[0] for shape in shapes.values()):
        raise ValueError(
            "sample must hold at least one row, batch first. "
            f"Received: {', '.join(f'{name} of shape {s}' for name, s in shapes.items())}. "
            "Give a few real rows, for example x[:8]."
        )


def _as_dict(sample: Any) -> dict[str, npt.NDArray[Any]]:
    given = sample if isinstance(sample, Mapping) else {"": sample}
    return {key: np.asarray(array) for key, array in given.items()}


def _served_dims(
    asked: Sequence[int] | None, trained: tuple[int, ...] | None, width: int
) -> tuple[int, ...]:
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


def _quality(
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


def _weights(weights: Sequence[float], dims: tuple[int, ...], head: Any) -> tuple[float, ...]:
    """The c_m of the exported dims, from those of all dims."""
    trained = dims if head is None else head.dims
    by_dim = dict(zip(trained, check_weights(weights, len(trained)), strict=True))
    return tuple(by_dim[dim] for dim in dims)


def _logits_of(logits: Any, head: Any, dims: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return logits[:, [head.index_of(dim) for dim in dims]]


def _check_index(index: ExactIndex, dims: tuple[int, ...], normalize: bool) -> None:
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


def _check_head_arguments(
    num_classes: int | None,
    dims: tuple[int, ...],
    policy: CascadePolicy | None,
    labels: Sequence[str] | None,
) -> None:
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
        len(labels) != num_classes
        or any(not isinstance(s, str) or not s or s != s.strip() or "\n" in s for s in labels)
    ):
        raise ValueError(
            f"labels must name each of the {num_classes} classes on one line. "
            f"Received: {len(labels)} labels {list(labels[:5])}. "
            "Give one non-empty string per class id, without line breaks or outer blanks."
        )


def _is_class_name(label: object) -> bool:
    return isinstance(label, str) and label == label.strip() != "" and "\n" not in label
