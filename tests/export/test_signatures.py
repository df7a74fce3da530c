"""Every signature of the contract equals the Keras model's own outputs, computed in NumPy.

The tests marked `backend` ask versions of models that each backend trained; the others ask about
the graph alone, which TensorFlow makes of every model.
"""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_serving.cascade.confidence import confidence_of
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.cascade.thresholds import midway
from keras_mrl_serving.contract import MANIFEST_FILE
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
    written_signatures,
)

backend = pytest.mark.backend

# Rows the export did not see. An empty batch has a test of its own, without convolutions: those
# of TensorFlow with oneDNN return it in the shape of their input.
ONE, SEVEN, NONE = (slice(SAMPLED, SAMPLED + 1), slice(SAMPLED + 1, SAMPLED + 8), slice(0, 0))
BATCHES = pytest.mark.parametrize("part", [ONE, SEVEN], ids=["one", "seven"])


def assert_answers(version: Exported, answer: Arrays, expected: Arrays) -> None:
    rows = len(next(iter(expected.values())))
    expected = {**expected, "model_id": np.full(rows, version.manifest.model_id)}
    assert set(answer) == set(expected)
    dtypes = {"class_ids": np.int64, "labels": np.object_, "ids": np.int64}
    dtypes |= dict.fromkeys(("dim", "model_id"), np.int32)
    for name, array in answer.items():
        assert array.dtype == dtypes.get(name, np.float32), name
        assert_equal_rows(array, expected[name])


def expected_classes(version: Exported, part: slice, column: int, temperature: float) -> Arrays:
    top_k, labels = version.manifest.top_k, version.manifest.labels
    assert top_k is not None
    return classification(version.logits[part, column], temperature, top_k, labels)


@backend
def test_the_manifest_names_the_backend_that_trained(classifier: Exported) -> None:
    assert classifier.manifest.made_with["trained_on"] == keras.backend.backend()


@backend
@BATCHES
def test_features_are_raw(classifier: Exported, part: slice) -> None:
    answer = classifier.ask("features", part)
    assert_answers(classifier, answer, {"features": classifier.features[part, : DIMS[-1]]})


@backend
@BATCHES
@pytest.mark.parametrize("dim", DIMS)
def test_embed_cuts_then_scales(untied: Exported, dim: int, part: slice) -> None:
    prefix = untied.features[part, :dim].astype(np.float64)
    lengths = np.sqrt(np.square(prefix).sum(axis=-1, keepdims=True))
    assert_answers(untied, untied.ask(f"embed_{dim}", part), {"embedding": prefix / lengths})


@backend
@pytest.mark.parametrize("dim", DIMS)
def test_embed_only_cuts_where_nothing_is_scaled(tied: Exported, dim: int) -> None:
    answer = tied.ask(f"embed_{dim}", SEVEN)
    assert_answers(tied, answer, {"embedding": tied.features[SEVEN, :dim]})


@backend
@BATCHES
@pytest.mark.parametrize("column", range(len(DIMS)))
def test_classify(classifier: Exported, column: int, part: slice) -> None:
    dim = DIMS[column]
    expected = expected_classes(classifier, part, column, TEMPERATURES[dim])
    assert_answers(classifier, classifier.ask(f"classify_{dim}", part), expected)


@backend
@BATCHES
@pytest.mark.parametrize("column", range(len(DIMS)))
def test_head_reads_features_of_the_caller(classifier: Exported, column: int, part: slice) -> None:
    dim = DIMS[column]
    prefix = np.ascontiguousarray(classifier.features[part, :dim])
    answer = classifier.session.run(f"head_{dim}", {"features": prefix})
    expected = expected_classes(classifier, part, column, TEMPERATURES[dim])
    assert_answers(classifier, answer, {**expected, "logits": classifier.logits[part, column]})


@backend
@BATCHES
def test_classify_adaptive(classifier: Exported, part: slice) -> None:
    manifest = classifier.manifest
    assert manifest.top_k is not None
    whole = cascade(classifier.logits, classifier.policy, manifest.top_k, manifest.labels)
    expected = {name: array[part] for name, array in whole.items()}
    assert_answers(classifier, classifier.ask("classify_adaptive", part), expected)


@backend
def test_the_rows_of_the_cascade_stop_at_every_stage(classifier: Exported) -> None:
    stopped = classifier.ask("classify_adaptive", slice(None))["dim"]
    dims, counts = np.unique(stopped, return_counts=True)
    assert dims.tolist() == list(DIMS)
    assert counts.tolist() == [ROWS // 2, ROWS // 4, ROWS // 4]


@backend
def test_searches_are_those_of_the_gallery_that_was_exported_with_the_model(tied: Exported) -> None:
    index = tied.job.index
    assert index is not None
    queries = np.ascontiguousarray(tied.features[SEVEN, : DIMS[-1]])
    neighbors = index.search(queries)
    expected: Arrays = {"ids": neighbors.ids, "scores": neighbors.scores}
    assert_answers(tied, tied.ask("retrieve", SEVEN), expected)
    assert_answers(tied, tied.session.run("search", {"embedding": queries}), expected)


@backend
def test_the_trained_model_keeps_its_precision(tied: Exported) -> None:
    assert tied.model.layers[-1].compute_dtype == "bfloat16"
    assert {spec["dtype"] for spec in tied.manifest.inputs.values()} == {"float32"}


def test_an_adaptive_answer_never_depends_on_its_neighbours(untied: Exported) -> None:
    together = untied.ask("classify_adaptive", slice(None))
    alone = [untied.ask("classify_adaptive", slice(row, row + 1)) for row in range(ROWS)]
    backwards = untied.ask("classify_adaptive", slice(None, None, -1))
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
        assert set(default) == set(widest) - {"model_id"}
        for name, array in default.items():
            np.testing.assert_array_equal(widest[name], array)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_describe_repeats_the_manifest_of_the_file(classifier: Exported, rows: int) -> None:
    answer = classifier.session.run("describe", {"key": np.array([b"any"] * rows, object)})
    text = (classifier.path / MANIFEST_FILE).read_bytes().rstrip(b"\n")
    assert answer["manifest"].tolist() == [text] * rows


def test_without_names_or_policy_a_temperature_is_one(of_tokens: Exported) -> None:
    for column, dim in enumerate(DIMS):
        expected = expected_classes(of_tokens, SEVEN, column, 1.0)
        assert list(expected) == ["class_ids", "probabilities", "confidence"]
        assert_answers(of_tokens, of_tokens.ask(f"classify_{dim}", SEVEN), expected)


def test_an_encoder_embeds(encoder: Exported) -> None:
    for dim in (8, 16, 20):
        prefix = encoder.features[SEVEN, :dim].astype(np.float64)
        scaled = prefix / np.linalg.norm(prefix, axis=-1, keepdims=True)
        assert_answers(encoder, encoder.ask(f"embed_{dim}", SEVEN), {"embedding": scaled})


def test_a_row_of_zeros_is_not_scaled(encoder: Exported) -> None:
    silent = encoder.session.run("embed_8", {"inputs": np.zeros((1, 7), np.float32)})["embedding"]
    assert np.isfinite(silent).all()


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


MODEL_ID = {"model_id": (tf.int32, [-1])}
NEIGHBORS = {"ids": (tf.int64, [-1, 4]), "scores": (tf.float32, [-1, 4])}


@pytest.mark.parametrize(
    ("fixture", "top_k", "labels", "policy", "index"),
    [
        ("untied", 3, True, True, False),
        ("tied", 5, True, True, True),
        ("of_tokens", 5, False, False, False),
    ],
)
def test_the_signatures_of_a_classifier_are_those_of_the_contract(
    request: pytest.FixtureRequest,
    fixture: str,
    top_k: int,
    labels: bool,
    policy: bool,
    index: bool,
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
        if index:
            expected[f"search_{dim}"] = ({"embedding": (tf.float32, [-1, dim])}, NEIGHBORS)
    if policy:
        expected["classify_adaptive"] = (inputs, answer | {"dim": (tf.int32, [-1])})
    if index:
        expected["retrieve"] = (inputs, NEIGHBORS)
        expected["search"] = expected[f"search_{DIMS[-1]}"]
    expected = {
        name: (inputs, outputs if name in ("serving_default", "describe") else outputs | MODEL_ID)
        for name, (inputs, outputs) in expected.items()
    }
    assert {
        name: (tensors(signature.inputs), tensors(signature.outputs))
        for name, signature in version.session.signatures.items()
        if name != "__saved_model_init_op"
    } == expected


def test_the_signatures_of_an_encoder_are_those_of_the_contract(encoder: Exported) -> None:
    embeds = {f"embed_{dim}" for dim in (8, 16, 20)}
    expected = {"describe", "features", "serving_default", *embeds}
    assert written_signatures(encoder.session) == expected
    assert tensors(encoder.session.signatures["embed_8"].inputs) == INPUTS["encoder"]


def test_without_identity_no_answer_names_the_model(tied: Exported, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"normalize": False, "index": tied.job.index, "identity": False}
    with exported(tied.model, tied.rows, tmp_path, dims=(4, 16), **arguments) as version:
        assert version.manifest.model_id is None
        outputs = {
            name: set(signature.outputs) for name, signature in version.session.signatures.items()
        }
        assert outputs["embed_4"] == {"embedding"}
        assert outputs["search"] == outputs["search_4"] == outputs["retrieve"] == {"ids", "scores"}
        assert "logits" in outputs["head_4"]
        assert not any("model_id" in names for names in outputs.values())


def test_no_variable_is_stored_twice(untied: Exported) -> None:
    names = [name for name, _ in tf.train.list_variables(str(untied.path / "variables/variables"))]
    stored = [name for name in names if "VARIABLE_VALUE" in name]
    parts = (untied.model.backbone, untied.model.head)  # not the seed of dims_per_step
    assert len(stored) == sum(len(part.variables) for part in parts)


@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_every_class_signature_has_the_confidence_of_its_policy(
    untied: Exported, tmp_path: Path, measure: str
) -> None:
    logits = untied.logits
    stages = []
    for column, dim in enumerate(DIMS[:-1]):
        confidences = np.sort(confidence_of(measure, logits[:, column], TEMPERATURES[dim]))
        threshold = midway(confidences, len(confidences) // 2)
        stages.append(Stage(dim, threshold, TEMPERATURES[dim]))
    policy = CascadePolicy((*stages, Stage(DIMS[-1], None)), measure)
    with exported(untied.model, untied.rows, tmp_path, policy=policy) as version:
        assert version.manifest.cascade == policy.to_json()
        everything = slice(0, None)
        for column, stage in enumerate(policy.stages):
            prefix = {"features": np.ascontiguousarray(untied.features[:, : stage.dim])}
            head = version.session.run(f"head_{stage.dim}", prefix)
            expected = confidence_of(measure, head["logits"], stage.temperature)
            np.testing.assert_allclose(head["confidence"], expected, rtol=2e-5, atol=2e-6)
            # The model's own logits may be off by the contract's tolerance.
            answer = version.ask(f"classify_{stage.dim}", everything)
            off = 2e-5 * np.abs(logits[:, column]).max(axis=-1) / stage.temperature
            expected = confidence_of(measure, logits[:, column], stage.temperature)
            assert (np.abs(answer["confidence"] - expected) <= np.maximum(off, 2e-6)).all()
        answer = version.ask("classify_adaptive", everything)
        class_ids, stage_of = policy.route(logits)
        assert_equal_rows(answer["dim"], np.array(DIMS)[stage_of])
        assert_equal_rows(answer["class_ids"][:, 0], class_ids)
        assert len(set(answer["dim"].tolist())) == len(DIMS)
