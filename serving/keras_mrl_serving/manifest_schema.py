"""The JSON text of a manifest, checked against `manifest.schema.json`.

A reader checks types, names and required keys here, so that no code that uses a value meets one of
another type. Rules between values are `contract`'s.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from .errors import ManifestError
from .untrusted import parse_json

SCHEMA = 1

EXPORT_AGAIN = "Export the model again with keras_mrl_export.export_saved_model."

# An exported model's manifest has about 2 KB. JSON may take forty times its size in memory.
LARGEST_MANIFEST_BYTES = 2**18


def parse_manifest(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object of a manifest, with every value of the type that its schema names.

    Types, names and required keys are checked here; the code that uses a value checks the rest.

    Args:
        text: The JSON.

    Raises:
        ManifestError: If it is not a manifest, or one of another schema, or a value has another
            type.

    Examples:
        >>> parse_manifest('{"schema": 2}')
        Traceback (most recent call last):
        ...
        keras_mrl_serving.errors.ManifestError: This client reads manifests of schema 1. Received: \
schema 2. Install the version of keras-mrl that exported the model, or a later one.
    """
    try:
        if len(text) > LARGEST_MANIFEST_BYTES:
            raise ValueError(f"{len(text)} bytes are more than {LARGEST_MANIFEST_BYTES}")
        fields: dict[str, Any] = parse_json(text)
        schema = fields["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(
            "A manifest is a JSON object with a schema. "
            f"Received: {text!r:.80} ({type(error).__name__}: {error}). {EXPORT_AGAIN}"
        ) from error
    if type(schema) is not int or schema != SCHEMA:
        raise ManifestError(
            f"This client reads manifests of schema {SCHEMA}. Received: schema {schema!r:.80}. "
            "Install the version of keras-mrl that exported the model, or a later one."
        )
    _check(fields, _rules(), "")
    return fields


@cache
def _rules() -> dict[str, Any]:
    from importlib.resources import files  # slower to import than the rest of this module

    text = (files("keras_mrl_serving") / "manifest.schema.json").read_text("utf-8")
    rules: dict[str, Any] = json.loads(text)
    return rules


def _check(value: Any, rule: Mapping[str, Any], place: str) -> None:
    rule, may_be_null = _resolved(rule)
    if value is None and may_be_null:
        return
    types = rule.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_TYPES[name][1](value) for name in types):
        expected = " or ".join(_TYPES[name][0] for name in [*types, *["null"] * may_be_null])
        raise ManifestError(
            f"{place} of a manifest must be {expected}. Received: {value!r:.80}. {EXPORT_AGAIN}"
        )
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        raise ManifestError(
            f"{place} of a manifest must be a name of 1 to 200 characters that print. "
            f"Received: {value!r:.80}. {EXPORT_AGAIN}"
        )
    if isinstance(value, dict):
        rule_of_key, other_rule = rule.get("properties", {}), rule.get("additionalProperties", {})
        prefix = f"{place}." if place else ""
        for key in rule.get("required", ()):
            if key not in value:
                raise ManifestError(
                    f"{prefix}{key} of a manifest must be given. Received: none. {EXPORT_AGAIN}"
                )
        for key, child in value.items():
            if "$ref" in rule.get("propertyNames", {}):
                _check(key, rule["propertyNames"], f"A key of {place}")
            _check(child, rule_of_key.get(key, other_rule), f"{prefix}{key}")
    elif isinstance(value, list):
        for position, child in enumerate(value):
            _check(child, rule.get("items", {}), f"{place}[{position}]")


def _resolved(rule: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return the rule that a rule refers to, and whether the value may be null.

    The schema uses `anyOf` only for "this, or null".
    """
    may_be_null = "anyOf" in rule
    rule = rule["anyOf"][0] if may_be_null else rule
    if "$ref" in rule:
        rule = _rules()["$defs"][rule["$ref"].rpartition("/")[2]]
    return rule, may_be_null


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and -largest <= value <= largest


# The types of JSON: how an error names each, and whether a value is of it.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "object": ("an object", lambda value: isinstance(value, dict)),
    "array": ("an array", lambda value: isinstance(value, list)),
    "string": ("a string", lambda value: isinstance(value, str)),
    "boolean": ("true or false", lambda value: isinstance(value, bool)),
    "integer": (
        "an integer of 64 bits",
        lambda value: type(value) is int and -(2**63) <= value < 2**63,
    ),
    "number": ("a number", _is_number),
    "null": ("null", lambda value: value is None),
}
