"""Every signature of the contract equals the Keras model's own outputs, counted in NumPy."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.contract import MANIFEST_FILE
from tests.helpers import export_models as models
from tests.helpers.export_models import (
    DIMS,
    NUM_CLASSES,
    ROWS,
    SAMPLED,
    TEMPERATURES,
    Arrays,
    Exported,
    assert_equal_rows,
    cascade,
    classification,
    exported,
)

pytestmark = pytest.mark.backend

# Rows the export did not see. An empty batch has a test of its own, without convolutions: those
# of TensorFlow with oneDNN return it in the shape of their input.
ONE, SEVEN, NONE = (slice(SAMPLED, SAMPLED + 1), slice(SAMPLED + 1, SAMPLED + 8), slice(0, 0))
BATCHES = pytest.mark.parametrize("part", [ONE, SEVEN], ids=["one", "seven"])


def assert_answers(answer: Arrays, expected: Arrays) -> None:
    assert set(answer) == set(expected)
    dtypes = {"class_ids": np.int64, "labels": np.object_, "dim": np.int32}
    for name, array in answer.items():
        assert array.dtype == dtypes.get(name, np.float32), name
        assert_equal_rows(array, expected[name])


def policy_of(version: Exported) -> CascadePolicy:
    assert version.policy is not None
    return version.policy


def expected_classes(version: Exported, part: slice, index: int, temperature: float) -> Arrays:
    manifest = version.manifest
    assert manifest.top_k is not None
    return classification(version.logits[part, index], temperature, manifest.top_k, manifest.labels)


@BATCHES
def test_features_are_raw(classifier: Exported, part: slice) -> None:
    answer = classifier.ask("features", part)
    assert_answers(answer, {"features": classifier.features[part, : DIMS[-1]]})


@BATCHES
@pytest.mark.parametrize("dim", DIMS)
def test_embed_cuts_then_scales(untied: Exported, dim: int, part: slice) -> None:
    prefix = untied.features[part, :dim].astype(np.float64)
    lengths = np.sqrt(np.square(prefix).sum(axis=-1, keepdims=True))
    assert_answers(untied.ask(f"embed_{dim}", part), {"embedding": prefix / lengths})


@pytest.mark.parametrize("dim", DIMS)
def test_embed_only_cuts_where_nothing_is_scaled(tied: Exported, dim: int) -> None:
    answer = tied.ask(f"embed_{dim}", SEVEN)
    assert_answers(answer, {"embedding": tied.features[SEVEN, :dim]})


@BATCHES
@pytest.mark.parametrize("index", range(len(DIMS)))
def test_classify(classifier: Exported, index: int, part: slice) -> None:
    dim = DIMS[index]
    expected = expected_classes(classifier, part, index, TEMPERATURES[dim])
    assert_answers(classifier.ask(f"classify_{dim}", part), expected)


@BATCHES
@pytest.mark.parametrize("index", range(len(DIMS)))
def test_head_reads_given_features(classifier: Exported, index: int, part: slice) -> None:
    dim = DIMS[index]
    prefix = np.ascontiguousarray(classifier.features[part, :dim])
    answer = classifier.session.run(f"head_{dim}", {"features": prefix})
    expected = expected_classes(classifier, part, index, TEMPERATURES[dim])
    assert_answers(answer, {**expected, "logits": classifier.logits[part, index]})


@BATCHES
def test_classify_adaptive(classifier: Exported, part: slice) -> None:
    manifest = classifier.manifest
    assert manifest.top_k is not None
    whole = cascade(classifier.logits, policy_of(classifier), manifest.top_k, manifest.labels)
    expected = {name: array[part] for name, array in whole.items()}
    assert_answers(classifier.ask("classify_adaptive", part), expected)


def test_the_rows_of_the_cascade_stop_at_every_stage(classifier: Exported) -> None:
    stopped = classifier.ask("classify_adaptive", slice(None))["dim"]
    dims, counts = np.unique(stopped, return_counts=True)
    assert dims.tolist() == list(DIMS)
    assert counts.tolist() == [ROWS // 2, ROWS // 4, ROWS // 4]


def test_an_adaptive_answer_never_depends_on_its_neighbours(classifier: Exported) -> None:
    together = classifier.ask("classify_adaptive", slice(None))
    alone = [classifier.ask("classify_adaptive", slice(row, row + 1)) for row in range(ROWS)]
    backwards = classifier.session.run(
        "classify_adaptive",
        {name: array[::-1] for name, array in classifier.inputs(slice(None)).items()},
    )
    for name, array in together.items():
        assert_equal_rows(np.concatenate([answer[name] for answer in alone]), array)
        assert_equal_rows(backwards[name][::-1], array)


def test_an_empty_batch_has_an_empty_answer(tied: Exported) -> None:
    for name, signature in tied.session.signatures.items():
        if name.startswith(("features", "embed", "classify", "serving_default")):
            answer = tied.ask(name, NONE)
            shapes = {output: shape for output, (_, shape) in tensors(signature.outputs).items()}
            assert {o: [-1, *array.shape[1:]] for o, array in answer.items()} == shapes
            assert {len(array) for array in answer.values()} == {0}


def test_serving_default_is_the_widest_dim(classifier: Exported, encoder: Exported) -> None:
    for version, signature in (
        (classifier, f"classify_{DIMS[-1]}"),
        (encoder, f"embed_{encoder.manifest.width}"),
    ):
        default, widest = (version.ask(s, SEVEN) for s in ("serving_default", signature))
        assert set(default) == set(widest)
        for name, array in widest.items():
            np.testing.assert_array_equal(default[name], array)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_describe_repeats_the_manifest_of_the_file(classifier: Exported, rows: int) -> None:
    answer = classifier.session.run("describe", {"key": np.array([b"any"] * rows, object)})
    text = (classifier.path / MANIFEST_FILE).read_bytes().rstrip(b"\n")
    assert answer["manifest"].tolist() == [text] * rows


def test_without_names_or_policy_a_temperature_is_one(of_tokens: Exported) -> None:
    for index, dim in enumerate(DIMS):
        expected = expected_classes(of_tokens, SEVEN, index, 1.0)
        assert list(expected) == ["class_ids", "probabilities", "confidence"]
        assert_answers(of_tokens.ask(f"classify_{dim}", SEVEN), expected)


def test_an_encoder_embeds(encoder: Exported) -> None:
    for dim in (8, 16, 20):
        prefix = encoder.features[SEVEN, :dim].astype(np.float64)
        scaled = prefix / np.linalg.norm(prefix, axis=-1, keepdims=True)
        assert_answers(encoder.ask(f"embed_{dim}", SEVEN), {"embedding": scaled})


INPUTS: dict[str, dict[str, Any]] = {
    "untied": {"image": (tf.float32, [-1, 6, 6, 3])},
    "tied": {"left": (tf.float32, [-1, 7]), "right": (tf.float32, [-1, 5])},
    "of_tokens": {"inputs": (tf.int32, [-1, 6])},
    "encoder": {"inputs": (tf.float32, [-1, 7])},
}


def classes(top_k: int, labels: bool) -> dict[str, Any]:
    names = {"labels": (tf.string, [-1, top_k])} if labels else {}
    return names | {
        "class_ids": (tf.int64, [-1, top_k]),
        "probabilities": (tf.float32, [-1, top_k]),
        "confidence": (tf.float32, [-1]),
    }


def tensors(infos: Any) -> dict[str, Any]:
    return {
        name: (tf.as_dtype(info.dtype), [size.size for size in info.tensor_shape.dim])
        for name, info in infos.items()
    }


@pytest.mark.parametrize(
    ("fixture", "top_k", "labels", "policy"),
    [("untied", 3, True, True), ("tied", 5, True, True), ("of_tokens", 5, False, False)],
)
def test_the_signatures_of_a_classifier_are_those_of_the_contract(
    request: pytest.FixtureRequest, fixture: str, top_k: int, labels: bool, policy: bool
) -> None:
    version: Exported = request.getfixturevalue(fixture)
    inputs, answer = INPUTS[fixture], classes(top_k, labels)
    expected = {
        "features": (inputs, {"features": (tf.float32, [-1, DIMS[-1]])}),
        "serving_default": (inputs, answer),
        "describe": ({"key": (tf.string, [-1])}, {"manifest": (tf.string, [-1])}),
    }
    for dim in DIMS:
        expected[f"embed_{dim}"] = (inputs, {"embedding": (tf.float32, [-1, dim])})
        expected[f"classify_{dim}"] = (inputs, answer)
        logits = {"logits": (tf.float32, [-1, NUM_CLASSES])}
        expected[f"head_{dim}"] = ({"features": (tf.float32, [-1, dim])}, answer | logits)
    if policy:
        expected["classify_adaptive"] = (inputs, answer | {"dim": (tf.int32, [-1])})
    assert {
        name: (tensors(signature.inputs), tensors(signature.outputs))
        for name, signature in version.session.signatures.items()
        if name != "__saved_model_init_op"
    } == expected


def test_the_signatures_of_an_encoder_are_those_of_the_contract(encoder: Exported) -> None:
    assert sorted(set(encoder.session.signatures) - {"__saved_model_init_op"}) == [
        "describe",
        "embed_16",
        "embed_20",
        "embed_8",
        "features",
        "serving_default",
    ]
    assert tensors(encoder.session.signatures["embed_8"].inputs) == INPUTS["encoder"]


def test_a_row_of_zeros_is_not_scaled(encoder: Exported) -> None:
    silent = encoder.session.run("embed_8", {"inputs": np.zeros((1, 7), np.float32)})["embedding"]
    assert np.isfinite(silent).all()


def test_no_variable_is_stored_twice(untied: Exported) -> None:
    names = [name for name, _ in tf.train.list_variables(str(untied.path / "variables/variables"))]
    stored = [name for name in names if "VARIABLE_VALUE" in name]
    parts = (untied.model.backbone, untied.model.head)  # not the seed of dims_per_step
    assert len(stored) == sum(len(part.variables) for part in parts)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A model that computes in bfloat16."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = models.untied()
    finally:
        keras.config.set_dtype_policy("float32")
    rows = {"": models.images()}
    base_path = tmp_path_factory.mktemp("halves")
    with exported(model, model.backbone, rows, base_path) as version:
        yield version


def test_half_precision_is_served_in_float32(halves: Exported) -> None:
    """The weights are those of the model; what float32 makes of them is `models.untied()`'s."""
    plain = models.untied()
    plain.set_weights(halves.model.get_weights())
    rows = halves.rows[""]
    features = halves.ask("features", slice(None))["features"]
    assert_equal_rows(features, np.asarray(plain.backbone.predict(rows, verbose=0)))
    logits = np.asarray(plain.predict(rows, verbose=0))
    for index, dim in enumerate(DIMS):
        prefix = np.ascontiguousarray(features[:, :dim])
        answer = halves.session.run(f"head_{dim}", {"features": prefix})
        assert_equal_rows(answer["logits"], logits[:, index])
    assert halves.manifest.inputs["image"]["dtype"] == "float32"


def test_the_trained_model_keeps_its_precision(halves: Exported) -> None:
    assert halves.model.head.compute_dtype == "bfloat16"
