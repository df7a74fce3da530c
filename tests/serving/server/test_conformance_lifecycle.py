"""The life of versions as a client sees it, at the address that test_conformance.py describes.

Each test has a model of its own.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.server_target import Served, predict, reload

Publish = Callable[[Path, str], Path]
X = np.ones((1, 4), np.float32)
SOME_POLLS_S = 2.5 if "KERAS_MRL_TFS_TARGET" in os.environ else 0.1


@pytest.fixture
def base(served: Served, request: pytest.FixtureRequest) -> Path:
    """The base path of a model named as the test."""
    path = served.base / f"of-{request.node.name}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def answering(served: Served, name: str, version: int | None = None) -> int:
    fields = {} if version is None else {"version": version}
    request = predict((), inputs={"x": X}, name=name, **fields)
    return int(served(request).model_spec.version.value)


def test_a_swap_and_a_swap_back(reloaded: Served, base: Path, name: str, publish: Publish) -> None:
    publish(base, "1")
    reloaded(reload(reloaded, **{name: ""}))
    assert answering(reloaded, name) == 1
    publish(base, "2")
    reloaded.reaches(name, (2, "AVAILABLE"), (1, "END"))
    assert answering(reloaded, name) == 2
    assert reloaded.refuses(predict(inputs={"x": X}, name=name, version=1)) == (
        "NOT_FOUND",
        f"Servable not found for request: Specific({name}, 1)",
    )
    shutil.rmtree(base / "2")
    reloaded.reaches(name, (2, "END"), (1, "AVAILABLE"))
    assert answering(reloaded, name) == 1


def test_numbers_are_read_as_numbers(
    reloaded: Served, base: Path, name: str, publish: Publish
) -> None:
    publish(base, "9")
    publish(base, "0010")
    (base / "v11").mkdir()
    (base / "12.tmp").mkdir()
    reloaded(reload(reloaded, **{name: ""}))
    assert reloaded.states(name) == [(10, "AVAILABLE")]
    assert answering(reloaded, name) == 10


def test_the_latest_two(reloaded: Served, base: Path, name: str, publish: Publish) -> None:
    for number in "123":
        publish(base, number)
    reloaded(reload(reloaded, **{name: "model_version_policy { latest { num_versions: 2 } }"}))
    reloaded.reaches(name, (3, "AVAILABLE"), (2, "AVAILABLE"))
    publish(base, "4")
    reloaded.reaches(name, (4, "AVAILABLE"), (3, "AVAILABLE"), (2, "END"))
    assert [answering(reloaded, name, version=number) for number in (3, 4)] == [3, 4]


def test_specific_versions(reloaded: Served, base: Path, name: str, publish: Publish) -> None:
    for number in "123":
        publish(base, number)
    policy = "model_version_policy { specific { versions: 1 versions: 2 versions: 7 } }"
    reloaded(reload(reloaded, **{name: policy}))
    reloaded.reaches(name, (2, "AVAILABLE"), (1, "AVAILABLE"))
    # A policy that changes is not waited for, and needs no restart.
    reloaded(reload(reloaded, **{name: ""}))
    reloaded.reaches(name, (3, "AVAILABLE"), (2, "END"), (1, "END"))


def test_a_version_that_does_not_load_leaves_the_old_one(
    reloaded: Served, base: Path, name: str, publish: Publish
) -> None:
    publish(base, "1")
    reloaded(reload(reloaded, **{name: ""}))
    (base / "2").mkdir()
    reloaded.reaches(name, (2, "END"), (1, "AVAILABLE"))
    assert answering(reloaded, name) == 1


def test_a_version_half_copied_is_served_and_fails(
    reloaded: Served, base: Path, name: str, publish: Publish, tmp_path: Path
) -> None:
    publish(base, "1")
    reloaded(reload(reloaded, **{name: ""}))
    half = publish(tmp_path / "beside", "2")
    shutil.rmtree(half / "variables")
    shutil.copytree(half, base / "copying")
    (base / "copying").rename(base / "2")
    reloaded.reaches(name, (2, "AVAILABLE"), (1, "END"))
    code, text = reloaded.refuses(predict(inputs={"x": X}, name=name))
    assert code == "FAILED_PRECONDITION"
    assert text is not None
    assert text.startswith("Could not find variable ")


def test_an_empty_base_path_unloads_the_model(
    reloaded: Served, base: Path, name: str, publish: Publish
) -> None:
    publish(base, "1")
    reloaded(reload(reloaded, **{name: ""}))
    shutil.rmtree(base / "1")
    reloaded.reaches(name, (1, "END"))
    assert reloaded.refuses(predict(inputs={"x": X}, name=name)) == (
        "NOT_FOUND",
        f"Servable not found for request: Latest({name})",
    )


def test_one_missing_base_path_stops_the_search_for_all(
    reloaded: Served, base: Path, name: str, publish: Publish
) -> None:
    publish(base, "1")
    other = reloaded.base / f"of-{name}_too"
    shutil.rmtree(other, ignore_errors=True)
    publish(other, "1")
    reloaded(reload(reloaded, **{name: "", f"{name}_too": ""}))
    away = other.with_name(f"{other.name}-away")
    shutil.rmtree(away, ignore_errors=True)
    other.rename(away)
    time.sleep(SOME_POLLS_S)
    publish(base, "2")
    time.sleep(SOME_POLLS_S)
    assert reloaded.states(name) == [(1, "AVAILABLE")]
    assert answering(reloaded, f"{name}_too") == 1
    away.rename(other)
    reloaded.reaches(name, (2, "AVAILABLE"), (1, "END"))
