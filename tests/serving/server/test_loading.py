"""Versions that do not load, in TensorFlow Serving's words."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from keras_mrl_serving.server.batching_config import batching_parameters
from keras_mrl_serving.server.loading import LoadOptions, load
from keras_mrl_serving.server.status import StatusError


@pytest.fixture
def version(saved_model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(saved_model, tmp_path / "3"))


def no_model(version: Path) -> None:
    shutil.rmtree(version)
    version.mkdir()


def empty_model(version: Path) -> None:
    (version / "saved_model.pb").write_bytes(b"")


def garbage(version: Path) -> None:
    (version / "saved_model.pb").write_bytes(b"garbage")


def refusal(version: Path, options: LoadOptions | None = None) -> tuple[str, str]:
    with pytest.raises(StatusError) as caught:
        load(str(version), options or LoadOptions())
    return caught.value.code.name, caught.value.message


@pytest.mark.parametrize(
    ("damage", "code", "text"),
    [
        (
            no_model,
            "NOT_FOUND",
            "Specified file path does not appear to contain a SavedModel bundle (should have a "
            "file called `saved_model.pb`)\nSpecified file path: VERSION",
        ),
        (
            empty_model,
            "NOT_FOUND",
            "Could not find meta graph def matching supplied tags: { serve }. To inspect available "
            "tag-sets in the SavedModel, please use the SavedModel CLI: `saved_model_cli`",
        ),
        (garbage, "DATA_LOSS", "Can't parse VERSION/saved_model.pb as binary proto"),
    ],
)
def test_a_version_that_is_no_model(
    version: Path, damage: Callable[[Path], None], code: str, text: str
) -> None:
    damage(version)
    assert refusal(version) == (code, text.replace("VERSION", str(version)))


def test_a_version_whose_variables_are_cut_short(version: Path) -> None:
    """The text is TensorFlow's alone; Python puts some of its own before it."""
    (data,) = (version / "variables").glob("variables.data-*")
    data.write_bytes(data.read_bytes()[:-1])
    _, text = refusal(version)
    assert "Read less bytes than requested" in text
    assert "Graph execution error" not in text


def test_batching_parameters_that_cannot_work(version: Path) -> None:
    parameters: Any = batching_parameters(True, None)
    text_format.Parse("num_batch_threads {value: 0}", parameters)
    assert refusal(version, LoadOptions(batching_parameters=parameters)) == (
        "INVALID_ARGUMENT",
        "num_batch_threads must be positive; was 0",
    )


def test_versions_loaded_with_the_same_options_share_their_threads(saved_model: Path) -> None:
    def num_threads() -> int:
        return sum(thread.name == "batching" for thread in threading.enumerate())

    parameters: Any = batching_parameters(True, None)
    text_format.Parse("num_batch_threads {value: 3}", parameters)
    options = LoadOptions(batching_parameters=parameters)
    before = num_threads()
    first, second = load(str(saved_model), options), load(str(saved_model), options)
    for session in (first, second):
        outputs = session.run("serving_default", {"x": np.ones((1, 4), np.float32)}, ["total"])
        assert outputs["total"].tolist() == [4]
    assert num_threads() == before + 3
    first.close()
    second.close()
    assert num_threads() == before
