"""What may be given to an export, and the form in which it travels."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_mrl import log_spaced_dims
from keras_mrl._dims import check_weights
from keras_mrl_serving import contract
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.contract import as_int, check_dims
from keras_mrl_serving.index import ExactIndex

from .decoder import ImageDecoder, is_positive

# Where a version goes, and what it is called there.

# What `keras-mrl deploy` takes too: it stands in flags, in URLs and in the names of containers.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
# A path loses one of two slashes. A scheme of one letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def checked_base_path(base_path: str | Path) -> Path:
    """Return the folder of a model's versions as a path.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty, or a URL: a folder of that name would be made here.
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


def checked_name(name: str) -> str:
    """Return `name`, or raise unless a model can be served and deployed under it.

    Raises:
        TypeError: If it is no `str`.
        ValueError: If it has other characters, or none.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    kind = ValueError if isinstance(name, str) else TypeError
    raise kind(
        "name must be of letters, digits, '_', '.' and '-', the first and the last a letter or "
        f"digit. Received: name={name!r:.80}. Give for example 'birds'."
    )


# Which signatures a version is written with.

_ALWAYS = (contract.DESCRIBE, contract.SERVING_DEFAULT)


def chosen_signatures(
    asked: Sequence[str] | None,
    dims: tuple[int, ...],
    head: bool,
    policy: CascadePolicy | None,
    index: ExactIndex | None,
) -> tuple[str, ...]:
    """Return the names of the signatures to write, in the order of the contract.

    Args:
        asked: Names, or families: "embed" for every `embed_<m>`. None means all that there are.
        dims: The dims that are exported.
        head: Whether the model classifies.
        policy: Its cascade.
        index: Its gallery.

    Raises:
        ValueError: If one is asked for that the model cannot have.
    """
    offered = _offered(dims, head, policy, index)
    if asked is None:
        return offered
    if isinstance(asked, str):
        asked = [asked]
    names = tuple(asked)
    known = {*offered, *map(_family, offered), *_ALWAYS}
    unknown = [name for name in names if not isinstance(name, str) or name not in known]
    if unknown:
        raise ValueError(
            f"signatures must be of those the model can have: {', '.join(offered)}. "
            f"Received: {', '.join(map(repr, unknown))}. "
            'Give those names, or a family of them: "embed".'
        )
    return tuple(name for name in offered if name in names or _family(name) in names)


def _offered(
    dims: tuple[int, ...], head: bool, policy: CascadePolicy | None, index: ExactIndex | None
) -> tuple[str, ...]:
    names = [contract.embed(dim) for dim in dims]
    if head:
        names += [contract.classify(dim) for dim in dims]
    names.append(contract.FEATURES)
    if head:
        names += [contract.head(dim) for dim in dims]
    if policy is not None:
        names.append(contract.CLASSIFY_ADAPTIVE)
    if index is not None:
        edges = sorted({*dims, *index.schedule.dims})
        names += [contract.RETRIEVE, contract.SEARCH, *map(contract.search, edges)]
    return tuple(names)


def _family(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def checked_top_k(top_k: int) -> int:
    """Return `top_k`, or raise `ValueError` unless it is a positive integer."""
    if not is_positive(top_k):
        raise ValueError(
            f"top_k must be an integer of at least 1. Received: top_k={top_k!r}. "
            "Give for example 5."
        )
    return as_int(top_k)


def checked_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    """Return warm-up batch sizes, or raise `ValueError` unless they are positive integers."""
    given: Any = tuple(batch_sizes) if isinstance(batch_sizes, Iterable) else batch_sizes
    if not isinstance(given, tuple) or not all(map(is_positive, given)):
        raise ValueError(
            "warmup_batch_sizes must be positive integers. "
            f"Received: {given!r}. Give for example (1, 32), or () for no warm-up."
        )
    return tuple(map(as_int, given))


def check_kinds(
    policy: object, index: object, decoder: object, signatures: object, labels: object
) -> None:
    """Raise `TypeError` where an argument is of another kind altogether."""
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


def check_exact(index: object) -> None:
    """Raise `TypeError` unless `index` is a gallery that a graph can hold."""
    if not isinstance(index, ExactIndex):
        raise TypeError(
            "A gallery in the graph has an exact first stage, as ExactIndex has. "
            f"Received: {type(index).__name__}. "
            "Build one of the same embeddings: ExactIndex.build(gallery, schedule, ids)."
        )


def served_dims(
    asked: Sequence[int] | None, trained: tuple[int, ...] | None, width: int
) -> tuple[int, ...]:
    """The dims to export: those asked for, or all that the head has, or log-spaced ones."""
    known = trained or log_spaced_dims(width)
    if asked is None:
        return known
    if not isinstance(asked, Iterable):
        check_dims(asked)  # which refuses it
    asked = tuple(asked)
    try:
        chosen = check_dims(sorted(set(asked)))
    except TypeError:  # of several types, which have no order
        chosen = check_dims(asked)
    if any(d not in known if trained else d > width for d in chosen):
        raise ValueError(
            f"dims must be dims of the model: {known if trained else f'1..{width}'}. "
            f"Received: dims={asked}. Leave dims out to export all of them."
        )
    return chosen


def quality_by_dim(
    quality: Mapping[int, Mapping[str, float]], dims: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """Quality as JSON: measures come as NumPy scalars, or as a backend's own.

    Raises:
        ValueError: If it is no measures by dim, one is not finite, or a dim is not exported.
    """
    try:
        known = {
            int(dim): {measure: float(value) for measure, value in measures.items()}
            for dim, measures in quality.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "quality must give measures by dim, and a number by measure. "
            f"Received: quality={quality!r:.200}. Give for example {{8: {{'top1': 0.93}}}}."
        ) from error
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
            "Give one non-empty string of UTF-8 per class id, without line breaks or outer blanks."
        )


def check_policy_is_used(
    policy: CascadePolicy | None, signatures: Sequence[str], dims: tuple[int, ...]
) -> None:
    """Raise `ValueError` if no signature that is written answers by the policy.

    Without `classify_adaptive` its temperatures may still be wanted.
    """
    if policy is None or contract.CLASSIFY_ADAPTIVE in signatures:
        return
    written = {dim for dim in dims if {contract.classify(dim), contract.head(dim)} & {*signatures}}
    written.add(dims[-1])  # of serving_default
    if all(stage.temperature == 1 for stage in policy.stages if stage.dim in written):
        raise ValueError(
            "policy is what classify_adaptive decides by, and its temperatures are those of "
            "classify_<m>. Received: a policy, and signatures that use neither. "
            "Add classify_adaptive to signatures, or leave policy out."
        )


def _is_class_name(label: object) -> bool:
    if not isinstance(label, str) or label != label.strip() or not label:
        return False
    try:
        encoded = label.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return not {*b"\r\n"} & {*encoded}
