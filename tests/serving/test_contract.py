"""Signature names and manifests: what is read and what is refused."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import contract
from keras_mrl_serving.contract import Manifest, is_exit_name, is_model_name
from keras_mrl_serving.errors import (
    ManifestError,
    NoCascadeError,
    NoHeadError,
    NoIndexError,
    NoOtherTowerError,
    UnknownDimError,
    UnknownExitError,
    UnknownPromptError,
)
from tests.helpers.manifests import (
    CLASSIFIER,
    DEPTHS,
    ENCODER,
    EXITS,
    REGRESSOR,
    TAGS,
    TEXTS,
    TWO_TOWERS,
)

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

AGAIN = "Export the model again with keras_mrl_export.export_saved_model."
NEWER = "Install the version of keras-mrl that exported the model, or a later one."


@pytest.fixture
def manifest(manifests: Mapping[str, Manifest]) -> Manifest:
    return manifests["classifier"]


def test_the_signatures_have_the_names_of_the_contract() -> None:
    names = (contract.embed(8), contract.embed_other(8), contract.classify(8), contract.head(8))
    assert names == ("embed_8", "embed_other_8", "classify_8", "head_8")
    constants = (contract.DESCRIBE, contract.FEATURES, contract.CLASSIFY_ADAPTIVE)
    assert constants == ("describe", "features", "classify_adaptive")
    assert contract.SERVING_DEFAULT == "serving_default"
    assert contract.MANIFEST_FILE == "assets.extra/keras_mrl.json"


def test_an_exit_stands_in_the_name_of_a_signature_that_is_of_it() -> None:
    for name_of in (contract.embed, contract.classify, contract.regress):
        assert name_of(8, "conv3_out") == f"{name_of.__name__}_conv3_out_8"
        assert name_of(8, "last") == name_of(8, None) == name_of(8) == f"{name_of.__name__}_8"


@pytest.mark.parametrize("name", ["conv4_block6_out", "P2", "a.b-c", "layer_8", "others", "8_"])
def test_names_of_exits(name: str) -> None:
    assert is_exit_name(name)
    for other in ("", " ", f"{name} ", f"{name}/", f"{name}\n", f"ö{name}", "a" * 101):
        assert not is_exit_name(other)
    for taken in ("other", "adaptive", "8", "007"):
        assert not is_exit_name(taken)


@pytest.mark.parametrize("name", ["birds", "b", "7", "Birds-2.1_b", "a" * 300])
def test_names_of_models(name: str) -> None:
    assert is_model_name(name)
    for other in ("", " ", f"{name} ", f"_{name}", f"{name}.", f"{name}/", f"{name}\n", f"ö{name}"):
        assert not is_model_name(other)


def test_a_manifest_comes_back_from_its_json(manifest: Manifest) -> None:
    filled = replace(
        manifest,
        weights=(2.0, 1.0, 1.0),
        tied=True,
        normalize=False,
        metric="l2",
        funnel={"dims": [2, 8], "shortlists": [4], "k": 2},
        decoder={"kind": "jpeg"},
        inputs=TEXTS.inputs,
        preprocessor=TEXTS.preprocessor,
        prompt="passage: ",
        other_tower=TWO_TOWERS.other_tower,
        quality={"8": {"top1": 0.5}},
        encoder_fingerprint="a0",
        size=3,
        num_values=3,
        model_id=5,
        exits=EXITS,
        cascade=None,  # a manifest has one of the two
        exit_cascade=DEPTHS.exit_cascade,
        extra={"colour": ["grün"]},
    )
    default = Manifest(**{f.name: getattr(manifest, f.name) for f in fields(Manifest)[:7]})
    changed = {
        f.name for f in fields(Manifest) if getattr(filled, f.name) != default.__dict__[f.name]
    }
    assert {f.name for f in fields(Manifest)[7:]} - changed == {"schema", "cascade"}
    text = filled.to_json()
    assert "\n" not in text
    assert Manifest.from_json(text) == Manifest.from_json(text.encode()) == filled


def test_keys_of_a_later_writer_are_kept(manifest: Manifest) -> None:
    later = {**json.loads(manifest.to_json()), "colour": "green", "extra": {"a": 1}}
    read = Manifest.from_json(json.dumps(later))
    assert read.extra == {"colour": "green", "extra": {"a": 1}}
    assert replace(read, extra={}) == manifest
    assert json.loads(read.to_json()) == later


@pytest.mark.parametrize("schema", [0, 2, "1", None, True, 1.0, [1]])
def test_another_schema_is_refused(schema: object, manifest: Manifest, refuses: Refuses) -> None:
    text = json.dumps({**json.loads(manifest.to_json()), "schema": schema})
    rule = "This client reads manifests of schema 1."
    with refuses(ManifestError, f"{rule} Received: schema {schema!r}. {NEWER}"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ("", "'' (JSONDecodeError: Expecting value: line 1 column 1 (char 0))"),
        ("null", "'null' (TypeError: 'NoneType' object is not subscriptable)"),
        ("[]", "'[]' (TypeError: list indices must be integers or slices, not str)"),
        ("{}", "'{}' (KeyError: 'schema')"),
        (
            b"\xff",
            r"b'\xff' (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: "
            "invalid start byte)",
        ),
        ("9" * 100, f"'{'9' * 79} (TypeError: 'int' object is not subscriptable)"),
        (None, "None (TypeError: object of type 'NoneType' has no len())"),
        ("[]," * 99_999, f"'{'[],' * 26}[ (ValueError: 299997 bytes are more than 262144)"),
        (
            '{"schema": 1, "schema": 2}',
            """'{"schema": 1, "schema": 2}' (ValueError: a key stands twice in one object)""",
        ),
    ],
)
def test_what_is_no_manifest_is_refused(text: Any, received: str, refuses: Refuses) -> None:
    rule = "A manifest is a JSON object with a schema."
    with refuses(ManifestError, f"{rule} Received: {received}. {AGAIN}"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 99_999, "ValueError: "),
        ('{"schema": ' + "9" * 5000 + "}", "ValueError: "),
        (r'{"schema": 1, "name": "\ud800"}', "UnicodeEncodeError: .* surrogates not allowed"),
    ],
)
def test_what_no_exporter_writes_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ManifestError, match=rf"^A manifest is a JSON object .* \({reason}"):
        Manifest.from_json(text)


def test_a_manifest_that_no_client_would_read_is_not_written(
    manifest: Manifest, refuses: Refuses
) -> None:
    long = replace(manifest, quality={"8": {"x" * 2**18: 1.0}})
    text = (
        f"A manifest has at most 262144 bytes. Received: {len(manifest.to_json()) + 2**18 + 12} "
        "bytes for model 'toy'. Give fewer measures as quality, or shorter names."
    )
    with refuses(ManifestError, text):
        long.to_json()


@pytest.mark.parametrize(
    ("key", "value", "received"),
    [
        ("dims", [4, 2], "dims must be strictly increasing positive integers. "
         "Received: dims=(4, 2). Sort them and drop repeats: dims=(2, 4)"),
        ("dims", [], "dims must be strictly increasing positive integers. Received: dims=(). "
         "Give prefix lengths, for example dims=(8, 16, 32)"),
        ("width", 4, "width=4 with dims=(2, 4, 8)"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_relied_on_is_refused(
    key: str, value: object, received: str, manifest: Manifest, refuses: Refuses
) -> None:
    text = json.dumps({**json.loads(manifest.to_json()), key: value})
    rule = "A manifest names a model's dims and width."
    with refuses(ManifestError, f"{rule} Received: {received}. {AGAIN}"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("key", "value", "place", "kind", "received"),
    [
        ("dims", "8", "dims", "an array", "'8'"),
        ("dims", 8, "dims", "an array", "8"),
        ("dims", [2, 4.0], "dims[1]", "an integer of 64 bits", "4.0"),
        ("dims", [2, True], "dims[1]", "an integer of 64 bits", "True"),
        ("width", 2**63, "width", "an integer of 64 bits", str(2**63)),
        ("weights", 1, "weights", "an array or null", "1"),
        ("weights", [1, 10**400], "weights[1]", "a number", "1" + "0" * 79),
        ("num_classes", "5", "num_classes", "an integer of 64 bits or null", "'5'"),
        ("labels", 1, "labels", "true or false", "1"),
        ("inputs", None, "inputs", "an object", "None"),
        ("inputs", {"x": 4}, "inputs.x", "an object", "4"),
        ("inputs", {"x": {"dtype": 1, "shape": []}}, "inputs.x.dtype", "a string", "1"),
        ("inputs", {"x": {"dtype": "int8", "shape": ["any"]}}, "inputs.x.shape[0]",
         "an integer of 64 bits or null", "'any'"),
        ("quality", ["8"], "quality", "an object or null", "['8']"),
        ("quality", {"8": {"top1": "high"}}, "quality.8.top1", "a number", "'high'"),
        ("cascade", {"stages": 3, "confidence": "margin"}, "cascade.stages", "an array", "3"),
        ("funnel", {"dims": [2], "shortlists": [], "k": None}, "funnel.k",
         "an integer of 64 bits", "None"),
        ("made_with", {"keras": 3}, "made_with.keras", "a string", "3"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_by_its_place(
    key: str,
    value: object,
    place: str,
    kind: str,
    received: str,
    manifest: Manifest,
    refuses: Refuses,
) -> None:
    text = json.dumps({**json.loads(manifest.to_json()), key: value})
    with refuses(
        ManifestError, f"{place} of a manifest must be {kind}. Received: {received}. {AGAIN}"
    ):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("inputs", {"x": {"dtype": "float32"}}, "inputs.x.shape"),
        ("cascade", {"stages": [], "method": "by hand"}, "cascade.confidence"),
        ("cascade", {"stages": [{"dim": 8}], "confidence": "margin"},
         "cascade.stages[0].threshold"),
    ],
)  # fmt: skip
def test_a_value_that_is_left_out_is_asked_for_by_its_place(
    key: str, value: object, place: str, manifest: Manifest, refuses: Refuses
) -> None:
    text = json.dumps({**json.loads(manifest.to_json()), key: value})
    with refuses(ManifestError, f"{place} of a manifest must be given. Received: none. {AGAIN}"):
        Manifest.from_json(text)


@pytest.mark.parametrize("name", [f.name for f in fields(Manifest)[:7]])
def test_a_manifest_without_a_field_is_refused(
    name: str, manifest: Manifest, refuses: Refuses
) -> None:
    written = json.loads(manifest.to_json())
    del written[name]
    with refuses(ManifestError, f"{name} of a manifest must be given. Received: none. {AGAIN}"):
        Manifest.from_json(json.dumps(written))


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400"])
def test_numbers_that_json_has_not_are_refused(
    number: str, manifest: Manifest, refuses: Refuses
) -> None:
    text = manifest.to_json().replace("{", f'{{"ours": [{number}], ', 1)
    why = f"(ValueError: {number} is no number of JSON, or too large a one)"
    rule = "A manifest is a JSON object with a schema."
    with refuses(ManifestError, f"{rule} Received: {text!r:.80} {why}. {AGAIN}"):
        Manifest.from_json(text)


def test_a_manifest_is_nested_as_deep_as_it_can_be_written_again(
    manifest: Manifest, refuses: Refuses
) -> None:
    def nested(depth: int) -> str:
        return manifest.to_json().replace("{", f'{{"ours": {"[" * depth}{"]" * depth}, ', 1)

    assert json.loads(Manifest.from_json(nested(31)).to_json()) == json.loads(nested(31))
    rule = "A manifest is a JSON object with a schema."
    why = "(ValueError: it is nested more than 32 levels deep)"
    with refuses(ManifestError, f"{rule} Received: {nested(32)!r:.80} {why}. {AGAIN}"):
        Manifest.from_json(nested(32))
    with refuses(ManifestError, f"{rule} Received: {nested(100_000)!r:.80} {why}. {AGAIN}"):
        Manifest.from_json(nested(100_000))


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("kind", "classifier, regressor, encoder, index"),
        ("metric", "cosine, dot, l2"),
        ("activation", "softmax, sigmoid, none"),
    ],
)
@pytest.mark.parametrize("value", ["Softmax", None, ["l2"]])
def test_a_word_that_is_none_of_those_known_is_refused(
    field: str, choices: str, value: Any, manifest: Manifest, refuses: Refuses
) -> None:
    text = f"{field} must be one of {choices}. Received: {field}={value!r}. {NEWER}"
    with refuses(ManifestError, text):
        replace(manifest, **{field: value})
    with refuses(ManifestError, text):
        Manifest.from_json(json.dumps({**json.loads(manifest.to_json()), field: value}))


@pytest.mark.parametrize("dim", [8, np.int64(8), np.uint8(8), np.array(8)])
def test_a_dim_that_is_served_is_returned_as_an_int(dim: int, manifest: Manifest) -> None:
    assert manifest.check_dim(dim) == 8
    assert type(manifest.check_dim(dim)) is int


@pytest.mark.parametrize("dim", [3, 0, -8, 8.0, True, "8", None, np.array([2, 4]), (8,), np.nan])
def test_a_dim_that_is_not_served_is_refused_by_naming_those_that_are(
    dim: Any, manifest: Manifest, refuses: Refuses
) -> None:
    text = (
        "dim must be one of the dims the model serves. "
        f"Received: dim={dim!r} for model 'toy'. Choose one of 2, 4, 8."
    )
    with refuses(UnknownDimError, text):
        manifest.check_dim(dim)


def test_true_is_not_the_dim_1(manifest: Manifest) -> None:
    one = replace(manifest, dims=(1, 8))
    assert one.check_dim(1) == 1
    with pytest.raises(UnknownDimError):
        one.check_dim(True)


def test_a_tower_has_inputs_and_a_decoder_of_its_own(refuses: Refuses) -> None:
    photo = {"inputs": {"dtype": "string", "shape": [None]}}
    one = replace(TWO_TOWERS, inputs=photo, decoder={"size": [32, 32]}, other_tower=None)
    assert one.tower() is one
    refusal = (
        "Only a model of two towers has another one. Received: other_tower=True for model "
        "'birds', which has one. Leave other_tower out, or export a MatryoshkaEncoder(tower, "
        "other_tower)."
    )
    with refuses(NoOtherTowerError, refusal):
        one.tower(other_tower=True)
    two = Manifest.from_json(replace(one, other_tower=TWO_TOWERS.other_tower).to_json())
    assert two.tower() is two
    other = two.tower(other_tower=True)
    assert (list(other.inputs), other.decoder) == (["caption"], None)
    assert other.fingerprint == two.fingerprint
    assert other.other_inputs == two.inputs
    assert (two.other_inputs, one.other_inputs) == (other.inputs, None)


def test_without_a_head_nothing_is_classified(
    manifests: Mapping[str, Manifest], refuses: Refuses
) -> None:
    encoder = manifests["encoder"]
    text = (
        "Only a model with a head can classify. Received: a request to classify for model 'toy', "
        "an encoder without one. Ask it to embed, or export a model that ends in a MatryoshkaHead."
    )
    with refuses(NoHeadError, text):
        encoder.check_head()
    with refuses(NoHeadError, text):
        encoder.check_cascade()
    with pytest.raises(NoIndexError, match="model 'toy', an encoder without a gallery"):
        encoder.check_index()


def test_without_a_policy_nothing_is_classified_adaptively(
    manifests: Mapping[str, Manifest], refuses: Refuses
) -> None:
    manifests["classifier"].check_cascade()
    manifests["successor"].check_head()
    text = (
        "classify_adaptive needs a cascade policy. Received: model 'toy', exported without one. "
        "Learn one on a holdout with CascadePolicy.learn, then give it as "
        "classify_adaptive(x, policy=policy), or export again with "
        "export_saved_model(..., policy=policy)."
    )
    with refuses(NoCascadeError, text):
        manifests["successor"].check_cascade()


def test_a_regressor_is_not_asked_for_classes(refuses: Refuses) -> None:
    text = (
        "Only a model with classes can classify. Received: a request to classify for model "
        "'birds', whose head gives values, 2 a row. Ask for them: client.regress(inputs, dim)."
    )
    for check in (REGRESSOR.check_head, REGRESSOR.check_cascade, REGRESSOR.check_one_class):
        with refuses(NoHeadError, text):
            check()
    assert REGRESSOR.check_values() == 2


@pytest.mark.parametrize(
    ("manifest", "kind", "ask"),
    [(ENCODER, "an encoder", "embed"), (CLASSIFIER, "a classifier", "classify")],
)
def test_only_a_regressor_is_asked_for_values(
    manifest: Manifest, kind: str, ask: str, refuses: Refuses
) -> None:
    text = (
        "Only a regressor answers with values. Received: a request for those of model 'birds', "
        f"{kind}. Ask it to {ask}; export_saved_model(..., activation='none') makes a regressor."
    )
    with refuses(NoHeadError, text):
        manifest.check_values()


def test_rows_of_several_classes_have_no_cascade(refuses: Refuses) -> None:
    TAGS.check_head()
    text = (
        "A cascade decides which one class a row has. Received: model 'birds', of whose classes a "
        "row may have several (sigmoid). Ask one dim: client.classify(inputs, dim)."
    )
    for check in (TAGS.check_cascade, TAGS.check_one_class):
        with refuses(NoCascadeError, text):
            check()
    CLASSIFIER.check_one_class()


def test_an_exit_is_asked_by_its_name(refuses: Refuses) -> None:
    assert [DEPTHS.check_exit(name) for name in ("thumbnail", "last", None)] == [
        *("thumbnail", "last", "last")
    ]
    text = (
        "exit must be one of the model's exits. Received: exit='conv4_out' for model 'birds'. "
        "Choose one of thumbnail, conv3_out, last."
    )
    with refuses(UnknownExitError, text):
        DEPTHS.check_exit("conv4_out")
    assert CLASSIFIER.check_exit(None) == CLASSIFIER.check_exit("last") == "last"
    text = (
        "Only a model with exits is asked at one. Received: exit='conv3_out' for model 'birds', "
        "which has none. Leave exit out."
    )
    with refuses(UnknownExitError, text):
        CLASSIFIER.check_exit("conv3_out")


def test_a_prompt_is_asked_by_its_name(refuses: Refuses) -> None:
    assert [TEXTS.check_prompt(name) for name in ("query", "passage", None)] == [
        *("query: ", "passage: ", "")
    ]
    text = (
        "prompt must be the name of one of the model's prompts. Received: prompt='query: ' for "
        "model 'birds'. Choose one of query, passage."
    )
    with refuses(UnknownPromptError, text):
        TEXTS.check_prompt("query: ")
    with pytest.raises(UnknownPromptError, match=r"Received: prompt=\['query'\]"):
        TEXTS.check_prompt(["query"])  # type: ignore[arg-type]
    assert CLASSIFIER.check_prompt(None) == ""
    text = (
        "Only a model with prompts takes one. Received: prompt='query' for model 'birds', which "
        "has none. Leave prompt out."
    )
    for manifest in (CLASSIFIER, replace(TEXTS, preprocessor=None)):
        with refuses(UnknownPromptError, text):
            manifest.check_prompt("query")


def test_each_tower_has_prompts_of_its_own() -> None:
    photos = replace(
        TWO_TOWERS, other_tower={"inputs": TEXTS.inputs, "preprocessor": TEXTS.preprocessor}
    )
    two = Manifest.from_json(photos.to_json())
    assert (two.prompts, two.tower(other_tower=True).prompts) == ({}, TEXTS.prompts)
    assert two.gallery_prompts == TEXTS.gallery_prompts == TEXTS.prompts
    of_texts = replace(TEXTS, other_tower={"inputs": TWO_TOWERS.inputs})
    assert of_texts.tower(other_tower=True).prompts == {}


def test_only_a_model_of_one_input_of_strings_makes_tokens_of_it(refuses: Refuses) -> None:
    text = (
        "A model with a preprocessor takes texts, as its one input. Received: image of float32. "
        "Export the model again with keras_mrl_export.export_saved_model."
    )
    with refuses(ManifestError, text):
        replace(TEXTS, inputs=CLASSIFIER.inputs)
    with refuses(ManifestError, text.replace("a preprocessor", "an other_tower.preprocessor")):
        replace(
            TEXTS,
            other_tower={"inputs": CLASSIFIER.inputs, "preprocessor": TEXTS.preprocessor},
        )


def test_a_cascade_is_over_exits_or_over_dims() -> None:
    assert DEPTHS.adaptive_cascade is DEPTHS.exit_cascade is not None
    assert CLASSIFIER.adaptive_cascade is CLASSIFIER.cascade is not None
    for manifest in (DEPTHS, CLASSIFIER):
        manifest.check_cascade()
    with pytest.raises(ManifestError, match=r"^The exits of a manifest have names of their own"):
        replace(DEPTHS, cascade=CLASSIFIER.cascade)


@pytest.mark.parametrize("model_id", [0, -5, 2**31])
def test_an_id_of_a_model_fits_an_answer(manifest: Manifest, model_id: int) -> None:
    with pytest.raises(ManifestError, match=r"model_id of a manifest must be in 1..2147483647"):
        replace(manifest, model_id=model_id)
