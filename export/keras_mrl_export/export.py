"""The public functions: a model or a gallery in, a version that TensorFlow Serving loads out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from keras_mrl import split
from keras_mrl.models.costs import Costs
from keras_mrl.models.cut import dims_of_loss, gallery_backbone
from keras_mrl.models.outputs import one_output
from keras_mrl.text import are_texts, pooling_of, preprocessor_of
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.contract import CLASSIFY_ADAPTIVE
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.prompts import check_gallery_prompt

from .arguments import (
    check_base_path,
    check_batch_sizes,
    check_exact,
    check_head_arguments,
    check_index,
    check_kinds,
    check_name,
    check_other_tower,
    check_policy_is_used,
    choose_activation,
    choose_dims,
    choose_signatures,
    choose_top_k,
    quality_by_dim,
    weights_of_dims,
)
from .decoder import ImageDecoder
from .exits import (
    check_costs,
    check_exits_of_policy,
    exit_signatures,
    exits_of,
    find_deep_row,
    read_exits,
    relative_costs,
)
from .job import Job, TextJob, TowerJob, draw_model_id, terms_of
from .model_file import in_float32
from .process import build_on_tensorflow
from .publish import check_version, publishing
from .sample import (
    Sample,
    is_alike_without_padding,
    outputs_of,
    read_sample,
    read_text_sample,
    takes_tokens,
)
from .text import check_preprocessor


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
    top_k: int | None = None,
    activation: str | None = None,
    weights: Sequence[float] | None = None,
    name: str | None = None,
    index: ExactIndex | None = None,
    signatures: Sequence[str] | None = None,
    decoder: ImageDecoder | None = None,
    other_sample: Any = None,
    other_decoder: ImageDecoder | None = None,
    preprocessor: Any = None,
    other_preprocessor: Any = None,
    prompts: Mapping[str, str] | None = None,
    warmup_batch_sizes: Sequence[int] = (1,),
    identity: bool = True,
    output: str | None = None,
    costs: Costs | None = None,
) -> Path:
    """Write `model` as the next version under `base_path`, with a signature per dim.

    The model is rebuilt on TensorFlow from its `.keras` form, in a process of its own when the
    current backend is another one; layers of the user's own travel by value. The version is
    written under a name no server loads, every signature is compared with `model` on `sample`,
    and only then it is renamed to its number: a server sees it whole or not at all. A model that
    computes in half precision is served in float32.

    Args:
        model: A model that `keras_mrl.split` finds a nested head in, or any model without one,
            which is exported as an encoder. Both towers of a `MatryoshkaEncoder` are in one
            version: `embed_<m>` takes queries, `embed_other_<m>` what galleries are made of.
            Of a model with exits, signatures without an exit in their names are of the last one.
        base_path: Folder of the model's versions; the server's `--model_base_path`. No URL.
        sample: A few real rows, one array or a dict by input name; texts may be a list.
        policy: A cascade learned on a holdout. `classify_adaptive` decides by it, and
            `classify_<m>` divides logits by its temperatures. Where `signatures` leaves
            `classify_adaptive` out, the temperatures alone remain: the manifest has no cascade.
        labels: Class names in the order of the class ids.
        quality: Measures of the evaluation per dim, e.g. `{8: {"top1": 0.93}}`.
        version: Number of the version; None takes the seconds since 1970, or one more than the
            highest version if that is more. A version that exists is never overwritten.
        dims: Which dims to export; None means those of the head, or of the loss of a
            `MatryoshkaEncoder`, or else 8, 16, 32, ... up to the width.
        normalize: Whether `embed_<m>` scales embeddings to unit length, after truncation.
        top_k: How many classes a classification names; None means 5, or all of them where a row may
            have several.
        activation: What the head's outputs are: "softmax" for one class a row, "sigmoid" for any
            number of classes, each with a probability of its own, "none" for values. None takes it
            from the loss the model is compiled with; softmax is assumed, with a warning, where the
            loss does not say it.
        weights: The c_m the model was trained with, one per dim of the head, for the manifest;
            None leaves them out.
        name: Name in the manifest, of letters, digits, `_`, `.` and `-`; None means the model's.
        index: A gallery of the model's embeddings, as wide as the last dim: the version then also
            has `search`, `search_<m>`, and `retrieve`, which answers inputs with neighbours.
        signatures: Which signatures to write, by name or by family: `["embed", "classify_64"]`.
            None writes all but those of exits before the last, which are asked for by name,
            `"classify_conv3_out_64"`, or as a family, `"embed_conv3_out"`; each costs memory and
            time to load. `describe` and `serving_default` are always written.
        decoder: Makes the served input `inputs` the bytes of encoded images, decoded in the graph;
            `sample` is then a list of such bytes.
        other_sample: Of a model of two towers, a few rows of the other one, as `sample`.
        other_decoder: As `decoder`, for the other tower.
        preprocessor: A preprocessor of keras-hub, or a tokenizer of it with a `sequence_length`:
            the one the model was trained with. The served input is then `text`, strings that the
            graph makes tokens of, and `sample` is a list of texts. None means the model's own
            where `sample` is of texts. It needs tensorflow-text, but for WordPiece of BERT's kind.
        other_preprocessor: As `preprocessor`, for the other tower.
        prompts: Of a version that takes texts, name to what a client puts before a text:
            `{"query": "query: ", "passage": "passage: "}`.
        warmup_batch_sizes: A server runs every signature at these batch sizes before the version
            answers. None of them may exceed the server's `max_batch_size`, or the version does not
            load; () writes no records.
        identity: Whether every row of an answer also carries `model_id`, a number drawn for this
            export, by which the client knows one model from another under one version number.
            False keeps `embed_<m>` and `features` at one output, which REST answers as bare rows.
        output: Which of several outputs this version serves: its key, or the name that Keras has
            for it. Each is a model of its own to a server; without `name` its name follows the
            model's.
        costs: Of a model with exits, what `measure_costs` returns: the manifest then has the
            milliseconds of each exit, and `relative_cost` is a share of time. None counts
            multiply-adds alone.

    Returns:
        The folder of the new version.

    Raises:
        TypeError: If an argument is of the wrong type.
        ImportError: If tensorflow-text is missing, and the preprocessor needs it.
        ValueError: If an argument does not fit the model, no written signature uses the policy, or
            nothing says what the one output of a head is.
        FileExistsError: If `version` exists.
        EncoderMismatchError: If `index` was built with embeddings of another model, or with a
            prompt that is none of `prompts`.
        ExportError: If the model cannot be rebuilt on TensorFlow, or a signature differs from it.
    """
    folder = check_base_path(base_path)
    if preprocessor is None and are_texts(sample):
        preprocessor = preprocessor_of(model)
    pooling = pooling_of(model)
    model = one_output(model, output)
    name = check_name(name, model.name)
    check_version(folder, version)
    check_kinds(policy, index, decoder, signatures, labels)
    exits = exits_of(model)
    labels = None if labels is None else tuple(labels)
    batch_sizes = check_batch_sizes(warmup_batch_sizes)
    backbone, _ = split(model)
    has_other_tower = gallery_backbone(model, backbone) is not backbone
    check_other_tower(model, has_other_tower, other_sample, other_decoder, other_preprocessor)
    check_preprocessor(preprocessor, prompts, decoder)
    check_preprocessor(other_preprocessor, None, other_decoder, "other_preprocessor")
    if preprocessor is None:
        read = read_sample(backbone, sample, decoder)
    else:
        read = read_text_sample(backbone, sample, preprocessor, prompts or {}, pooling)
    other_read = None
    if has_other_tower:
        tower = gallery_backbone(model, backbone)
        if other_preprocessor is None and takes_tokens(tower) and are_texts(other_sample):
            other_preprocessor = preprocessor_of(tower) or preprocessor
        other_read = _read_other(
            tower, other_sample, other_decoder, other_preprocessor, prompts or {}
        )
    activation = choose_activation(model, split(model)[1], activation, policy)
    if dims is None and split(model)[1] is None:
        dims = dims_of_loss(model)
    model = in_float32(model)
    backbone, head = split(model)
    features = outputs_of(backbone, read.rows)
    logits: Any = None if head is None else outputs_of(model, read.rows)
    if features.ndim != 2:
        remedy = "Pool before the head; of a language model export next_token(model)"
        if head is None:
            remedy = (
                "End it in a pooling layer; of a slimmable net export the features of one dim: "
            )
            remedy += "keras.Model(model.input, model.get_layer('features_8').output)"
        raise ValueError(
            "A model is exported with features of shape (batch, width). "
            f"Received: features of shape {features.shape}. {remedy}."
        )
    served = choose_dims(dims, None if head is None else head.dims, features.shape[1])
    num_classes = None if head is None else head.num_classes
    check_head_arguments(num_classes, activation, served, policy, labels)
    check_exits_of_policy(policy, exits)
    check_costs(costs, exits, () if head is None else served)
    top_k = choose_top_k(top_k, num_classes, activation)
    if index is not None:
        check_index(index, served, normalize)
        check_gallery_prompt(index.prompt, prompts or {})
    chosen = choose_signatures(
        signatures, served, activation, policy, index, has_other_tower, exits
    )
    check_policy_is_used(policy, chosen, served)
    of_exits = read_exits(model, exits, read, served, costs, activation not in (None, "softmax"))
    other_tower = None
    if other_read is not None:
        other_features = outputs_of(gallery_backbone(model, backbone), other_read.rows)
        other_text = _cut(gallery_backbone(model, backbone), other_read, other_features)
        other_tower = TowerJob(
            input_names=other_read.names,
            sample=other_read.served,
            features=other_features[:, : served[-1]],
            decoder=other_decoder,
            text=other_text,
        )
    job = Job(
        base_path=folder.absolute(),
        version=version,
        name=name,
        dims=served,
        signatures=chosen,
        input_names=read.names,
        normalize=normalize,
        top_k=top_k,
        activation=activation,
        policy=policy,
        labels=labels,
        quality=None if quality is None else quality_by_dim(quality, served, output),
        weights=None if weights is None else weights_of_dims(weights, served, head),
        trained_on=keras.backend.backend(),
        sample=read.served,
        features=features[:, : served[-1]],
        logits=logits if head is None else logits[:, [head.index_of(dim) for dim in served]],
        terms=None if activation in (None, "softmax") else terms_of(head, features, served),
        index=index,
        decoder=decoder,
        text=_cut(backbone, read, features),
        other_tower=other_tower,
        warmup_batch_sizes=batch_sizes,
        model_id=draw_model_id() if identity else None,
        exits=of_exits,
        exit_signatures=exit_signatures(chosen, exits, served),
        relative_costs=relative_costs(model, policy, read, costs),
        deep_row=find_deep_row(
            model, policy if CLASSIFY_ADAPTIVE in chosen else None, of_exits, read, served
        ),
    )
    return build_on_tensorflow(model, job)


def _cut(backbone: keras.Model, read: Sample, features: Any) -> TextJob | None:
    """Return what makes tokens of texts, which cuts padding that changes no answer."""
    if read.text is None:
        return None
    alike = is_alike_without_padding(backbone, read.text, features)
    return replace(read.text, cuts_padding=alike)


def _read_other(
    tower: keras.Model,
    sample: Any,
    decoder: ImageDecoder | None,
    preprocessor: Any,
    prompts: Mapping[str, str],
) -> Sample:
    try:
        if preprocessor is not None:
            return read_text_sample(tower, sample, preprocessor, prompts, pooling_of(tower))
        return read_sample(tower, sample, decoder)
    except ValueError as error:
        raise ValueError(f"Of the other tower: {error}") from error


def export_index(
    index: ExactIndex,
    base_path: str | Path,
    *,
    name: str = "index",
    version: int | None = None,
    identity: bool = True,
) -> Path:
    """Write a gallery as the next version under `base_path`: `search`, and `search_<m>` per dim.

    The funnel of the index runs inside the graph, its first stage over every row. The version is
    written under a name no server loads, asked for the neighbours of some of its rows, compared
    with `index`, and only then renamed to its number. Exporting a gallery of 2.1 GiB that was
    opened from its folder took 1.4 times that in memory, its mapped rows included.

    Args:
        index: The gallery, built in memory or opened from a folder: `open_index(path)`.
        base_path: Folder of the index's versions; the server's `--model_base_path`. No URL.
        name: Name in the manifest, of letters, digits, `_`, `.` and `-`.
        version: Number of the version; None takes the seconds since 1970, or one more than the
            highest version if that is more. A version that exists is never overwritten.
        identity: Whether every row of an answer also carries `model_id`, see `export_saved_model`.

    Returns:
        The folder of the new version.

    Raises:
        TypeError: If `index` is no `ExactIndex`, or `name` no `str`.
        ValueError: If `version` is no number, or no model can be served as `name` or from
            `base_path`.
        FileExistsError: If `version` exists.
        ExportError: If the written signatures answer otherwise than `index`.

    Examples:
        ```
        version = export_index(open_index("birds.index"), "models/birds_index")
        Client("localhost:8500", "birds_index").search(embeddings)
        ```
    """
    folder, name = check_base_path(base_path), check_name(name)
    check_exact(index)
    from .build import build_index  # TensorFlow, which other backends need only for this

    with publishing(folder, version) as staged:
        build_index(index, name, draw_model_id() if identity else None, staged.folder)
    return staged.published
