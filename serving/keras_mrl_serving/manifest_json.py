"""The text of a manifest: a JSON object whose values are of the types that its schema names."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from math import isfinite
from typing import Any

from .errors import ManifestError

SCHEMA = 1

_AGAIN = "Export the model again with keras_mrl_export.export_saved_model."
_MOST_DEPTH = 32  # what copies or writes a manifest calls itself once or more for each level


def parse_manifest(text: str | bytes) -> dict[str, Any]:
    """Return the object of a manifest, every known value of it of its type.

    What the schema says beyond types and required keys is left to who uses a value.

    Args:
        text: The JSON.

    Raises:
        ManifestError: If it is no manifest, one of another schema, or a value is of another type.

    Examples:
        >>> parse_manifest('{"schema": 2}')
        Traceback (most recent call last):
        ...
        keras_mrl_serving.errors.ManifestError: This client reads manifests of schema 1. Received: \
schema 2. Install the version of keras-mrl that exported the model, or a later one.
    """
    try:
        fields: dict[str, Any] = json.loads(text, parse_float=_finite, parse_constant=_finite)
        schema = fields["schema"]
        _check_depth(fields)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError(
            "A manifest is a JSON object with a schema. "
            f"Received: {text!r:.80} ({type(error).__name__}: {error}). {_AGAIN}"
        ) from error
    if type(schema) is not int or schema != SCHEMA:
        raise ManifestError(
            f"This client reads manifests of schema {SCHEMA}. Received: schema {schema!r:.80}. "
            "Install the version of keras-mrl that exported the model, or a later one."
        )
    _check(fields, _rules(), "")
    return fields


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is no number of JSON, or too large a one")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MOST_DEPTH):
        level = [part for parent in level for part in _parts(parent)]
    if level:
        raise ValueError(f"it is nested more than {_MOST_DEPTH} levels deep")


def _parts(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


@cache
def _rules() -> dict[str, Any]:
    from importlib.resources import files  # costs more than the rest of this module

    found: dict[str, Any] = json.loads(
        (files("keras_mrl_serving") / "manifest.schema.json").read_text("utf-8")
    )
    return found


def _check(value: Any, rule: Mapping[str, Any], place: str) -> None:
    rule, may_be_null = _resolved(rule)
    if value is None and may_be_null:
        return
    named = rule.get("type", [])
    kinds = [named] if isinstance(named, str) else named
    if kinds and not any(_IS[kind](value) for kind in kinds):
        known = " or ".join(_CALLED[kind] for kind in [*kinds, *["null"] * may_be_null])
        raise ManifestError(
            f"{place} of a manifest must be {known}. Received: {value!r:.80}. {_AGAIN}"
        )
    if isinstance(value, dict):
        of_any, of_each = rule.get("additionalProperties", {}), rule.get("properties", {})
        prefix = f"{place}." if place else ""
        for key in rule.get("required", ()):
            if key not in value:
                raise ManifestError(
                    f"{prefix}{key} of a manifest must be given. Received: none. {_AGAIN}"
                )
        for key, part in value.items():
            _check(part, of_each.get(key, of_any), f"{prefix}{key}")
    elif isinstance(value, list):
        for position, part in enumerate(value):
            _check(part, rule.get("items", {}), f"{place}[{position}]")


def _resolved(rule: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """What a rule comes to: the schema's `anyOf` always is "this, or null"."""
    may_be_null = "anyOf" in rule
    rule = rule["anyOf"][0] if may_be_null else rule
    if "$ref" in rule:
        rule = _rules()["$defs"][rule["$ref"].rpartition("/")[2]]
    return rule, may_be_null


def _is_number(value: Any) -> bool:
    most = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


_IS: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int and -(2**63) <= value < 2**63,
    "number": _is_number,
    "null": lambda value: value is None,
}
_CALLED = {
    "object": "an object",
    "array": "an array",
    "string": "a string",
    "boolean": "true or false",
    "integer": "an integer of 64 bits",
    "number": "a number",
    "null": "null",
}
