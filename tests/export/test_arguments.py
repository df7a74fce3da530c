"""Where a version may go, and what it may be called."""

import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl_cli.deploying.work import _NAME
from keras_mrl_export import arguments, export_index, export_saved_model
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex

X = np.ones((4, 8), np.float32)


def to_model(base_path: Any, **arguments: Any) -> Path:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    return export_saved_model(model, base_path, X, **arguments)


def to_index(base_path: Any, **arguments: Any) -> Path:
    index = ExactIndex.build(X, FunnelSchedule((8,), (), 1))
    return export_index(index, base_path, **arguments)


EXPORTS = pytest.mark.parametrize("export", [to_model, to_index])
URLS = ["gs://bucket/birds", "s3://bucket/birds", "hdfs://host/birds", "file:///birds"]


@EXPORTS
@pytest.mark.parametrize("given", [*URLS, Path("gs://bucket/birds"), ""])
def test_a_base_path_that_is_no_folder(
    export: Any, given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="base_path") as caught:
        export(given)
    assert str(caught.value) == (
        "base_path must be a folder of a file system. "
        f"Received: base_path={str(given) if given else ''!r}. "
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


@pytest.mark.parametrize("given", ["a:b", "C:/models", "models/gs://x", "./s3:/x", "~x", "/a"])
def test_folders_of_odd_names_are_folders(given: str) -> None:
    assert arguments.checked_base_path(given) == Path(given)


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


def test_a_name_is_what_deploy_takes() -> None:
    assert arguments._NAME == _NAME
    for name in ("a", "birds", "tiny_One", "v1.2-beta"):
        assert arguments.checked_name(name) == name
