"""Which signatures a version is written with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from keras_mrl_serving import contract
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.index import ExactIndex

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
