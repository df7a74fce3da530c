"""Another policy for a version that is there: as if the model had been exported with it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from keras_mrl_export import ExportError, export_saved_model, publish_policy
from keras_mrl_serving import (
    Audits,
    Client,
    InvalidInputError,
    SignatureNotFoundError,
    estimate_harm,
)
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.saved_model import list_versions
from keras_mrl_serving.server import DevServer
from tests.helpers import exit_models
from tests.helpers.export_models import (
    DIMS,
    ROWS,
    TOP_K,
    Exported,
    assert_equal_rows,
    cascade,
    classification,
    read_manifest,
    warmup_records,
)


@contextmanager
def refuses(error: type[Exception], text: str) -> Iterator[None]:
    with pytest.raises(error) as caught:
        yield
    assert str(caught.value) == text


OTHERS = slice(16, ROWS)  # rows that the export has not seen


def copied(version: Exported, folder: Path) -> Path:
    path = folder / "models" / "1"
    shutil.copytree(version.path, path)
    return path


def other_policies(old: CascadePolicy) -> dict[str, CascadePolicy]:
    """Policies of the same stages."""
    stages = old.stages[:-1]
    last = old.stages[-1]

    def made(thresholds: list[float], temperatures: list[float]) -> CascadePolicy:
        changed = [
            replace(stage, threshold=t, temperature=scale)
            for stage, t, scale in zip(stages, thresholds, temperatures[:-1], strict=True)
        ]
        tail = replace(last, temperature=temperatures[-1])
        return CascadePolicy((*changed, tail), old.confidence, method="another")

    return {
        "lower": made([0.35, 0.45], [1.0, 1.0, 1.0]),
        "warmer": made([0.3, 0.2], [2.0, 3.0, 0.5]),
        "none leaves": made([1.0, 1.0], [1.0, 1.0, 1.0]),
        "all leave": made([-1.0, -1.0], [1.0, 2.0, 1.0]),
    }


@pytest.mark.parametrize("name", ["lower", "warmer", "none leaves", "all leave"])
def test_the_version_answers_as_if_it_were_exported_with_the_policy(
    untied: Exported, tmp_path: Path, name: str
) -> None:
    policy = other_policies(untied.policy)[name]
    source = copied(untied, tmp_path)
    path = publish_policy(source, policy)
    manifest, old = read_manifest(path), untied.manifest
    assert manifest.cascade == json.loads(json.dumps(policy.to_json()))
    assert (manifest.fingerprint, manifest.name) == (old.fingerprint, old.name)
    assert manifest.model_id not in (None, old.model_id)
    with SavedModelSession(path) as session:
        answer = session.run("classify_adaptive", untied.inputs(OTHERS))
        assert answer.pop("model_id").tolist() == [manifest.model_id] * len(answer["dim"])
        for output, values in cascade(untied.logits[OTHERS], policy, TOP_K, names=True).items():
            assert_equal_rows(answer[output], values)
        class_ids, stage_of = policy.route(untied.logits[OTHERS])
        assert answer["class_ids"][:, 0].tolist() == class_ids.tolist()
        assert answer["dim"].tolist() == [DIMS[stage] for stage in stage_of]
        for column, stage in enumerate(policy.stages):
            answer = session.run(f"classify_{stage.dim}", untied.inputs(OTHERS))
            logits = untied.logits[OTHERS, column]
            expected = classification(logits, stage.temperature, TOP_K, names=True)
            assert_equal_rows(answer["probabilities"], expected["probabilities"])
        embedding = session.run("embed_4", untied.inputs(OTHERS))["embedding"]
        np.testing.assert_array_equal(embedding, untied.ask("embed_4", OTHERS)["embedding"])
        described = session.run("describe", {"key": np.array([b""], object)})
        assert described["manifest"][0] == manifest.to_json().encode()


def test_only_what_differs_is_written_and_the_old_version_stays(
    untied: Exported, tmp_path: Path
) -> None:
    source = copied(untied, tmp_path)
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    path = publish_policy(source, untied.policy, version=7)
    assert path == source.parent / "7"
    assert {p: p.read_bytes() for p in source.rglob("*") if p.is_file()} == before
    written = {"saved_model.pb", "keras_mrl.json", "keras_mrl_parity.json"}
    new = {p.relative_to(path) for p in path.rglob("*") if p.is_file()}
    assert {p.relative_to(source) for p in before} - new == {Path("fingerprint.pb")}
    for name in new:
        assert ((source / name).stat().st_ino == (path / name).stat().st_ino) == (
            name.name not in written
        )
    assert json.loads((path / "assets.extra/keras_mrl_parity.json").read_text())["rows"] == 1
    # One more, from the version that was published: the constants are found again.
    again = publish_policy(path, other_policies(untied.policy)["warmer"], tmp_path / "other")
    assert again.parent == tmp_path / "other"
    assert read_manifest(again).fingerprint == untied.manifest.fingerprint
    shutil.rmtree(path)
    assert len(list(warmup_records(again))) == len(list(warmup_records(source)))


def test_one_server_answers_by_both_policies_by_label(untied: Exported, tmp_path: Path) -> None:
    source = copied(untied, tmp_path)
    full = other_policies(untied.policy)["none leaves"]
    publish_policy(source, full, version=2)
    config = tmp_path / "models.config"
    config.write_text(
        f'''model_config_list {{ config {{ name: "untied" base_path: "{source.parent}"
        model_platform: "tensorflow" model_version_policy {{ all {{}} }}
        version_labels {{ key: "stable" value: 1 }} version_labels {{ key: "b" value: 2 }} }} }}'''
    )
    rows = untied.inputs(OTHERS)
    with DevServer(
        model_config_file=config, allow_version_labels_for_unavailable_models=True
    ) as target:
        for label, policy in (("stable", untied.policy), ("b", full)):
            with Client(target, "untied", label=label) as client:
                answer = client.classify_adaptive(rows, audit_rate=1.0)
                class_ids, stage_of = policy.route(untied.logits[OTHERS])
                assert answer.class_ids[:, 0].tolist() == class_ids.tolist()
                assert answer.dim.tolist() == [DIMS[stage] for stage in stage_of]
                last = untied.logits[OTHERS, -1].argmax(-1)
                assert answer.full_class_ids is not None
                assert answer.full_class_ids.tolist() == last.tolist()


def test_policies_of_other_stages_are_refused(untied: Exported, tmp_path: Path) -> None:
    source = copied(untied, tmp_path)
    rule = (
        "A policy for a version that is there asks the stages that its graph asks, by the same "
        "confidence: 2, 4, 16 by max_probability. Received: {}. "
        "Learn thresholds for these, or export the model again with this policy."
    )
    stages = untied.policy.stages
    with refuses(ValueError, rule.format("2, 16 by max_probability")):
        publish_policy(source, CascadePolicy((stages[0], stages[-1])))
    with refuses(ValueError, rule.format("2, 4, 16 by margin")):
        publish_policy(source, CascadePolicy(stages, "margin"))
    exits = CascadePolicy((Stage(2, 0.5, exit="early"), *stages[1:]), "max_probability")
    with refuses(ValueError, rule.format("early at 2, 4, 16 by max_probability")):
        publish_policy(source, exits)
    with pytest.raises(TypeError, match=r"\Apolicy must be a CascadePolicy. Received: dict. "):
        publish_policy(source, untied.policy.to_json())  # type: ignore[arg-type]
    with pytest.raises(FileExistsError, match="A published version is never overwritten"):
        publish_policy(source, untied.policy, version=1)
    assert list(list_versions(source.parent)) == [1]


def test_folders_without_a_policy_are_refused(
    of_tokens: Exported, untied: Exported, tmp_path: Path
) -> None:
    text = (
        "A policy takes the place of another. "
        f"Received: {of_tokens.path}, exported without one. Export the model with it: "
        "export_saved_model(..., policy=policy)."
    )
    with refuses(ValueError, text):
        publish_policy(of_tokens.path, untied.policy)
    for folder in (tmp_path, tmp_path / "none", untied.path.parent):
        text = (
            "A policy is published for a version that export_saved_model wrote. "
            f"Received: {folder}, which is none. Give its folder, for example models/birds/1."
        )
        with refuses(ValueError, text):
            publish_policy(folder, untied.policy)


def test_without_warm_up_records_rows_must_be_given(untied: Exported, tmp_path: Path) -> None:
    source = copied(untied, tmp_path)
    (source / "assets.extra/tf_serving_warmup_requests").unlink()
    text = (
        "A policy is compared on real rows before it is published. "
        f"Received: {source}, which has no warm-up records. "
        "Give a few rows: sample=images[:16]."
    )
    with refuses(ValueError, text):
        publish_policy(source, untied.policy)
    with pytest.raises(InvalidInputError):
        publish_policy(source, untied.policy, sample=np.zeros((4, 3)))
    assert list(list_versions(source.parent)) == [1]
    path = publish_policy(source, untied.policy, sample=untied.inputs(OTHERS))
    report = json.loads((path / "assets.extra/keras_mrl_parity.json").read_text())
    assert report["rows"] == ROWS - 16
    assert report["largest_difference"]["classify_adaptive"] <= 1e-5


def test_rows_that_cannot_be_compared_are_said_to_be_so(untied: Exported, tmp_path: Path) -> None:
    source = copied(untied, tmp_path)
    rows = untied.inputs(OTHERS)
    text = (
        "A policy is compared on real rows before it is published. "
        "Received: a sample of no rows. Give a few rows: sample=images[:16]."
    )
    with refuses(ValueError, text):
        publish_policy(source, untied.policy, sample={k: own[:0] for k, own in rows.items()})
    assert os.listdir(source.parent) == ["1"]


def test_linked_folders_and_files_of_a_version_are_taken_along(
    untied: Exported, tmp_path: Path
) -> None:
    source = copied(untied, tmp_path)
    for name in ("variables", "assets"):
        shutil.move(source / name, tmp_path / name)
        (source / name).symlink_to(tmp_path / name)
    path = publish_policy(source, untied.policy)
    taken = {file.relative_to(path) for file in path.rglob("*") if file.is_file()}
    whole = {file.relative_to(untied.path) for file in untied.path.rglob("*") if file.is_file()}
    assert whole - taken == {Path("fingerprint.pb")}
    assert not any(file.is_symlink() for file in path.rglob("*"))


WHOLE = "A policy is published for a version that is whole, with room for another beside it. "


@pytest.mark.parametrize(
    "file",
    [
        "saved_model.pb",
        "variables/variables.data-00000-of-00001",
        "assets.extra/tf_serving_warmup_requests",
    ],
)
def test_a_version_that_is_not_whole_is_refused(
    untied: Exported, tmp_path: Path, file: str
) -> None:
    source = copied(untied, tmp_path)
    content = (source / file).read_bytes()
    (source / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError) as caught:
        publish_policy(source, untied.policy)
    received = f"Received: {source}, of which TensorFlow or the file system says: "
    assert str(caught.value).startswith(f"{WHOLE}{received}")
    assert str(caught.value).endswith(
        " Nothing was published. Copy the version again, export the model again, or make room on "
        "the disk."
    )
    assert os.listdir(source.parent) == ["1"]


def test_a_link_to_nothing_and_a_file_as_base_path_are_refused(
    untied: Exported, tmp_path: Path
) -> None:
    source = copied(untied, tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    for base_path in (file, file / "models"):
        with pytest.raises(ExportError, match=re.escape(f"{WHOLE}Received: {source}, of which")):
            publish_policy(source, untied.policy, base_path)
    (source / "assets.extra" / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(ExportError, match="No such file or directory"):
        publish_policy(source, untied.policy)
    assert os.listdir(source.parent) == ["1"]


@contextmanager
def edited_graph(source: Path) -> Iterator[Any]:
    """The nodes of a version's functions, written back at the end."""
    file = source / "saved_model.pb"
    saved = SavedModel.FromString(file.read_bytes())
    graph = saved.meta_graphs[0].graph_def
    yield [node for function in graph.library.function for node in function.node_def]
    file.write_bytes(saved.SerializeToString())


@pytest.mark.parametrize("change", ["a name of an earlier version", "another value"])
def test_a_graph_without_these_constants_is_refused(
    untied: Exported, tmp_path: Path, change: str
) -> None:
    source = copied(untied, tmp_path)
    with edited_graph(source) as nodes:
        for node in nodes:
            if node.name == "keras_mrl_threshold_1" and change == "another value":
                node.attr["value"].tensor.float_val[:] = [0.123]
            elif node.name == "keras_mrl_threshold_1":
                node.name = "y"
            node.input[:] = [
                name.replace("keras_mrl_threshold_1:", "y:") if change != "another value" else name
                for name in node.input
            ]
    text = (
        "A policy is replaced in a graph that holds thresholds, temperatures, manifest and id by "
        f"name. Received: {source}, without keras_mrl_threshold_1: an earlier version of "
        "keras-mrl exported it. Export the model again with this policy."
    )
    with refuses(ExportError, text):
        publish_policy(source, untied.policy)
    assert os.listdir(source.parent) == ["1"]


def test_a_graph_that_decides_otherwise_is_not_published(untied: Exported, tmp_path: Path) -> None:
    """Its second stage accepts at another threshold than the constant says."""
    source = copied(untied, tmp_path)
    with edited_graph(source) as nodes:
        greater = [
            node
            for node in nodes
            if node.op == "Greater" and node.input[1].startswith("keras_mrl_threshold_1:")
        ]
        for node in greater:
            node.op = "Less"
    assert greater
    policy = other_policies(untied.policy)["lower"]
    with pytest.raises(ExportError, match="Nothing was published") as caught:
        publish_policy(source, policy, sample=untied.inputs(OTHERS))
    assert str(caught.value).startswith("A version must decide each row where its policy does. ")
    assert os.listdir(source.parent) == ["1"]


def test_a_policy_over_exits_is_replaced_and_asked_by_a_client(tmp_path: Path) -> None:
    model, keys = exit_models.vectors(), [("first", 2), ("first", 8), (None, 8)]
    logits = exit_models.all_logits(model, exit_models.VECTORS)
    old = exit_models.halving(logits, keys)
    source = export_saved_model(
        model,
        tmp_path / "models",
        exit_models.VECTORS[:16],
        policy=old,
        signatures=["classify", "classify_adaptive", "classify_first_2", "embed_first_8"],
        activation="softmax",
        version=1,
    )
    rng = np.random.default_rng(0)
    for number in range(2, 5):
        thresholds = [*rng.uniform(0.05, 0.6, 2), None]
        stages = [
            Stage(dim, limit, float(rng.uniform(0.5, 2)), exit)
            for (exit, dim), limit in zip(keys, thresholds, strict=True)
        ]
        policy = CascadePolicy(tuple(stages), old.confidence)
        path = publish_policy(source, policy, version=number, sample=exit_models.VECTORS[:64])
    text = (
        "A policy is compared on rows that the model answers by finite numbers. Received: rows "
        "whose probabilities at stage 0 are NaN or infinite. Leave them out."
    )
    with refuses(ValueError, text):
        publish_policy(source, policy, sample=np.full((2, 5), np.nan, np.float32))
    manifest = read_manifest(path)
    assert manifest.cascade is None
    assert CascadePolicy.from_json(manifest.adaptive_cascade or {}) == policy
    costs = [
        [stage.get("relative_cost") for stage in own.exit_cascade["exit_stages"]]
        for own in (read_manifest(source), manifest)
        if own.exit_cascade is not None
    ]
    assert costs[0] == costs[1] != [None] * 3
    with DevServer(tmp_path / "models") as target, Client(target) as client:
        answer = client.classify_adaptive(exit_models.VECTORS, audit_rate=0.5, audit_seed=1)
        class_ids, stage_of = policy.route(logits)
        assert len(set(stage_of.tolist())) == 3
        assert answer.class_ids[:, 0].tolist() == class_ids.tolist()
        left_at = [(row.exit, row.dim, row.relative_cost) for row in answer]
        expected = [(exit or "last", dim) for exit, dim in keys]
        assert left_at == [
            (*expected[stage], pytest.approx(costs[0][stage], rel=1e-6)) for stage in stage_of
        ]
        full = logits[None, 8].argmax(-1)
        both = Audits.of(answer, full)
        assert 90 < len(both) < 170
        np.testing.assert_array_equal(both.full, full[answer.audited])
        harm = float(np.mean(class_ids != full))
        assert estimate_harm(both).low <= harm <= estimate_harm(both).high
        early = client.classify(exit_models.VECTORS, 2, exit="first")
        np.testing.assert_array_equal(early.class_ids[:, 0], logits["first", 2].argmax(-1))
        assert client.embed(exit_models.VECTORS, 8, exit="first").shape == (256, 8)
        with pytest.raises(SignatureNotFoundError, match="signature 'classify_first_8'"):
            client.classify(exit_models.VECTORS, 8, exit="first")
