"""Payloads of the rows in Qdrant: a JSON object each, with the id of a row whose id is a string."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from .ids import is_name, is_text

Payload = Mapping[str, Any]

NAME_KEY = "keras_mrl_id"  # the id of a row whose id is a string


def check_payloads(
    payloads: Sequence[Payload] | None, ids: npt.NDArray[Any]
) -> Sequence[Payload] | None:
    """Return the payloads to write: those given, with the strings that are ids.

    Engines change in silence what is not JSON, each in its own way: one makes a float of 2**70 and
    a list of bytes.

    Args:
        payloads: A JSON object per row; None for none.
        ids: Of the rows.

    Raises:
        ValueError: If they are not one JSON object per row.

    Examples:
        >>> check_payloads([{"kind": "bird"}], np.array(["wren"], object))
        [{'kind': 'bird', 'keras_mrl_id': 'wren'}]
    """
    if payloads is not None:
        rule = f"payloads must be one JSON object per row, without {NAME_KEY!r}."
        remedy = "Give dicts, one per row, or none."
        if len(payloads) != len(ids):
            raise ValueError(f"{rule} Received: {len(payloads)} for {len(ids)} rows. {remedy}")
        for payload in payloads:
            if not isinstance(payload, Mapping) or NAME_KEY in payload:
                raise ValueError(f"{rule} Received: {payload!r:.80}. {remedy}")
            if not is_json(payload):
                raise ValueError(
                    f"{rule} Received: {payload!r:.80}. JSON has strings, finite numbers (integers "
                    "of 64 bits), true, false, null, lists, and objects whose keys are strings: "
                    "write other values as one of these."
                )
    if not is_text(ids):
        return payloads
    names = ids.tolist()
    given: Sequence[Payload] = [{}] * len(names) if payloads is None else payloads
    return [{**some, NAME_KEY: name} for some, name in zip(given, names, strict=True)]


def is_json(value: object) -> bool:
    """Return whether JSON holds a value as it is.

    Examples:
        >>> is_json({"kind": ["bird", 2.5, None]}), is_json({"seen": 2**70}), is_json(b"bird")
        (True, False, False)
    """
    try:
        if isinstance(value, Mapping):
            return all(_is_string(key) and is_json(some) for key, some in value.items())
        if isinstance(value, list | tuple):
            return all(map(is_json, value))
    except RecursionError:  # a list that holds itself
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or _is_string(value)


def _is_string(value: object) -> bool:
    return value == "" or is_name(value)


def without_name(payload: Payload | None) -> dict[str, Any]:
    """Return the payload of a row as it was given.

    Examples:
        >>> without_name({"kind": "bird", "keras_mrl_id": "wren"})
        {'kind': 'bird'}
    """
    return {key: value for key, value in (payload or {}).items() if key != NAME_KEY}


def name_in(payload: Payload | None) -> str:
    """Return the string that is the id of a row; "" where there is none.

    Examples:
        >>> name_in({"kind": "bird", "keras_mrl_id": "wren"}), name_in(None)
        ('wren', '')
    """
    name = (payload or {}).get(NAME_KEY)
    return name if isinstance(name, str) else ""
