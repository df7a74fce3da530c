"""Every value of whole manifests replaced, every key removed: refused, or still of its types."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import ManifestError
from tests.serving.test_manifest_schema import CLASSIFIER, INDEX, SCHEMA, Json

# What depends on other values is a writer's business: see `test_manifest_schema`.
VALIDATOR = jsonschema.Draft202012Validator({**SCHEMA, "allOf": []})

PROMISED: Json = {"risk": 0.05, "delta": 0.1, "size": 500, "errors": 2}
WHOLE: dict[str, Json] = {
    "classifier": json.loads(
        replace(
            CLASSIFIER,
            cascade={**(CLASSIFIER.cascade or {}), "guarantee": PROMISED},
            decoder={"size": [32, 32]},
        ).to_json()
    ),
    "index": json.loads(INDEX.to_json()),
}
VALUES: list[Any] = [
    None, True, 0, -1, 2**70, 10**400, 1.5, "", "8", "\ud800", [], [None], ["8"], [[1]], {},
    {"8": 1}, {"": {"": {}}},
]  # fmt: skip


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a manifest stand, its own place among them."""
    yield above
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*above, key))


def changed(manifest: Json, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    whole: Any = copy.deepcopy(manifest)
    parent = whole
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return whole


def errors_of_type(errors: Any) -> list[str]:
    """What a validator that is not ours finds of wrong types and missing keys."""
    return [
        error.json_path
        for error in errors
        if (error.validator in ("type", "required") and "prefixItems" not in error.schema_path)
        or (error.validator == "anyOf" and not alternatives(error))
    ]


def alternatives(error: Any) -> bool:
    """Whether one of two alternatives has no error of type."""
    ways = {found.schema_path[0] for found in error.context}
    return any(
        not errors_of_type(found for found in error.context if found.schema_path[0] == way)
        for way in ways
    )


def read(text: str) -> Manifest | None:
    refused = ""
    try:
        found = Manifest.from_json(text)
    except ManifestError as error:
        refused = str(error)
    if refused:
        assert ". Received: " in refused
        assert refused.endswith((".export_saved_model.", "or a later one."))
        return None
    assert Manifest.from_json(found.to_json()) == found
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_a_manifest_with_one_value_replaced_is_refused_or_of_its_types(name: str) -> None:
    whole = WHOLE[name]
    outcomes: dict[bool, int] = {True: 0, False: 0}
    assert read(json.dumps(whole)) is not None
    for place in places(whole):
        for value in VALUES:
            damaged = changed(whole, place, value)
            manifest = read(json.dumps(damaged))
            outcomes[manifest is None] += 1
            if manifest is not None:
                wrong = errors_of_type(VALIDATOR.iter_errors(damaged))
                assert not wrong, (place, value)
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize("name", WHOLE)
def test_a_manifest_with_one_key_removed_is_refused_or_of_its_types(name: str) -> None:
    whole = WHOLE[name]
    for place in places(whole):
        damaged = copy.deepcopy(whole)
        parent: Any = damaged
        for key in place[:-1]:
            parent = parent[key]
        if place:
            del parent[place[-1]]
        if read(json.dumps(damaged)) is not None:
            assert not errors_of_type(VALIDATOR.iter_errors(damaged)), place


def test_a_manifest_cut_off_anywhere_is_refused() -> None:
    text = json.dumps(WHOLE["classifier"])
    for end in range(0, len(text), 7):
        assert read(text[:end]) is None


def test_bytes_that_are_no_text_are_refused() -> None:
    data = json.dumps(WHOLE["classifier"]).encode()
    for broken in (data.replace(b"birds", b"b\xffrds"), data[:-1] + b"\x00}", data.hex().encode()):
        with pytest.raises(ManifestError):
            Manifest.from_json(broken)
