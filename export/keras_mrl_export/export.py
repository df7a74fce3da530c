"""The door of this room: a Keras model in, a version that TensorFlow Serving serves out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl import split
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.index import ExactIndex

from .arguments import (
    check_exact,
    check_head_arguments,
    check_index,
    check_kinds,
    check_policy_is_used,
    checked_base_path,
    checked_batch_sizes,
    checked_name,
    checked_top_k,
    chosen_signatures,
    quality_by_dim,
    served_dims,
    weights_of,
)
from .decoder import ImageDecoder
from .job import Job
from .model_file import in_float32
from .process import build_on_tensorflow
from .publish import check_version, publishing
from .sample import (
    SINGLE_INPUT,
    answers,
    as_arrays,
    as_declared,
    as_dict,
    check_one_input,
    check_rows,
    check_shapes,
    name_inputs,
    shaped_texts,
)


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
    signatures: Sequence[str] | None = None,
    decoder: ImageDecoder | None = None,
    warmup_batch_sizes: Sequence[int] = (1,),
) -> Path:
    """Write `model` as the next version under `base_path`, with a signature per dim.

    The model is rebuilt on TensorFlow from its `.keras` form, in a process of its own when the
    current backend is another one; layers of the user's own travel by value. The version is
    written under a name no server loads, every signature is compared with `model` on `sample`,
    and only then it is renamed to its number: a server sees it whole or not at all. A model that
    computes in half precision is served in float32.

    Args:
        model: A `MatryoshkaClassifier`, a functional model that ends in a `MatryoshkaHead`, or
            any model without a head, which is exported as an encoder.
        base_path: Folder of the model's versions; what `--model_base_path` names. No URL.
        sample: A few real rows, one array or a dict by input name; texts may be a list.
        policy: A cascade learned on a holdout; it makes `classify_adaptive` and its temperatures
            those of `classify_<m>`. Where `signatures` leaves `classify_adaptive` out, the
            temperatures alone remain, and the manifest has no cascade.
        labels: Class names in the order of the class ids.
        quality: What the evaluation found per dim, e.g. `{8: {"top1": 0.93}}`.
        version: Number of the version; None takes the next. None is ever overwritten.
        dims: Which dims to export; None means those of the head, or for an encoder 8, 16, 32, ...
            up to its width.
        normalize: Whether `embed_<m>` scales embeddings to unit length, after truncation.
        top_k: How many classes a classification names.
        weights: The c_m the model was trained with, one per dim of the head, for the manifest;
            None leaves them out.
        name: Name in the manifest, of letters, digits, `_`, `.` and `-`; None means the model's.
        index: A gallery of the model's embeddings, as wide as the last dim: the version then also
            has `search`, `search_<m>`, and `retrieve`, which answers inputs with neighbours.
        signatures: Which signatures to write, by name or by family: `["embed", "classify_64"]`.
            None writes all; each costs memory and time to load. `describe` and
            `serving_default` are always written.
        decoder: Makes the served input `inputs` the bytes of encoded images, decoded in the graph;
            `sample` is then a list of the bytes of some.
        warmup_batch_sizes: A server runs every signature at these batch sizes before the version
            answers. None may be above the server's `max_batch_size`, or the version does not
            load; () writes no records.

    Returns:
        The folder of the new version.

    Raises:
        TypeError: If an argument is of another kind altogether.
        ValueError: If an argument does not fit the model, or a policy no signature that is written.
        FileExistsError: If `version` exists.
        EncoderMismatchError: If `index` was built with embeddings of another model.
        ExportError: If the model cannot be rebuilt on TensorFlow, or a signature differs from it.
    """
    folder = checked_base_path(base_path)
    name = model.name if name is None else checked_name(name)
    check_version(folder, version)
    check_kinds(policy, index, decoder, signatures, labels)
    labels = None if labels is None else tuple(labels)
    batch_sizes = checked_batch_sizes(warmup_batch_sizes)
    backbone, head = split(model)
    if decoder is None:
        given = sample = as_arrays(sample)
    else:
        check_one_input(backbone)
        given = list(sample) if isinstance(sample, Iterable) else [sample]
        sample = decoder.pixels(given)
    names = name_inputs(backbone, sample)
    sample = shaped_texts(backbone, sample)
    check_rows(sample)
    check_shapes(backbone, sample)
    model = in_float32(model)
    backbone, head = split(model)
    rows = as_declared(backbone, sample)
    features = answers(backbone, rows)
    logits = None if head is None else answers(model, rows)
    if features.ndim != 2:
        raise ValueError(
            "A model is exported with features of shape (batch, width). "
            f"Received: features of shape {features.shape}. "
            "Add a pooling layer before the head; of a language model export next_token(model)."
        )
    served = served_dims(dims, None if head is None else head.dims, features.shape[1])
    num_classes = None if head is None else head.num_classes
    check_head_arguments(num_classes, served, policy, labels)
    top_k = checked_top_k(top_k)
    if index is not None:
        check_index(index, served, normalize)
    chosen = chosen_signatures(signatures, served, head is not None, policy, index)
    check_policy_is_used(policy, chosen, served)
    job = Job(
        base_path=folder.absolute(),
        version=version,
        name=name,
        dims=served,
        signatures=chosen,
        input_names={"": SINGLE_INPUT} if decoder else names,
        normalize=normalize,
        top_k=None if num_classes is None else min(top_k, num_classes),
        policy=policy,
        labels=labels,
        quality=None if quality is None else quality_by_dim(quality, served),
        weights=None if weights is None else weights_of(weights, served, head),
        trained_on=keras.backend.backend(),
        sample=_encoded(given) if decoder else {names[k]: a for k, a in as_dict(sample).items()},
        features=features[:, : served[-1]],
        logits=logits if head is None or logits is None else _logits_of(logits, head, served),
        index=index,
        decoder=decoder,
        warmup_batch_sizes=batch_sizes,
    )
    return build_on_tensorflow(model, job)


def _logits_of(logits: Any, head: Any, dims: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return logits[:, [head.index_of(dim) for dim in dims]]


def _encoded(images: Sequence[bytes]) -> dict[str, npt.NDArray[Any]]:
    column = np.empty(len(images), dtype=object)
    column[:] = list(images)
    return {SINGLE_INPUT: column}


# A gallery in, a version that TensorFlow Serving serves out.


def export_index(
    index: ExactIndex, base_path: str | Path, *, name: str = "index", version: int | None = None
) -> Path:
    """Write a gallery as the next version under `base_path`: `search`, and `search_<m>` per dim.

    The funnel of the index runs inside the graph, its first stage over every row. The version is
    written under a name no server loads, asked for the neighbours of some of its rows, compared
    with `index`, and only then renamed to its number. A gallery of 2.1 GiB that was opened from its
    folder took 1.4 times that in memory, its mapped rows among it.

    Args:
        index: The gallery, built in memory or opened from a folder: `open_index(path)`.
        base_path: Folder of the index's versions; what `--model_base_path` names. No URL.
        name: Name in the manifest, of letters, digits, `_`, `.` and `-`.
        version: Number of the version; None takes the next. None is ever overwritten.

    Returns:
        The folder of the new version.

    Raises:
        TypeError: If `index` is no `ExactIndex`, or `name` no `str`.
        ValueError: If `version` is no number, or no model can be served as `name` or from
            `base_path`.
        FileExistsError: If `version` exists.
        ExportError: If what was written answers otherwise.

    Examples:
        ```
        version = export_index(open_index("birds.index"), "models/birds_index")
        Client("localhost:8500", "birds_index").search(embeddings)
        ```
    """
    folder, name = checked_base_path(base_path), checked_name(name)
    check_exact(index)
    from .gallery import build_index  # TensorFlow, which other backends need only for this

    with publishing(folder, version) as staged:
        build_index(index, name, staged.folder)
    return staged.published
