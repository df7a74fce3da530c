"""Which arguments an export takes, and the form in which they travel.

Checks of the sample are in `sample`, checks of a version's number in `publish`.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_mrl import log_spaced_dims
from keras_mrl._dims import check_weights
from keras_mrl.models.activation import activation_of, check_activation
from keras_mrl_serving import contract
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.cascade.stages import StageKey
from keras_mrl_serving.contract import is_model_name
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.integers import (
    as_int,
    check_dims,
    check_positive_integer,
    is_positive_integer,
)

from .decoder import ImageDecoder

# One slash, because a Path drops the second. A scheme of one letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_base_path(base_path: str | Path) -> Path:
    """Return the folder of a model's versions as a path.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty, or a URL, which would become a local folder of that name.
    """
    if not isinstance(base_path, (str, os.PathLike)):
        raise TypeError(
            "base_path must be a folder, a str or a Path. "
            f"Received: {type(base_path).__name__}. Give for example 'models/birds'."
        )
    text = os.fspath(base_path)
    if not text or _URL.match(text):
        raise ValueError(
            "base_path must be a folder of a file system. "
            f"Received: base_path={text!r}. "
            "Export to a folder, then copy the version's folder to where servers read."
        )
    return Path(text)


def check_name(name: str | None, model: str | None = None) -> str:
    """Return `name`, or raise unless a model can be served and deployed under it.

    Args:
        name: What the caller says; None means the name of the model, where there is one.
        model: The name of the model.

    Raises:
        TypeError: If it is no `str`.
        ValueError: If it is empty or has other characters.
    """
    chosen = model if name is None else name
    if isinstance(chosen, str) and is_model_name(chosen):
        return chosen
    kind = ValueError if isinstance(chosen, str) else TypeError
    received, remedy = f"name={chosen!r:.80}", "Give for example 'birds'"
    if chosen is not name:
        received, remedy = f"a model named {chosen!r:.80}", "Give another: name='birds'"
    raise kind(
        "name must be of letters, digits, '_', '.' and '-', the first and the last a letter or "
        f"digit. Received: {received}. {remedy}."
    )


def check_kinds(
    policy: object, index: object, decoder: object, signatures: object, labels: object
) -> None:
    """Raise `TypeError` where an argument is of the wrong type."""
    if policy is not None and not isinstance(policy, CascadePolicy):
        raise TypeError(
            f"policy must be a CascadePolicy. Received: {type(policy).__name__}. Learn one with "
            "CascadePolicy.learn, or read a manifest's with CascadePolicy.from_json."
        )
    if index is not None:
        check_exact(index)
    if decoder is not None and not isinstance(decoder, ImageDecoder):
        raise TypeError(
            f"decoder must be an ImageDecoder. Received: {type(decoder).__name__}. "
            "Give one of the model's input: ImageDecoder(height=32, width=32)."
        )
    if signatures is not None and not isinstance(signatures, Iterable):
        raise TypeError(
            "signatures must be names or families of signatures. "
            f"Received: signatures={signatures!r}. "
            'Give for example ["embed", "classify_64"], or None for all.'
        )
    if labels is not None and (isinstance(labels, str) or not isinstance(labels, Iterable)):
        raise TypeError(
            f"labels must be a list of class names. Received: labels={labels!r:.80}. "
            "Give one string per class id."
        )


def check_other_tower(
    model: Any,
    has_other_tower: bool,
    other_sample: Any,
    other_decoder: Any,
    other_preprocessor: Any = None,
) -> None:
    """Raise unless the rows of the other tower are there where the model has one, and only there.

    Raises:
        TypeError: If `other_decoder` is no decoder.
        ValueError: If rows are missing, or belong to no tower.
    """
    if other_decoder is not None and not isinstance(other_decoder, ImageDecoder):
        raise TypeError(
            f"other_decoder must be an ImageDecoder. Received: {type(other_decoder).__name__}. "
            "Give one of the other tower's input: ImageDecoder(height=32, width=32)."
        )
    received = f"for {type(model).__name__} {model.name!r}"
    if has_other_tower and other_sample is None:
        raise ValueError(
            "A model of two towers is exported whole, and compared on rows of both. "
            f"Received: no other_sample {received}. "
            "Give a few rows of the other tower: other_sample=items[:8]."
        )
    others = {
        "other_sample": other_sample,
        "other_decoder": other_decoder,
        "other_preprocessor": other_preprocessor,
    }
    name = next((name for name, own in others.items() if own is not None), None)
    if not has_other_tower and name is not None:
        raise ValueError(
            f"{name} is of the other tower of a model of two. "
            f"Received: {name} {received}, which has one. Leave it out, or export a "
            "MatryoshkaEncoder(tower, other_tower)."
        )


def check_exact(index: object) -> None:
    """Raise `TypeError` unless `index` is a gallery that a graph can hold."""
    if not isinstance(index, ExactIndex):
        raise TypeError(
            "A gallery in the graph has an exact first stage, as ExactIndex has. "
            f"Received: {type(index).__name__}. "
            "Build one of the same embeddings: ExactIndex.build(gallery, schedule, ids)."
        )
    if index.row_ids.names is not None:
        raise ValueError(
            "A gallery in the graph answers with int64 ids. "
            "Received: an index whose ids are strings. "
            "Build one that numbers its rows, and keep the strings beside it."
        )


def check_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    """Return warm-up batch sizes, or raise `ValueError` unless they are positive integers."""
    sizes: Any = tuple(batch_sizes) if isinstance(batch_sizes, Iterable) else batch_sizes
    if not isinstance(sizes, tuple) or not all(map(is_positive_integer, sizes)):
        raise ValueError(
            "warmup_batch_sizes must be positive integers. "
            f"Received: {sizes!r}. Give for example (1, 32), or () for no warm-up."
        )
    return tuple(map(as_int, sizes))


def choose_dims(
    requested: Sequence[int] | None, trained: tuple[int, ...] | None, width: int
) -> tuple[int, ...]:
    """Return the dims to export, increasing.

    Args:
        requested: Some dims, in any order; None means all that the head has, or log-spaced ones.
        trained: Dims of the head; None of an encoder, which has a prefix of every length.
        width: Width of the features.

    Raises:
        ValueError: If a requested dim is none of the model's.
    """
    if requested is None:
        return trained or log_spaced_dims(width)
    if not isinstance(requested, Iterable):
        check_dims(requested)  # which refuses it
    requested = tuple(requested)
    try:
        dims = check_dims(sorted(set(requested)))
    except TypeError:  # values of several types have no order
        dims = check_dims(requested)
    if any(dim not in trained if trained else dim > width for dim in dims):
        raise ValueError(
            f"dims must be dims of the model: {trained or f'1..{width}'}. "
            f"Received: dims={requested}. Leave dims out to export all of them."
        )
    return dims


def choose_activation(
    model: keras.Model, head: Any, requested: str | None, policy: CascadePolicy | None
) -> str | None:
    """Return what makes probabilities of the head's outputs: see `keras_mrl.models.activation`.

    Args:
        model: The model.
        head: Its head; None of an encoder.
        requested: What the caller says; None means what the model says.
        policy: A cascade, which is of a softmax where neither says it.

    Returns:
        "softmax", "sigmoid" or "none"; None of an encoder.

    Raises:
        ValueError: If the caller says something else than those, or says it of an encoder; or if
            nothing says it of a head with one output, or the loss takes probabilities.
    """
    if requested is not None:
        check_activation(requested)
        if head is None:
            raise ValueError(
                "activation is of the outputs of a head. Received: "
                f"activation={requested!r} for a model that does not end in a MatryoshkaHead. "
                "Leave it out, or export a MatryoshkaClassifier."
            )
        return requested
    if head is None:
        return None
    known = activation_of(model)
    if known is not None or policy is not None:
        return known or "softmax"
    loss = getattr(model, "loss", None)
    received = f"model {model.name!r}, " + (
        "which was never compiled" if loss is None else f"compiled with a loss of its own, {loss!r}"
    )
    rule = "The loss that a model is compiled with says what its outputs are. "
    choices = "'softmax' for one class a row, 'sigmoid' for any number, 'none' for values"
    if head.num_classes == 1:
        raise ValueError(
            f"{rule}Received: {received}, with one output a row, of which a softmax makes 1 "
            f"always. Name it: activation='sigmoid' for a probability, 'none' for a value."
        )
    warnings.warn(
        f"{rule}Received: {received}. Softmax is assumed. Name it with activation=: {choices}.",
        UserWarning,
        stacklevel=3,
    )
    return "softmax"


def check_head_arguments(
    num_classes: int | None,
    activation: str | None,
    dims: tuple[int, ...],
    policy: CascadePolicy | None,
    labels: Sequence[str] | None,
) -> None:
    """Raise `ValueError` unless the policy and the labels fit the model's head."""
    if policy is not None and activation in ("sigmoid", "none"):
        has = "any number of classes a row" if activation == "sigmoid" else "values"
        raise ValueError(
            "A cascade decides which one class a row has. "
            f"Received: a policy for a model of {has} (activation={activation!r}). "
            "Leave policy out, and ask one dim."
        )
    if labels is not None and activation == "none":
        raise ValueError(
            "labels are names of classes. "
            f"Received: {len(labels)} labels for a model of values (activation='none'). "
            "Leave labels out."
        )
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
            "Give one non-empty string of UTF-8 per class id, without line breaks or outer blanks."
        )


def choose_top_k(
    requested: int | None, num_classes: int | None, activation: str | None
) -> int | None:
    """Return how many classes a classification names; None where there are no classes.

    Args:
        requested: None means 5, or all where a row may have several.
        num_classes: Outputs of the head; None without one.
        activation: Of those.

    Raises:
        ValueError: If `requested` is no positive integer.
    """
    if requested is not None:
        requested = check_positive_integer("top_k", requested, "Give for example 5.")
    if num_classes is None or activation == "none":
        return None
    usual = num_classes if activation == "sigmoid" else 5
    return min(requested or usual, num_classes)


def _is_class_name(label: object) -> bool:
    if not isinstance(label, str) or label != label.strip() or not label:
        return False
    try:
        encoded = label.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return not {*b"\r\n"} & {*encoded}


def check_index(index: ExactIndex, dims: tuple[int, ...], normalize: bool) -> None:
    """Raise `ValueError` unless `index` holds embeddings as the model's are served."""
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


_ALWAYS = (contract.DESCRIBE, contract.SERVING_DEFAULT)


def choose_signatures(
    requested: Sequence[str] | None,
    dims: tuple[int, ...],
    activation: str | None,
    policy: CascadePolicy | None,
    index: ExactIndex | None,
    has_other_tower: bool = False,
    exits: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return the names of the signatures to write, in the order of the contract.

    Args:
        requested: Names, or families: "embed" for every `embed_<m>`. None means every signature
            that the model can have.
        dims: The dims that are exported.
        activation: Of the head's outputs; None without a head.
        policy: Its cascade.
        index: Its gallery.
        has_other_tower: Whether galleries go through a tower of their own.
        exits: The model's exits; signatures of those before the last are written on request alone.

    Raises:
        ValueError: If the model cannot have a requested signature.
    """
    possible = _possible_signatures(dims, activation, policy, index, has_other_tower)
    if requested is None:
        return possible
    possible += tuple(
        name_of(dim, exit)
        for exit in exits[:-1]
        for name_of in _families_at_exits(activation)
        for dim in dims
    )
    names = (requested,) if isinstance(requested, str) else tuple(requested)
    takes = {*possible, *map(_family, possible), *_ALWAYS}
    unknown = [name for name in names if not isinstance(name, str) or name not in takes]
    if unknown:
        raise ValueError(
            f"signatures must be of those the model can have: {', '.join(possible)}. "
            f"Received: {', '.join(map(repr, unknown))}. "
            'Give those names, or a family of them: "embed".'
        )
    return tuple(name for name in possible if name in names or _family(name) in names)


def _families_at_exits(activation: str | None) -> list[Callable[[int, str], str]]:
    if activation is None:
        return [contract.embed]
    return [contract.embed, contract.regress if activation == "none" else contract.classify]


def _possible_signatures(
    dims: tuple[int, ...],
    activation: str | None,
    policy: CascadePolicy | None,
    index: ExactIndex | None,
    has_other_tower: bool,
) -> tuple[str, ...]:
    heads = () if activation is None else dims
    answer = contract.regress if activation == "none" else contract.classify
    names = [*map(contract.embed, dims), *map(answer, heads)]
    if has_other_tower:
        names += map(contract.embed_other, dims)
    names += [contract.FEATURES, *map(contract.head, heads)]
    if policy is not None:
        names.append(contract.CLASSIFY_ADAPTIVE)
    if index is not None:
        searched = sorted({*dims, *index.schedule.dims})
        names += [contract.RETRIEVE, contract.SEARCH, *map(contract.search, searched)]
    return tuple(names)


def _family(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def check_policy_is_used(
    policy: CascadePolicy | None, signatures: Sequence[str], dims: tuple[int, ...]
) -> None:
    """Raise `ValueError` if no signature that is written answers by the policy.

    Without `classify_adaptive` its temperatures may still be in use.
    """
    if policy is None or contract.CLASSIFY_ADAPTIVE in signatures:
        return
    written: set[StageKey] = {(None, dims[-1])}  # of serving_default
    for exit, dim in policy.keys:
        names = {contract.classify(dim, exit), *([contract.head(dim)] if exit is None else [])}
        if names & {*signatures}:
            written.add((exit, dim))
    if all(stage.temperature == 1 for stage in policy.stages if stage.key in written):
        raise ValueError(
            "policy is what classify_adaptive decides by, and its temperatures are those of "
            "classify_<m>. Received: a policy, and signatures that use neither. "
            "Add classify_adaptive to signatures, or leave policy out."
        )


def quality_by_dim(
    quality: Mapping[int, Mapping[str, float]], dims: tuple[int, ...], output: str | None = None
) -> dict[str, dict[str, float]]:
    """Return quality as JSON holds it; measures may come as scalars of any library.

    Raises:
        ValueError: If it is no measures by dim, one is not finite, a dim is not exported, or
            another output was judged than the one that is exported.
    """
    judged = getattr(quality, "output", None)
    if None not in (judged, output) and judged != output:
        raise ValueError(
            "quality must be of the output that is exported. "
            f"Received: quality of output {judged!r} for output={output!r}. "
            f"Judge that one: quality=evaluate(model, x, y[{output!r}], output={output!r})."
        )
    try:
        measures_of = {
            int(dim): {measure: float(value) for measure, value in measures.items()}
            for dim, measures in quality.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "quality must give measures by dim, and a number by measure. "
            f"Received: quality={quality!r:.200}. Give for example {{8: {{'top1': 0.93}}}}."
        ) from error
    unknown = sorted(set(measures_of) - set(dims))
    if unknown:
        raise ValueError(
            f"quality must be of dims that are exported: {dims}. "
            f"Received: quality of {', '.join(map(str, unknown))}. "
            f"Leave it out, or export these dims, too: dims={tuple(sorted({*dims, *unknown}))}."
        )
    for dim, measures in measures_of.items():
        for measure, value in measures.items():
            if not math.isfinite(value):
                raise ValueError(
                    "quality must give finite numbers. "
                    f"Received: {measure} {value} at dim {dim}. Leave out what was not measured."
                )
    return {str(dim): measures_of[dim] for dim in sorted(measures_of)}


def weights_of_dims(
    weights: Sequence[float], dims: tuple[int, ...], head: Any
) -> tuple[float, ...]:
    """Return the c_m of the exported dims, from the c_m of all dims of the head."""
    trained = dims if head is None else head.dims
    by_dim = dict(zip(trained, check_weights(weights, len(trained)), strict=True))
    return tuple(by_dim[dim] for dim in dims)
