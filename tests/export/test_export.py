"""`export_saved_model`: what it writes down, what it takes, and what it says of anything else."""

import doctest
import importlib
import json
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mrl_export
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_serving import __version__
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from tests.helpers.export_models import DIMS, NAMES, TEMPERATURES, Exported, only_tensorflow

pytestmark = pytest.mark.backend

X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)


def classifier(**changes: Any) -> keras.Model:
    inputs = keras.Input((5,), name="x")
    features = keras.layers.Dense(8)(inputs)
    return keras.Model(inputs, MatryoshkaHead(3, dims=(2, 4, 8), **changes)(features), name="small")


def encoder() -> keras.Model:
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(20)], name="plain")


def refusal(
    base_path: Path,
    kind: type[Exception],
    model: keras.Model | None = None,
    sample: Any = X,
    **arguments: Any,
) -> str:
    """What is said of arguments that do not fit; nothing may be left of the attempt."""
    with pytest.raises(kind) as caught:
        export_saved_model(model or classifier(), base_path, sample, **arguments)
    assert type(caught.value) is kind
    assert not base_path.exists()
    return str(caught.value)


def test_the_manifest_of_everything_given(untied: Exported) -> None:
    manifest = json.loads((untied.path / MANIFEST_FILE).read_text())
    fingerprint = manifest.pop("fingerprint")
    assert len(bytes.fromhex(fingerprint)) == 32
    assert untied.policy is not None
    assert manifest == {
        "schema": 1,
        "name": "untied",
        "kind": "classifier",
        "dims": [2, 4, 16],
        "width": 16,
        "inputs": {"image": {"dtype": "float32", "shape": [None, 6, 6, 3]}},
        "weights": [1.0, 0.5, 2.0],
        "tied": False,
        "normalize": True,
        "metric": "cosine",
        "activation": "softmax",
        "num_classes": 10,
        "top_k": 3,
        "labels": True,
        "decoder": None,
        "funnel": None,
        "size": None,
        "encoder_fingerprint": None,
        "cascade": {
            "stages": [
                {"dim": dim, "threshold": stage.threshold, "temperature": TEMPERATURES[dim]}
                for dim, stage in zip(DIMS, untied.policy.stages, strict=True)
            ],
            "confidence": "max_probability",
            "method": "by hand",
            "guarantee": None,
            "holdout_size": None,
        },
        "quality": {"2": {"top1": 0.5}, "4": {"top1": 0.75}, "16": {"top1": 0.9375}},
        "made_with": {
            "keras_mrl": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "trained_on": keras.backend.backend(),
        },
    }
    read = Manifest.from_json(json.dumps({**manifest, "fingerprint": fingerprint}))
    assert read.cascade is not None
    assert CascadePolicy.from_json(read.cascade) == untied.policy


def test_the_manifest_of_nothing_given(of_tokens: Exported, encoder: Exported) -> None:
    bare = of_tokens.manifest
    assert (bare.name, bare.kind, bare.dims, bare.top_k) == ("tokens", "classifier", DIMS, 5)
    assert (bare.labels, bare.cascade, bare.quality, bare.weights) == (False, None, None, None)
    manifest = encoder.manifest
    assert (manifest.name, manifest.kind, manifest.dims) == ("encoder", "encoder", (8, 16, 20))
    assert (manifest.num_classes, manifest.top_k, manifest.activation) == (None, None, "none")
    described = encoder.session.run("describe", {"key": np.array([b""], object)})["manifest"][0]
    assert Manifest.from_json(described) == manifest


def test_the_manifest_of_a_tied_head_that_does_not_scale(tied: Exported) -> None:
    manifest = tied.manifest
    assert (manifest.tied, manifest.normalize, manifest.name) == (True, False, "renamed")
    assert manifest.width == DIMS[-1]  # of the widest dim, where the features are wider


def test_what_lies_in_a_version(untied: Exported) -> None:
    files = {str(p.relative_to(untied.path)) for p in untied.path.rglob("*") if p.is_file()}
    assert files - {"fingerprint.pb"} == {
        "saved_model.pb",
        "variables/variables.index",
        "variables/variables.data-00000-of-00001",
        "assets/labels.txt",
        "assets.extra/keras_mrl.json",
        "assets.extra/keras_mrl_parity.json",
        "assets.extra/tf_serving_warmup_requests",
    }
    assert (untied.path / "assets/labels.txt").read_text("utf-8").split("\n") == [*NAMES, ""]
    assert os.listdir(untied.path.parent) == ["1"]


@only_tensorflow
def test_versions_of_one_model(tmp_path: Path) -> None:
    model = classifier()
    (tmp_path / "10.tmp").mkdir()
    paths = [
        export_saved_model(model, tmp_path, X),
        export_saved_model(model, str(tmp_path), X, version=7),
        export_saved_model(model, tmp_path, X, dims=(8, 2), top_k=1),
    ]
    assert [path.relative_to(tmp_path) for path in paths] == [Path("1"), Path("7"), Path("8")]
    manifests = [Manifest.from_json((path / MANIFEST_FILE).read_bytes()) for path in paths]
    assert len({manifest.fingerprint for manifest in manifests}) == 1  # of one model
    assert [manifest.dims for manifest in manifests] == [(2, 4, 8), (2, 4, 8), (2, 8)]
    assert [manifest.top_k for manifest in manifests] == [3, 3, 1]
    before = (tmp_path / "7" / MANIFEST_FILE).stat()
    with pytest.raises(FileExistsError) as caught:
        export_saved_model(model, tmp_path, X, version=7)
    assert str(caught.value) == (
        "A published version is never overwritten. "
        f"Received: version=7, which exists under {tmp_path}. Leave version out to take 9."
    )
    assert (tmp_path / "7" / MANIFEST_FILE).stat() == before
    assert sorted(os.listdir(tmp_path)) == ["1", "10.tmp", "7", "8"]


@only_tensorflow
def test_another_weight_is_another_fingerprint(tmp_path: Path) -> None:
    model = classifier()

    def fingerprint() -> str:
        path = export_saved_model(model, tmp_path, X)
        return Manifest.from_json((path / MANIFEST_FILE).read_bytes()).fingerprint

    before = fingerprint()
    model.weights[0].assign(model.weights[0] + 1.0)
    assert fingerprint() != before


@only_tensorflow
def test_a_relative_base_path_is_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_saved_model(encoder(), "models/e", X, dims=(3,)) == tmp_path / "models/e/1"


@only_tensorflow
def test_measures_and_weights_of_other_types_are_numbers(tmp_path: Path) -> None:
    path = export_saved_model(
        classifier(),
        tmp_path,
        X,
        quality={np.int64(8): {"top1": np.float32(0.5)}, 2: {"top1": np.array(0.25)}},  # type: ignore[dict-item]
        weights=np.array([1, 2, 3]),  # type: ignore[arg-type]
        dims=(2, 8),
    )
    manifest = Manifest.from_json((path / MANIFEST_FILE).read_bytes())
    assert manifest.quality == {"2": {"top1": 0.25}, "8": {"top1": 0.5}}
    assert manifest.weights == (1.0, 3.0)  # those of the exported dims


@only_tensorflow
def test_a_policy_may_leave_dims_out_and_all_of_it_is_served(tmp_path: Path) -> None:
    policy = CascadePolicy((Stage(2, 0.5, 3.0), Stage(8, None)))
    path = export_saved_model(classifier(), tmp_path, X, policy)
    manifest = Manifest.from_json((path / MANIFEST_FILE).read_bytes())
    assert manifest.dims == (2, 4, 8)
    assert CascadePolicy.from_json(manifest.cascade or {}) == policy


UNKNOWN_DIMS = "dims must be dims of the model: (2, 4, 8). "
CHECKED_DIMS = "dims must be strictly increasing positive integers. "
LABELS = "labels must name each of the 3 classes on one line. "
ONE_EACH = "Give one non-empty string of UTF-8 per class id, without line breaks or outer blanks."
QUALITY = "quality must give finite numbers for exported dims: (2, 4, 8). "
NO_QUALITY = "quality must give measures by dim, and a number by measure. "
SAMPLE = "sample must hold numbers or strings, in arrays. "
WEIGHTS = "weights must hold one number per dim. "
ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown dim": (
        {"dims": (2, 3)},
        UNKNOWN_DIMS + "Received: dims=(2, 3). Leave dims out to export all of them.",
    ),
    "no dims": (
        {"dims": ()},
        CHECKED_DIMS + "Received: dims=(). Give prefix lengths, for example dims=(8, 16, 32).",
    ),
    "dims between integers": (
        {"dims": (8.7,)},
        CHECKED_DIMS + "Received: dims=(8.7,). Give prefix lengths, for example dims=(8, 16, 32).",
    ),
    "dim zero": (
        {"dims": (0, 2)},
        CHECKED_DIMS + "Received: dims=(0, 2). Sort them and drop repeats: dims=(2,).",
    ),
    "top_k=0": (
        {"top_k": 0},
        "top_k must be an integer of at least 1. Received: top_k=0. Give for example 5.",
    ),
    "top_k=1.5": (
        {"top_k": 1.5},
        "top_k must be an integer of at least 1. Received: top_k=1.5. Give for example 5.",
    ),
    "version=-1": (
        {"version": -1},
        "version must be a non-negative integer. Received: version=-1. "
        "Leave it out to take the next number.",
    ),
    "too few labels": (
        {"labels": ["a", "b"]},
        LABELS + "Received: 2 labels ['a', 'b']. " + ONE_EACH,
    ),
    "a label of two lines": (
        {"labels": ["a", "b\nc", "d"]},
        LABELS + "Received: 3 labels ['a', 'b\\nc', 'd']. " + ONE_EACH,
    ),
    "an empty label": (
        {"labels": ["a", "", "d"]},
        LABELS + "Received: 3 labels ['a', '', 'd']. " + ONE_EACH,
    ),
    "a label with a blank around it": (
        {"labels": ["a", "b ", "c"]},
        LABELS + "Received: 3 labels ['a', 'b ', 'c']. " + ONE_EACH,
    ),
    "labels that are numbers": (
        {"labels": [0, 1, 2]},
        LABELS + "Received: 3 labels [0, 1, 2]. " + ONE_EACH,
    ),
    "a label that is no UTF-8": (
        {"labels": ["a", "\ud800", "c"]},
        LABELS + "Received: 3 labels ['a', '\\ud800', 'c']. " + ONE_EACH,
    ),
    "a label with a carriage return, which TensorFlow would drop": (
        {"labels": ["a", "b\rc", "d"]},
        LABELS + "Received: 3 labels ['a', 'b\\rc', 'd']. " + ONE_EACH,
    ),
    "dims of several types": (
        {"dims": ["8", 4]},
        CHECKED_DIMS
        + "Received: dims=('8', 4). Give prefix lengths, for example dims=(8, 16, 32).",
    ),
    "signatures in lists": (
        {"signatures": [["embed"], 5]},
        "signatures must be of those the model can have: embed_2, embed_4, embed_8, classify_2, "
        "classify_4, classify_8, features, head_2, head_4, head_8. "
        "Received: ['embed'], 5. Give those names, or a family of them: \"embed\".",
    ),
    "quality without measures": (
        {"quality": {8: 0.9}},
        NO_QUALITY + "Received: quality={8: 0.9}. Give for example {8: {'top1': 0.93}}.",
    ),
    "quality without dims": (
        {"quality": 0.9},
        NO_QUALITY + "Received: quality=0.9. Give for example {8: {'top1': 0.93}}.",
    ),
    "quality in words": (
        {"quality": {"full": {"top1": "good"}}},
        NO_QUALITY
        + "Received: quality={'full': {'top1': 'good'}}. Give for example {8: {'top1': 0.93}}.",
    ),
    "a policy over unknown dims": (
        {"policy": CascadePolicy((Stage(2, 0.5), Stage(6, None)))},
        "The policy's dims must be exported dims. "
        "Received: a policy over (2, 6) for dims=(2, 4, 8). Learn it on these dims.",
    ),
    "a policy over dims left out": (
        {"policy": CascadePolicy((Stage(2, 0.5), Stage(4, None))), "dims": (2, 8)},
        "The policy's dims must be exported dims. "
        "Received: a policy over (2, 4) for dims=(2, 8). Learn it on these dims.",
    ),
    "quality of unknown dims": (
        {"quality": {16: {"top1": 0.5}}},
        QUALITY + "Received: quality={16: {'top1': 0.5}}. Leave out what was not measured.",
    ),
    "quality that is not a number": (
        {"quality": {8: {"top1": float("nan")}}},
        QUALITY + "Received: quality={8: {'top1': nan}}. Leave out what was not measured.",
    ),
    "too few weights": (
        {"weights": (1.0, 2.0)},
        WEIGHTS + "Received: 2 weights (1.0, 2.0) for 3 dims. "
        "Give as many weights as the head has dims, or weights=None for ones.",
    ),
    "a sample without rows": (
        {"sample": X[:0]},
        "sample must hold at least one row, batch first. "
        "Received: sample of shape (0, 5). Give a few real rows, for example x[:8].",
    ),
    "a sample that is a generator": (
        {"sample": (row for row in X)},
        SAMPLE + "Received: a generator. Give a few real rows, for example x[:8].",
    ),
    "a sample of objects": (
        {"sample": {"x": [object()]}},
        SAMPLE + "Received: x: a list. Give a few real rows, for example x[:8].",
    ),
    "no sample": (
        {"sample": None},
        SAMPLE + "Received: a NoneType. Give a few real rows, for example x[:8].",
    ),
    "dims that are a number": (
        {"dims": 5},
        CHECKED_DIMS + "Received: dims=5. Give prefix lengths, for example dims=(8, 16, 32).",
    ),
    "batch sizes that are a number": (
        {"warmup_batch_sizes": 5},
        "warmup_batch_sizes must be positive integers. Received: 5. "
        "Give for example (1, 32), or () for no warm-up.",
    ),
    "a sample of none": (
        {"sample": np.float32(1)},
        "sample must hold at least one row, batch first. "
        "Received: sample of shape (). Give a few real rows, for example x[:8].",
    ),
}


@pytest.mark.parametrize("wrong", ARGUMENTS)
def test_arguments_that_do_not_fit(tmp_path: Path, wrong: str) -> None:
    arguments, text = ARGUMENTS[wrong]
    assert refusal(tmp_path / "m", ValueError, **arguments) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"signatures": 5},
            "signatures must be names or families of signatures. Received: signatures=5. "
            'Give for example ["embed", "classify_64"], or None for all.',
        ),
        (
            {"policy": {}},
            "policy must be a CascadePolicy. Received: dict. Learn one with "
            "CascadePolicy.learn, or read a manifest's with CascadePolicy.from_json.",
        ),
        (
            {"labels": "abc"},
            "labels must be a list of class names. Received: labels='abc'. "
            "Give one string per class id.",
        ),
    ],
)
def test_arguments_of_another_kind(tmp_path: Path, arguments: Any, text: str) -> None:
    assert refusal(tmp_path / "m", TypeError, **arguments) == text


@only_tensorflow
def test_tensors_generators_and_numbers_of_numpy_are_taken(tmp_path: Path) -> None:
    path = export_saved_model(
        classifier(),
        tmp_path,
        tf.constant(X),
        dims=(dim for dim in (2, 8)),  # type: ignore[arg-type]
        labels=(name for name in "abc"),  # type: ignore[arg-type]
        signatures=(name for name in ("embed",)),  # type: ignore[arg-type]
        version=np.int64(3),  # type: ignore[arg-type]
        top_k=np.int64(2),  # type: ignore[arg-type]
    )
    assert path == tmp_path / "3"
    manifest = Manifest.from_json((path / MANIFEST_FILE).read_bytes())
    assert (manifest.top_k, manifest.dims, manifest.labels) == (2, (2, 8), True)


def test_an_encoder_has_no_use_for_what_belongs_to_a_head(tmp_path: Path) -> None:
    policy = CascadePolicy((Stage(8, 0.5), Stage(20, None)))
    for arguments in ({"policy": policy}, {"labels": NAMES}):
        assert refusal(tmp_path / "m", ValueError, encoder(), **arguments) == (
            "policy and labels belong to a model with a head. "
            "Received: a model that does not end in a MatryoshkaHead. "
            "Leave them out, or export a MatryoshkaClassifier."
        )


def test_the_dims_of_an_encoder_are_within_its_width(tmp_path: Path) -> None:
    assert refusal(tmp_path / "m", ValueError, encoder(), dims=(8, 21)) == (
        "dims must be dims of the model: 1..20. "
        "Received: dims=(8, 21). Leave dims out to export all of them."
    )


def test_features_must_be_vectors(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5, 2)), keras.layers.Dense(4)])
    sample = np.zeros((2, 5, 2), np.float32)
    assert refusal(tmp_path / "m", ValueError, model, sample) == (
        "A model is exported with features of shape (batch, width). "
        "Received: features of shape (2, 5, 4). "
        "Add a pooling layer before the head; of a language model export next_token(model)."
    )


@pytest.mark.parametrize("gather", [list, lambda outputs: dict(zip("ab", outputs, strict=True))])
def test_a_model_of_two_outputs(tmp_path: Path, gather: Callable[[Any], Any]) -> None:
    inputs = keras.Input((5,))
    outputs = gather([keras.layers.Dense(4, name=name)(inputs) for name in "ab"])
    model = keras.Model(inputs, outputs, name="forked")
    assert refusal(tmp_path / "m", ValueError, model) == (
        "A model is exported with one output. Received: 2 outputs from 'forked'. "
        "Name the one that is served: keras.Model(model.input, features)."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_training_spoilt(tmp_path: Path, value: float) -> None:
    model = classifier()
    for weight in model.weights:
        weight.assign(np.full(weight.shape, value))
    text = refusal(tmp_path / "m", ExportError, model)
    backbone = text.partition(" from '")[2].partition("'")[0]
    assert text == (
        "A model must give finite values to be exported. "
        f"Received: NaN or infinity from '{backbone}' on the sample. "
        "Train it to a finite loss, and look for bad rows in the sample."
    )


def test_a_head_that_training_spoilt(tmp_path: Path) -> None:
    model = MatryoshkaClassifier(encoder(), MatryoshkaHead(3, dims=(2, 20)), name="spoilt")
    model.predict(X, verbose=0)
    model.head.weights[0].assign(np.full((2, 3), np.nan))
    assert refusal(tmp_path / "m", ExportError, model) == (
        "A model must give finite values to be exported. "
        "Received: NaN or infinity from 'spoilt' on the sample. "
        "Train it to a finite loss, and look for bad rows in the sample."
    )


def test_examples_in_docstrings() -> None:
    modules = [
        importlib.import_module(f"keras_mrl_export.{info.name}")
        for info in pkgutil.iter_modules(keras_mrl_export.__path__)
    ]
    results = [doctest.testmod(module) for module in (keras_mrl_export, *modules)]
    assert sum(result.failed for result in results) == 0
