"""`keras-mrl publish`: another policy for a version, from the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from keras_mrl_serving import CascadePolicy
from keras_mrl_serving.saved_model import read_manifest
from tests.helpers.cli import Call, Exported


@pytest.fixture
def base_path(exported: Exported, folder: Path) -> Path:
    """The folder of versions, relative to the one that commands are called in."""
    shutil.copytree(exported.base_path, folder / "models")
    return Path("models")


def written(policy: CascadePolicy) -> str:
    Path("policy.json").write_text(json.dumps(policy.to_json()))
    return "policy.json"


def policy_of(version: Path) -> CascadePolicy:
    manifest = read_manifest(version)
    assert manifest is not None
    return CascadePolicy.from_json(manifest.adaptive_cascade or {})


def test_a_policy_becomes_the_next_version(base_path: Path, call: Call) -> None:
    old = policy_of(base_path / "1")
    stages = [replace(stage, threshold=0.75) for stage in old.stages[:-1]]
    new = CascadePolicy((*stages, old.stages[-1]), old.confidence, method="by hand")
    ended = call("publish", str(base_path), "--policy", written(new), "--version", "5")
    assert (ended.status, ended.out) == (0, "models/5\n")
    assert ended.err == "Publishing the policy for the weights of models/1 ...\n"
    assert policy_of(base_path / "5") == new
    ended = call("publish", "models/1", "--policy", written(old), "--base-path", "others")
    assert (ended.status, ended.out.startswith("others/")) == (0, True)


def test_what_cannot_be_published_is_one_line(base_path: Path, call: Call) -> None:
    old = policy_of(base_path / "1")
    shorter = CascadePolicy(old.stages[-1:], old.confidence)
    publish = call.of("publish", str(base_path), "--policy")
    note = "Publishing the policy for the weights of models/1 ..."
    for words, text in (
        ((written(shorter),), "A policy for a version that is there asks the stages that its "),
        ((written(shorter), "--version=1"), "A policy for a version that is there asks "),
        (("none.json",), "--policy must be a file that can be read. Received: none.json"),
    ):
        ended = publish(*words)
        assert ended.status == 1
        *_, last = ended.err.removeprefix(note).strip().splitlines()
        assert last.startswith(f"keras-mrl: {text}")
    (base_path / "1/assets.extra/tf_serving_warmup_requests").unlink()
    ended = publish(written(old))
    assert "Give a few rows: --sample few.npy." in ended.err
    assert [path.name for path in base_path.iterdir()] == ["1"]
