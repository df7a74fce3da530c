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

SCHEMA = json.loads((Path(keras_mrl_serving.__file__).parent / "manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

Json = dict[str, Any]
SHARED: Json = {
    "name": "birds",
    "fingerprint": "5e1f",
    "dims": (8, 16, 64),
    "width": 64,
    "inputs": {"image": {"dtype": "float32", "shape": [None, 32, 32, 3]}},
    "made_with": {"keras_mrl": "0.1.0", "trained_on": "jax"},
}
LOGITS = np.random.default_rng(0).normal(size=(40, 3, 5))
LEARNED = CascadePolicy.learn(LOGITS, np.argmax(LOGITS[:, -1], axis=-1), SHARED["dims"])
BY_HAND = CascadePolicy((Stage(8, 0.9, temperature=1.5), Stage(64, None)))
FUNNEL = FunnelSchedule(dims=(8, 64), shortlists=(200,), k=10)

ENCODER = Manifest(**SHARED, kind="encoder")
CLASSIFIER = Manifest(
    **SHARED,
    kind="classifier",
    activation="softmax",
    num_classes=5,
    top_k=3,
    labels=True,
    weights=(2.0, 1.0, 0.0),
    tied=True,
    cascade=LEARNED.to_json(),
    quality={"8": {"top1": 0.5, "map10": 0.25}, "64": {"top1": 1.0}},
)
INDEX = Manifest(
    **{**SHARED, "inputs": {"embedding": {"dtype": "float32", "shape": [None, 64]}}},
    kind="index",
    encoder_fingerprint="5e1f",
    funnel=FUNNEL.to_json(),
    size=1_281_167,
)
WRITTEN = {
    "encoder": ENCODER,
    "encoder that does not scale": replace(ENCODER, normalize=False, metric="dot"),
    "encoder of encoded images": replace(
        ENCODER,
        inputs={"inputs": {"dtype": "string", "shape": [None]}},
        decoder={"size": [32, 32]},
    ),
    "classifier": CLASSIFIER,
    "classifier, policy by hand": replace(CLASSIFIER, cascade=BY_HAND.to_json()),
    "classifier without policy": replace(CLASSIFIER, cascade=None),
    "classifier of one stage": replace(
        CLASSIFIER, cascade=CascadePolicy((Stage(64, None),)).to_json()
    ),
    "index": INDEX,
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


def test_its_stages_reports_and_funnels_are_those_that_are_written() -> None:
    cascade = SCHEMA["$defs"]["cascade"]["properties"]
    assert set(cascade) == set(LEARNED.to_json())
    stage = cascade["stages"]["items"]["properties"]
    assert set(stage) == {field.name for field in fields(Stage)}
    funnel = SCHEMA["$defs"]["funnel"]["properties"]
    assert set(funnel) == set(FUNNEL.to_json())


def properties_below(schema: Any) -> Iterator[tuple[str, Json]]:
    """Every property with its rule, but those of conditions: they speak of described ones."""
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
    written: Json = json.loads(manifest.to_json())
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
    place: Any = written
    for key in parents:
        place = place[key]
    place[last] = copy.deepcopy(value)
    return written


def refused_by_the_reader(manifest: Json) -> bool:
    """Whether a client of ours would refuse it: as a manifest, a policy or a schedule."""
    try:
        read = Manifest.from_json(json.dumps(manifest))
        if read.cascade is not None:
            CascadePolicy.from_json(read.cascade)
        if read.funnel is not None:
            FunnelSchedule.from_json(read.funnel)
    except ManifestError:
        return True
    return False


# Both refuse these.
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
    (CLASSIFIER, "weights", 1.0),
    (CLASSIFIER, "cascade.stages", []),
    (CLASSIFIER, "cascade.stages.0.threshold", None),
    (CLASSIFIER, "cascade.stages.2.threshold", 0.5),
    (CLASSIFIER, "cascade.stages.0.dim", "8"),
    (CLASSIFIER, "cascade.stages.1", {"dim": 16}),
    (CLASSIFIER, "cascade.stages.0.temperature", 0),
    (CLASSIFIER, "cascade.confidence", "surprise"),
    (INDEX, "funnel.k", 0),
    (INDEX, "funnel.k", True),
    (INDEX, "funnel.shortlists", [0]),
    (INDEX, "funnel.dims", [64, 64]),
    (INDEX, "funnel", {"dims": [8, 64]}),
]
# The schema refuses these; a reader may, but need not: it reads on without relying on them.
BROKEN_FOR_A_WRITER: list[tuple[Manifest, str, Any]] = [
    (ENCODER, "name", 3),
    (ENCODER, "fingerprint", ""),
    (ENCODER, "width", "64"),
    (ENCODER, "inputs", {}),
    (ENCODER, "inputs.image.shape", [1, 32, 32, 3]),
    (ENCODER, "metric", "dot"),  # with normalize
    (ENCODER, "made_with.keras", 3),
    (ENCODER, "num_classes", 5),
    (ENCODER, "decoder", "jpeg"),
    (CLASSIFIER, "num_classes", None),
    (CLASSIFIER, "top_k", 0),
    (CLASSIFIER, "labels", "yes"),
    (CLASSIFIER, "activation", "sigmoid"),  # with a cascade
    (CLASSIFIER, "quality", {"08": {"top1": 1.0}}),
    (CLASSIFIER, "quality", {"8": 1.0}),
    (CLASSIFIER, "cascade.accuracy", 1.5),
    (INDEX, "funnel", None),
    (INDEX, "size", None),
]
# The rules the schema's own description leaves to a reader.
BEYOND_THE_SCHEMA: list[tuple[Manifest, str, Any]] = [
    (ENCODER, "dims", [16, 8, 64]),
    (ENCODER, "width", 16),
    (CLASSIFIER, "cascade.stages", [{"dim": 8, "threshold": None}, {"dim": 64, "threshold": 0.5}]),
    (CLASSIFIER, "cascade.stages.0.dim", 32),
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


@pytest.mark.parametrize("text", ["null", "[]", "{}", "1"])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    assert not is_valid(json.loads(text))
    with pytest.raises(ManifestError):
        Manifest.from_json(text)
