"""Which arguments an export takes, and the whole error for each one it refuses."""

import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaEncoder
from keras_mrl.evaluation import Quality
from keras_mrl_export import ImageDecoder, export_index, export_saved_model
from keras_mrl_export.arguments import (
    check_base_path,
    check_batch_sizes,
    check_name,
    check_policy_is_used,
    choose_signatures,
)
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex
from tests.helpers.export_models import NAMES, X, dense

CLASSIFIER, ENCODER = dense(head=True), dense(width=20)
OUTPUT = CLASSIFIER.layers[-1].name
ROWS = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)


def refusal(
    base_path: Path, kind: type[Exception], model: keras.Model = CLASSIFIER, **arguments: Any
) -> str:
    """The error for arguments that do not fit; the attempt may leave nothing."""
    with pytest.raises(kind) as caught:
        export_saved_model(model, base_path, X, **arguments)
    assert type(caught.value) is kind
    assert not base_path.exists()
    return str(caught.value)


UNKNOWN_DIMS = "dims must be dims of the model: (2, 4, 8). "
CHECKED_DIMS = "dims must be strictly increasing positive integers. "
LABELS = "labels must name each of the 3 classes on one line. "
ONE_EACH = "Give one non-empty string of UTF-8 per class id, without line breaks or outer blanks."
NO_QUALITY = "quality must give measures by dim, and a number by measure. "
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
        "top_k must be a positive integer. Received: top_k=0. Give for example 5.",
    ),
    "top_k=1.5": (
        {"top_k": 1.5},
        "top_k must be a positive integer. Received: top_k=1.5. Give for example 5.",
    ),
    "version=-1": (
        {"version": -1},
        "version must be a non-negative integer. Received: version=-1. "
        "Leave it out to take a number that is free.",
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
        "quality must be of dims that are exported: (2, 4, 8). Received: quality of 16. "
        "Leave it out, or export these dims, too: dims=(2, 4, 8, 16).",
    ),
    "quality of another output": (
        {"quality": Quality({8: {"top1": 0.5}}, output="odd"), "output": OUTPUT},
        f"quality must be of the output that is exported. Received: quality of output 'odd' for "
        f"output={OUTPUT!r}. Judge that one: "
        f"quality=evaluate(model, x, y[{OUTPUT!r}], output={OUTPUT!r}).",
    ),
    "quality that is not a number": (
        {"quality": {8: {"top1": float("nan")}}},
        "quality must give finite numbers. Received: top1 nan at dim 8. "
        "Leave out what was not measured.",
    ),
    "too few weights": (
        {"weights": (1.0, 2.0)},
        WEIGHTS + "Received: 2 weights (1.0, 2.0) for 3 dims. "
        "Give as many weights as the head has dims, or weights=None for ones.",
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
}


@pytest.mark.parametrize("wrong", ARGUMENTS)
def test_arguments_that_do_not_fit(tmp_path: Path, wrong: str) -> None:
    arguments, text = ARGUMENTS[wrong]
    assert refusal(tmp_path / "m", ValueError, **arguments) == text


EXACT = (
    "A gallery in the graph has an exact first stage, as ExactIndex has. Received: FaissIndex. "
    "Build one of the same embeddings: ExactIndex.build(gallery, schedule, ids)."
)


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
        (
            {"decoder": {}},
            "decoder must be an ImageDecoder. Received: dict. "
            "Give one of the model's input: ImageDecoder(height=32, width=32).",
        ),
        ({"index": FaissIndex.build(ROWS, FunnelSchedule((8,), (), 1))}, EXACT),
    ],
)
def test_arguments_of_another_type(tmp_path: Path, arguments: Any, text: str) -> None:
    assert refusal(tmp_path / "m", TypeError, **arguments) == text


def test_a_gallery_of_another_type(tmp_path: Path) -> None:
    index: Any = FaissIndex.build(ROWS, FunnelSchedule((8,), (), 1))
    with pytest.raises(TypeError) as caught:
        export_index(index, tmp_path / "m")
    assert str(caught.value) == EXACT
    named = ExactIndex.build(ROWS, FunnelSchedule((8,), (), 1), [f"{n}" for n in range(len(ROWS))])
    with pytest.raises(ValueError, match=r"^A gallery in the graph answers with int64 ids\. "):
        export_index(named, tmp_path / "m")
    with pytest.raises(ValueError, match=r"^A gallery in the graph answers with int64 ids\. "):
        refusal(tmp_path / "m", TypeError, index=named)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (
            ExactIndex.build(ROWS, FunnelSchedule((4,), (), 1)),
            "An index that is exported with a model is as wide as the model's last dim. "
            "Received: an index of width 4 for dims=(2, 4, 8). "
            "Give dims= up to its width, or build it at the last dim.",
        ),
        *(
            (
                ExactIndex.build(ROWS, FunnelSchedule((8,), (), 1), metric=metric),
                "Embeddings of unit length are compared by cosine: their prefixes have other "
                f"lengths. Received: an index with metric={metric!r} and normalize=True. "
                "Give normalize=False, or build the index with cosine.",
            )
            for metric in ("dot", "l2")
        ),
    ],
)
def test_indexes_that_do_not_fit_a_model(index: ExactIndex, text: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "m", ValueError, index=index) == text


def test_an_encoder_has_no_use_for_arguments_of_a_head(tmp_path: Path) -> None:
    policy = CascadePolicy((Stage(8, 0.5), Stage(20, None)))
    for arguments in ({"policy": policy}, {"labels": NAMES}):
        assert refusal(tmp_path / "m", ValueError, ENCODER, **arguments) == (
            "policy and labels belong to a model with a head. "
            "Received: a model that does not end in a MatryoshkaHead. "
            "Leave them out, or export a MatryoshkaClassifier."
        )


def test_the_dims_of_an_encoder_are_within_its_width(tmp_path: Path) -> None:
    assert refusal(tmp_path / "m", ValueError, ENCODER, dims=(8, 21)) == (
        "dims must be dims of the model: 1..20. "
        "Received: dims=(8, 21). Leave dims out to export all of them."
    )


@pytest.mark.parametrize("sizes", [(1, 5), np.array([1, 5]), (size for size in (1, 5))])
def test_batch_sizes_may_come_in_any_sequence(sizes: Any) -> None:
    assert check_batch_sizes(sizes) == (1, 5)


@pytest.mark.parametrize("sizes", [(0,), (True,), (1.5,)])
def test_batch_sizes_that_are_none(sizes: Any) -> None:
    with pytest.raises(ValueError, match="warmup_batch_sizes") as caught:
        check_batch_sizes(sizes)
    assert str(caught.value) == (
        f"warmup_batch_sizes must be positive integers. Received: {sizes}. "
        "Give for example (1, 32), or () for no warm-up."
    )


# Where a version may go, and what it may be called.


def to_model(base_path: Any, **arguments: Any) -> Path:
    return export_saved_model(ENCODER, base_path, X, **arguments)


def to_index(base_path: Any, **arguments: Any) -> Path:
    return export_index(ExactIndex.build(ROWS, FunnelSchedule((8,), (), 1)), base_path, **arguments)


EXPORTS = pytest.mark.parametrize("export", [to_model, to_index])
URLS = ["gs://bucket/birds", "s3://bucket/birds", "hdfs://host/birds", "file:///birds"]


@EXPORTS
@pytest.mark.parametrize("base_path", [*URLS, Path("gs://bucket/birds"), ""])
def test_a_base_path_that_is_no_folder(
    export: Any, base_path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="base_path") as caught:
        export(base_path)
    assert str(caught.value) == (
        "base_path must be a folder of a file system. "
        f"Received: base_path={str(base_path) if base_path else ''!r}. "
        "Export to a folder, then copy the version's folder to where servers read."
    )
    assert os.listdir(tmp_path) == []


@EXPORTS
def test_a_base_path_of_another_kind(export: Any) -> None:
    with pytest.raises(TypeError, match="base_path") as caught:
        export(None)
    assert str(caught.value) == (
        "base_path must be a folder, a str or a Path. "
        "Received: NoneType. Give for example 'models/birds'."
    )


@pytest.mark.parametrize("base_path", ["a:b", "C:/models", "models/gs://x", "./s3:/x", "~x", "/a"])
def test_folders_of_odd_names_are_folders(base_path: str) -> None:
    assert check_base_path(base_path) == Path(base_path)


@EXPORTS
@pytest.mark.parametrize(
    "name", ["", " ", "a b", "größe", "\ud800", "a/b", "_a", "a.", "a\n", 5, b"a"]
)
def test_a_name_that_is_none(export: Any, name: Any, tmp_path: Path) -> None:
    kind = ValueError if isinstance(name, str) else TypeError
    with pytest.raises(kind) as caught:
        export(tmp_path / "models", name=name)
    assert type(caught.value) is kind
    assert str(caught.value) == (
        "name must be of letters, digits, '_', '.' and '-', the first and the last a letter or "
        f"digit. Received: name={name!r}. Give for example 'birds'."
    )
    assert os.listdir(tmp_path) == []


def test_a_gallery_has_no_name_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Received: name=None"):
        to_index(tmp_path, name=None)


@pytest.mark.parametrize("name", ["a", "birds", "tiny_One", "v1.2-beta"])
def test_a_name(name: str) -> None:
    assert check_name(name) == check_name(None, name) == name
    assert check_name(name, "a b") == name


def test_the_model_s_own_name_is_checked_too(tmp_path: Path) -> None:
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(8)(inputs), name="birds of 2026")
    with pytest.raises(ValueError, match="a model named") as caught:
        export_saved_model(model, tmp_path / "models", X)
    assert str(caught.value) == (
        "name must be of letters, digits, '_', '.' and '-', the first and the last a letter or "
        "digit. Received: a model named 'birds of 2026'. Give another: name='birds'."
    )
    assert os.listdir(tmp_path) == []


# Which signatures are written: all of the model's, or those that were requested.

POLICY = CascadePolicy((Stage(2, 0.5), Stage(4, None)))
INDEX = ExactIndex.build(np.eye(8, 4, dtype=np.float32), FunnelSchedule((2, 4), (3,), 1))


def chosen(requested: Any, policy: Any = POLICY, index: Any = None) -> tuple[str, ...]:
    return choose_signatures(requested, (2, 4), "softmax", policy, index)


def test_all_unless_some_are_requested() -> None:
    assert chosen(None) == (
        *("embed_2", "embed_4", "classify_2", "classify_4", "features", "head_2", "head_4"),
        "classify_adaptive",
    )
    assert chosen(None, index=INDEX)[-4:] == ("retrieve", "search", "search_2", "search_4")
    assert choose_signatures(None, (8,), None, None, None) == ("embed_8", "features")


def test_the_other_tower_has_a_family_of_its_own() -> None:
    def of_two(requested: Any) -> tuple[str, ...]:
        return choose_signatures(requested, (2, 4), None, None, None, has_other_tower=True)

    assert of_two(None) == ("embed_2", "embed_4", "embed_other_2", "embed_other_4", "features")
    assert of_two("embed") == ("embed_2", "embed_4")
    assert of_two(["embed_other"]) == ("embed_other_2", "embed_other_4")


@pytest.mark.parametrize(
    ("requested", "names"),
    [
        (["embed"], ("embed_2", "embed_4")),
        ("embed", ("embed_2", "embed_4")),
        (["head_4", "embed_2", "embed_2"], ("embed_2", "head_4")),
        (["classify"], ("classify_2", "classify_4")),
        (["classify_adaptive"], ("classify_adaptive",)),
        (["describe", "serving_default"], ()),
        ([], ()),
    ],
)
def test_names_and_families(requested: Any, names: tuple[str, ...]) -> None:
    assert chosen(requested) == names


def test_search_is_the_funnel_and_its_family() -> None:
    assert chosen(["search"], index=INDEX) == ("search", "search_2", "search_4")


def test_signatures_that_the_model_cannot_have() -> None:
    with pytest.raises(ValueError, match="signatures must be of those") as caught:
        choose_signatures(["embed", "classify", "embed_3"], (2, 4), None, None, None)
    assert str(caught.value) == (
        "signatures must be of those the model can have: embed_2, embed_4, features. "
        "Received: 'classify', 'embed_3'. Give those names, or a family of them: \"embed\"."
    )


def test_a_policy_that_no_signature_uses_is_refused() -> None:
    warm = CascadePolicy((Stage(2, 0.5, 3.0), Stage(4, None)))
    refused = [
        (POLICY, ["embed", "classify", "head"]),
        (warm, ["embed", "classify_4", "features"]),
    ]
    for policy, signatures in refused:
        with pytest.raises(ValueError, match="policy") as caught:
            check_policy_is_used(policy, chosen(signatures, policy), (2, 4))
        assert str(caught.value) == (
            "policy is what classify_adaptive decides by, and its temperatures are those of "
            "classify_<m>. Received: a policy, and signatures that use neither. "
            "Add classify_adaptive to signatures, or leave policy out."
        )
    default = CascadePolicy((Stage(2, 0.5), Stage(4, None, 3.0)))
    used = [(warm, ["head_2"]), (warm, ["classify"]), (POLICY, ["classify_adaptive"])]
    for policy, signatures in [*used, (default, ["embed"])]:
        check_policy_is_used(policy, chosen(signatures, policy), (2, 4))
    check_policy_is_used(POLICY, chosen(None), (2, 4))
    check_policy_is_used(None, chosen(["embed"], None), (2, 4))


@pytest.mark.parametrize("name", ["other_sample", "other_decoder"])
def test_one_tower_has_no_rows_of_another(tmp_path: Path, name: str) -> None:
    given = {"other_sample": X, "other_decoder": ImageDecoder(height=4, width=4)}
    text = (
        f"{name} is of the other tower of a model of two. "
        f"Received: {name} for Functional 'small', which has one. Leave it out, or export a "
        "MatryoshkaEncoder(tower, other_tower)."
    )
    assert refusal(tmp_path / "m", ValueError, ENCODER, **{name: given[name]}) == text


def test_two_towers_need_rows_of_both(tmp_path: Path) -> None:
    encoder = MatryoshkaEncoder(dense(), dense(), name="shop")
    text = (
        "A model of two towers is exported whole, and compared on rows of both. "
        "Received: no other_sample for MatryoshkaEncoder 'shop'. "
        "Give a few rows of the other tower: other_sample=items[:8]."
    )
    assert refusal(tmp_path / "m", ValueError, encoder) == text
    text = (
        "other_decoder must be an ImageDecoder. Received: dict. "
        "Give one of the other tower's input: ImageDecoder(height=32, width=32)."
    )
    assert refusal(tmp_path / "m", TypeError, encoder, other_decoder={}) == text
    text = refusal(tmp_path / "m", ValueError, encoder, other_sample=X[:, :3])
    assert text.startswith("Of the other tower: sample must have the shape of the model's input")
