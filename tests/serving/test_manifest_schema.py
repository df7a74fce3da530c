"""The manifest's JSON Schema beside the code: it accepts what we write, refuses what is broken."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import keras
import numpy as np
import pytest

import keras_mrl_serving
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl_export import export_saved_model
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from keras_mrl_serving.errors import ManifestError
from keras_mrl_serving.funnel import FunnelSchedule
from tests.helpers.manifests import (
    BY_HAND,
    CLASSIFIER,
    DEPTHS,
    ENCODER,
    EXITS,
    FUNNEL,
    INDEX,
    LEARNED,
    OVER_EXITS,
    REGRESSOR,
    TAGS,
    TEXT_INDEX,
    TEXTS,
    TWO_TOWERS,
    WRONG_VALUES,
    Json,
    places,
    with_value,
)

SCHEMA = json.loads((Path(keras_mrl_serving.__file__).parent / "manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

WRITTEN = {
    "encoder": ENCODER,
    "encoder that does not scale": replace(ENCODER, normalize=False, metric="dot"),
    "encoder of encoded images": replace(
        ENCODER,
        inputs={"inputs": {"dtype": "string", "shape": [None]}},
        decoder={"size": [32, 32]},
    ),
    "encoder of two towers": TWO_TOWERS,
    "encoder of texts": TEXTS,
    "encoder of texts without prompts": replace(
        TEXTS, preprocessor={**(TEXTS.preprocessor or {}), "prompts": {}, "lowercase": None}
    ),
    "encoder of images and texts": replace(
        TWO_TOWERS, other_tower={"inputs": TEXTS.inputs, "preprocessor": TEXTS.preprocessor}
    ),
    "classifier": CLASSIFIER,
    "classifier, policy by hand": replace(CLASSIFIER, cascade=BY_HAND.to_json()),
    "classifier without policy": replace(CLASSIFIER, cascade=None),
    "classifier of one stage": replace(
        CLASSIFIER, cascade=CascadePolicy((Stage(64, None),)).to_json()
    ),
    "classifier with exits": DEPTHS,
    "classifier with exits and a cascade over dims": replace(CLASSIFIER, exits=EXITS),
    "encoder with exits": replace(ENCODER, exits=EXITS),
    "classifier of several labels a row": TAGS,
    "regressor": REGRESSOR,
    "index": INDEX,
    "index exported with an encoder of texts": TEXT_INDEX,
    "index of a regressor": replace(INDEX, num_values=1),
    "index of one stage": replace(
        INDEX, funnel=FunnelSchedule(dims=(64,), shortlists=(), k=1).to_json()
    ),
    "of a later writer": replace(ENCODER, extra={"colour": ["green"], "layers": {"exit": 3}}),
}


def is_valid(manifest: Any) -> bool:
    return VALIDATOR.is_valid(manifest)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_its_properties_are_the_manifest_s_fields() -> None:
    ours = {field.name: field for field in fields(Manifest) if field.name != "extra"}
    assert set(SCHEMA["properties"]) == set(ours)
    minimal = json.loads(ENCODER.to_json())
    for name, rule in SCHEMA["properties"].items():
        if name == "schema":
            continue
        is_required = name in SCHEMA["required"]
        assert is_required is ("default" not in rule), name
        if not is_required:
            assert rule["default"] == minimal[name], name  # the encoder leaves all of them out


def test_its_stages_reports_and_funnels_are_those_of_the_code() -> None:
    of_dims, of_exits = LEARNED.to_json(), OVER_EXITS.to_json()
    cascade = SCHEMA["$defs"]["cascade"]["properties"]
    assert set(cascade) == {*of_dims, "accuracy_drop_guarantee"}
    stage = cascade["stages"]["items"]["properties"]
    assert set(stage) == set(of_dims["stages"][0])
    cascade = SCHEMA["$defs"]["exit_cascade"]["properties"]
    assert set(cascade) == set(of_exits)
    stage = cascade["exit_stages"]["items"]["properties"]
    assert set(stage) == {*of_exits["exit_stages"][0], "relative_cost"}
    promise = SCHEMA["$defs"]["accuracy_drop_guarantee"]["properties"]
    assert set(promise) == set(of_exits["accuracy_drop_guarantee"])
    funnel = SCHEMA["$defs"]["funnel"]["properties"]
    assert set(funnel) == set(FUNNEL.to_json())


def test_its_preprocessors_are_those_of_the_contract() -> None:
    preprocessor = SCHEMA["$defs"]["preprocessor"]["properties"]
    assert TEXTS.preprocessor is not None
    assert set(preprocessor) == set(TEXTS.preprocessor)


def properties_below(schema: Any) -> Iterator[tuple[str, Json]]:
    """Return every property with its rule; conditions only name properties described elsewhere."""
    if not isinstance(schema, dict):
        return
    for name, rule in schema.get("properties", {}).items():
        yield name, rule
        yield from properties_below(rule)
    for key in ("items", "additionalProperties"):
        yield from properties_below(schema.get(key))


@pytest.mark.parametrize("part", [SCHEMA, *SCHEMA["$defs"].values()])
def test_every_property_is_described(part: Json) -> None:
    for name, rule in properties_below(part):
        assert rule["description"].endswith("."), name
    for rule in SCHEMA["allOf"]:
        assert rule["description"].endswith(".")


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_is_valid(name: str) -> None:
    text = WRITTEN[name].to_json()
    VALIDATOR.validate(json.loads(text))
    assert Manifest.from_json(text) == WRITTEN[name]


def test_the_manifests_of_the_other_tests_are_valid(manifests: Mapping[str, Manifest]) -> None:
    for manifest in manifests.values():
        VALIDATOR.validate(json.loads(manifest.to_json()))


def test_what_an_export_writes_is_valid(tmp_path: Path) -> None:
    backbone = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(8)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(num_classes=3, dims=(2, 8)))
    images = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    logits = model.predict(images, verbose=0)
    version = export_saved_model(
        model,
        tmp_path / "toy",
        sample=images,
        policy=CascadePolicy.learn(logits, [0, 1, 2, 0, 1, 2], (2, 8)),
        labels=["lynx", "ibex", "otter"],
        quality={2: {"top1": 0.5}},
    )
    written = json.loads((version / MANIFEST_FILE).read_text())
    VALIDATOR.validate(written)
    assert written["cascade"]
    assert written["top_k"] == 3
    assert written["model_id"]


def test_only_what_a_reader_needs_is_required() -> None:
    written = json.loads(ENCODER.to_json())
    least = {name: written[name] for name in SCHEMA["required"]}
    assert is_valid(least)
    assert Manifest.from_json(json.dumps(least)) == ENCODER
    for name in SCHEMA["required"]:
        rest = {key: value for key, value in least.items() if key != name}
        assert not is_valid(rest), name
        with pytest.raises(ManifestError):
            Manifest.from_json(json.dumps(rest))


def changed(manifest: Manifest, path: str, value: Any) -> Json:
    """The JSON of `manifest` with another value at a path such as `cascade.stages.0.dim`."""
    place = tuple(int(key) if key.isdecimal() else key for key in path.split("."))
    json_object: Json = with_value(json.loads(manifest.to_json()), place, value)
    return json_object


def refused_by_the_reader(manifest: Json) -> bool:
    """Whether a client of ours would refuse it: as a manifest, a policy or a schedule."""
    try:
        read = Manifest.from_json(json.dumps(manifest))
        if read.adaptive_cascade is not None:
            CascadePolicy.from_json(read.adaptive_cascade)
        if read.funnel is not None:
            FunnelSchedule.from_json(read.funnel)
    except ManifestError:
        return True
    return False


# The schema and the reader refuse these.
BROKEN: list[tuple[Manifest, str, Any]] = [
    (ENCODER, "schema", 2),
    (ENCODER, "schema", "1"),
    (ENCODER, "kind", "transformer"),
    (ENCODER, "metric", "euclid"),
    (ENCODER, "activation", "Softmax"),
    (ENCODER, "dims", 8),
    (ENCODER, "dims", []),
    (ENCODER, "dims", [0, 64]),
    (ENCODER, "dims", [8, 8, 64]),
    (ENCODER, "dims", ["8", "64"]),
    (ENCODER, "inputs", None),
    (ENCODER, "inputs.image", {"dtype": "float32"}),
    (ENCODER, "inputs.image.dtype", 1),
    (ENCODER, "inputs.image.shape", 4),
    (ENCODER, "model_id", "5"),
    (ENCODER, "model_id", 1.5),
    (TEXTS, "preprocessor", "wordpiece"),
    (TEXTS, "preprocessor.tokenizer", 3),
    (TEXTS, "preprocessor.vocabulary_size", "30522"),
    (TEXTS, "preprocessor.sequence_length", None),
    (TEXTS, "preprocessor.lowercase", "yes"),
    (TEXTS, "preprocessor.prompts", ["query: "]),
    (TEXTS, "preprocessor.prompts.query", None),
    (TEXTS, "preprocessor.prompts", {"query\n": "query: "}),
    (TEXTS, "preprocessor.operations", "FastBertNormalize"),
    (TEXTS, "preprocessor.tensorflow_text", 2.21),
    (TEXTS, "inputs.text.dtype", "int32"),
    (TEXTS, "inputs.title", {"dtype": "string", "shape": [None]}),
    (TEXT_INDEX, "prompt", 3),
    (CLASSIFIER, "weights", 1.0),
    (CLASSIFIER, "cascade.stages", []),
    (CLASSIFIER, "cascade.stages.0.threshold", None),
    (CLASSIFIER, "cascade.stages.2.threshold", 0.5),
    (CLASSIFIER, "cascade.stages.0.dim", "8"),
    (CLASSIFIER, "cascade.stages.1", {"dim": 16}),
    (CLASSIFIER, "cascade.stages.0.temperature", 0),
    (CLASSIFIER, "cascade.confidence", "surprise"),
    (DEPTHS, "exits", [EXITS[-1]]),
    (DEPTHS, "exits.0.name", 3),
    (DEPTHS, "exits.0", {"layer": "conv3_out"}),
    (DEPTHS, "exits.1.layer", 3),
    (DEPTHS, "exits.1.parameters", 1.5),
    (DEPTHS, "exits.1.multiply_adds", "5e6"),
    (DEPTHS, "exits.1.milliseconds", {"8": "2"}),
    (DEPTHS, "exit_cascade.exit_stages", []),
    (DEPTHS, "exit_cascade.exit_stages.0", {"dim": 8, "threshold": 0.5}),
    (DEPTHS, "exit_cascade.exit_stages.0.threshold", None),
    (DEPTHS, "exit_cascade.exit_stages.0.relative_cost", "0.5"),
    (DEPTHS, "exit_cascade.accuracy_drop_guarantee", {"risk": 0.01}),
    (DEPTHS, "exit_cascade.confidence", "surprise"),
    (DEPTHS, "cascade", BY_HAND.to_json()),
    (CLASSIFIER, "exit_cascade", OVER_EXITS.to_json()),  # without exits
    (REGRESSOR, "num_values", 1.5),
    (INDEX, "funnel.k", 0),
    (INDEX, "funnel.k", True),
    (INDEX, "funnel.shortlists", [0]),
    (INDEX, "funnel", {"dims": [8, 64]}),
]
# The schema refuses these; a reader may ignore them, because it does not need the value.
BROKEN_FOR_A_WRITER: list[tuple[Manifest, str, Any]] = [
    (INDEX, "funnel.dims", [64, 64]),  # of a local index: the export refuses it
    (ENCODER, "name", 3),
    (ENCODER, "fingerprint", ""),
    (ENCODER, "width", "64"),
    (ENCODER, "inputs", {}),
    (ENCODER, "inputs.image.shape", [1, 32, 32, 3]),
    (ENCODER, "metric", "dot"),  # with normalize
    (ENCODER, "made_with.keras", 3),
    (ENCODER, "num_classes", 5),
    (ENCODER, "model_id", 0),
    (ENCODER, "model_id", 2**31),
    (ENCODER, "decoder", "jpeg"),
    (TEXTS, "preprocessor.kind", "audio"),
    (TEXTS, "preprocessor.tokenizer", "letters"),
    (TEXTS, "preprocessor.sequence_length", 0),
    (TEXTS, "preprocessor.pooling", "median"),
    (CLASSIFIER, "num_classes", None),
    (CLASSIFIER, "top_k", 0),
    (CLASSIFIER, "labels", "yes"),
    (CLASSIFIER, "activation", "sigmoid"),  # with a cascade
    (TAGS, "activation", "none"),
    (TAGS, "num_values", 1),
    (TAGS, "cascade", BY_HAND.to_json()),
    (REGRESSOR, "num_values", None),
    (REGRESSOR, "num_values", 0),
    (REGRESSOR, "num_classes", 2),
    (REGRESSOR, "top_k", 1),
    (REGRESSOR, "activation", "softmax"),
    (REGRESSOR, "labels", True),
    (ENCODER, "num_values", 1),
    (DEPTHS, "activation", "sigmoid"),
    (DEPTHS, "exits.1.milliseconds", {"08": 2}),
    (DEPTHS, "exits.1.parameters", -1),
    (DEPTHS, "exit_cascade.exit_stages.0.relative_cost", -1),
    (ENCODER, "exit_cascade", OVER_EXITS.to_json()),
    (CLASSIFIER, "quality", {"08": {"top1": 1.0}}),
    (CLASSIFIER, "quality", {"8": 1.0}),
    (CLASSIFIER, "cascade.accuracy", 1.5),
    (INDEX, "funnel", None),
    (INDEX, "size", None),
]
# Only a reader refuses these: a JSON schema cannot express the rule.
BEYOND_THE_SCHEMA: list[tuple[Manifest, str, Any]] = [
    (ENCODER, "dims", [16, 8, 64]),
    (ENCODER, "width", 16),
    (CLASSIFIER, "cascade.stages", [{"dim": 8, "threshold": None}, {"dim": 64, "threshold": 0.5}]),
    (CLASSIFIER, "cascade.stages.0.dim", 32),
    (DEPTHS, "exits", [*EXITS[1:], EXITS[0]]),
    (DEPTHS, "exits", [*EXITS[1:], EXITS[-1]]),
    (DEPTHS, "exits.0.name", "conv3_out"),
    (DEPTHS, "exit_cascade.exit_stages.0.exit", "conv4_out"),
    (DEPTHS, "exit_cascade.exit_stages.1.exit", "last"),
    (INDEX, "funnel.dims", [64, 8]),
    (INDEX, "funnel.shortlists", []),
    (INDEX, "funnel.shortlists", [5]),
]


def label(value: Any) -> str | None:
    return value.kind if isinstance(value, Manifest) else repr(value)


@pytest.mark.parametrize(("manifest", "path", "value"), BROKEN, ids=label)
def test_what_is_broken_is_refused_by_both(manifest: Manifest, path: str, value: Any) -> None:
    broken = changed(manifest, path, value)
    assert not is_valid(broken)
    assert refused_by_the_reader(broken)


@pytest.mark.parametrize(("manifest", "path", "value"), BROKEN_FOR_A_WRITER, ids=label)
def test_the_schema_is_stricter_with_a_writer(manifest: Manifest, path: str, value: Any) -> None:
    assert not is_valid(changed(manifest, path, value))


@pytest.mark.parametrize(("manifest", "path", "value"), BEYOND_THE_SCHEMA, ids=label)
def test_what_a_schema_cannot_say_a_reader_refuses(
    manifest: Manifest, path: str, value: Any
) -> None:
    broken = changed(manifest, path, value)
    assert is_valid(broken)
    assert refused_by_the_reader(broken)


# Every value of whole manifests replaced, every key removed: refused, or still of its types.

# Without the rules about several values, which concern a writer alone.
TYPES_VALIDATOR = jsonschema.Draft202012Validator({**SCHEMA, "allOf": []})

PROMISED: Json = {"risk": 0.05, "delta": 0.1, "size": 500, "errors": 2}
WHOLE: dict[str, Json] = {
    "classifier": json.loads(
        replace(
            CLASSIFIER,
            cascade={**(CLASSIFIER.cascade or {}), "guarantee": PROMISED},
            decoder={"size": [32, 32]},
        ).to_json()
    ),
    "exits": json.loads(DEPTHS.to_json()),
    "texts": json.loads(TEXT_INDEX.to_json()),
    "index": json.loads(INDEX.to_json()),
}


def errors_of_type(errors: Any) -> list[str]:
    """Return where a validator that is not ours finds wrong types and missing keys."""
    return [
        error.json_path
        for error in errors
        if (error.validator in ("type", "required") and "prefixItems" not in error.schema_path)
        or (error.validator == "anyOf" and not has_alternative(error))
    ]


def has_alternative(error: Any) -> bool:
    """Whether one of the alternatives of `anyOf` has no error of type."""
    ways = {each.schema_path[0] for each in error.context}
    return any(
        not errors_of_type(each for each in error.context if each.schema_path[0] == way)
        for way in ways
    )


def read(text: str) -> Manifest | None:
    """Return the manifest, or None if it is refused, which is done in three sentences."""
    refusal = ""
    try:
        manifest = Manifest.from_json(text)
    except ManifestError as error:
        refusal = str(error)
    if refusal:
        assert ". Received: " in refusal
        assert refusal.endswith((".export_saved_model.", "or a later one."))
        return None
    assert Manifest.from_json(manifest.to_json()) == manifest
    return manifest


@pytest.mark.parametrize("name", WHOLE)
def test_a_manifest_with_one_value_replaced_is_refused_or_of_its_types(name: str) -> None:
    whole = WHOLE[name]
    outcomes: dict[bool, int] = {True: 0, False: 0}
    assert read(json.dumps(whole)) is not None
    for place in places(whole):
        for value in WRONG_VALUES:
            damaged = with_value(whole, place, value)
            manifest = read(json.dumps(damaged))
            outcomes[manifest is None] += 1
            if manifest is not None:
                wrong = errors_of_type(TYPES_VALIDATOR.iter_errors(damaged))
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
            assert not errors_of_type(TYPES_VALIDATOR.iter_errors(damaged)), place


def test_a_manifest_cut_off_anywhere_is_refused() -> None:
    text = json.dumps(WHOLE["classifier"])
    for end in range(0, len(text), 7):
        assert read(text[:end]) is None


def test_bytes_that_are_no_text_are_refused() -> None:
    data = json.dumps(WHOLE["classifier"]).encode()
    for broken in (data.replace(b"birds", b"b\xffrds"), data[:-1] + b"\x00}", data.hex().encode()):
        with pytest.raises(ManifestError):
            Manifest.from_json(broken)
