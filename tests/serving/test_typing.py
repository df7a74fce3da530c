"""What a user's type checker sees: strict passes, and nothing of ours is `Any`."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import keras_mrl_serving
from keras_mrl_serving import (
    AsyncClient,
    Classification,
    ClassifiedRow,
    Client,
    Manifest,
    Neighbors,
    Options,
    Partial,
)

SCRIPT = """
import asyncio

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import (
    AsyncClient, CascadePolicy, Client, ExactIndex, FunnelSchedule, KerasMrlError, Options, Stage,
    Tls, truncate,
)


def embed(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    options = Options(timeout_s=2.0, metadata=lambda: {"authorization": "Bearer"}, tls=Tls())
    with Client(["one:8500", "two:8500"], model="digits", options=options) as client:
        dim: int = client.cheapest_dim(0.98)
        answer = client.classify_adaptive(images, CascadePolicy((Stage(8, 0.9), Stage(64, None))))
        names: list[str | None] = [row.label for row in answer]
        print(answer.above(0.5)[0], len(answer[0].above()), client.regress(images, dim).shape)
        print(names, answer[0].confidence + 1.0, answer[:2].dim.sum())
        index = ExactIndex.build(client.embed(images, 64), FunnelSchedule((8, 64), (20,), 5))
        for pairs in client.retrieve(images, index):
            best, score = pairs[0]
            print(best + 1, score + 1.0)
        values = client.predict({"image": images}, "features", outputs=["features"])
        print(values["features"].shape, [v.state.lower() for v in client.status()])
        client.embed_dataset([images, images], dim, "corpus.npy", progress=print)
        try:
            return truncate(client.embed(images, dim=dim, progress=print), 8)
        except KerasMrlError as error:
            if error.partial is not None:
                print(error.partial.rows, error.attempts, error.target)
            raise


async def main(jpegs: list[bytes]) -> None:
    async with AsyncClient("dns:///models:8500", model="photos") as client:
        answers = await asyncio.gather(*(client.classify([jpeg], dim=8) for jpeg in jpegs))
        print(answers[0][0].class_id + 1)
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Lines of mypy by script: one that is right, and one with a mistake."""
    folder = tmp_path_factory.mktemp("typing")
    scripts = {"right.py": SCRIPT, "wrong.py": SCRIPT.replace("class_id + 1", "class_id + ''")}
    for name, text in scripts.items():
        (folder / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={folder}", *scripts],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        # mypy does not follow the import hook of an editable installation.
        env={**os.environ, "MYPYPATH": str(Path(keras_mrl_serving.__file__).parents[1])},
    )
    lines = done.stdout.splitlines()
    assert "checked 2 source files" in lines[-1]
    # Of an installed package mypy reports nothing; on its path it is judged by the script's rules.
    return {name: [line for line in lines if line.startswith(f"{name}:")] for name in scripts}


def test_a_user_s_script_is_strict(reports: dict[str, list[str]]) -> None:
    assert reports["right.py"] == []


def test_mypy_would_have_seen_a_mistake(reports: dict[str, list[str]]) -> None:
    assert any("Unsupported operand types" in line for line in reports["wrong.py"])


def annotations(thing: Any) -> dict[str, str]:
    members = inspect.getmembers(thing, inspect.isfunction)
    public = [f for name, f in members if name == "__init__" or not name.startswith("_")]
    hints = {f"{f.__qualname__}({n})": str(a) for f in public for n, a in f.__annotations__.items()}
    return hints | {n: str(a) for n, a in vars(thing).get("__annotations__", {}).items()}


@pytest.mark.parametrize(
    "thing", [Client, AsyncClient, Classification, ClassifiedRow, Neighbors, Options, Partial]
)
def test_nothing_public_is_any(thing: Any) -> None:
    hints = annotations(thing)
    assert hints
    assert {name: a for name, a in hints.items() if "Any" in a} == {}


def test_any_would_have_been_seen() -> None:
    assert any("Any" in a for a in annotations(Manifest).values())
