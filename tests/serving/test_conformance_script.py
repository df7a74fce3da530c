"""serving/deploy/conformance.sh, with a docker and a Python that only note how they were called."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "serving" / "deploy" / "conformance.sh"
NOTE = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    settings = {{k: v for k, v in os.environ.items() if k.startswith("KERAS_MRL_TFS")}}
    folders = [v for k, v in settings.items() if k.endswith("BASE_PATH")]
    there = all(os.path.isdir(folder) for folder in folders)
    log.write(json.dumps([sys.argv[1:], settings, there]) + "\\n")
if sys.argv[1:2] == ["run"]:
    print("container-" + ("b" if "--enable_batching=true" in sys.argv else "a"))
if sys.argv[1:2] == ["port"]:
    print("127.0.0.1:1" if sys.argv[2] == "container-a" else "127.0.0.1:2", "[::1]:3", sep="\\n")
sys.exit({status} if "pytest" in sys.argv else 0)
"""


def run(tmp_path: Path, *arguments: str, status: int = 0, docker: bool = True) -> Any:
    log = tmp_path / "log"
    names = ["python", *(["docker"] if docker else [])]
    for name in names:
        file = tmp_path / name
        file.write_text(NOTE.format(python=sys.executable, log=str(log), status=status))
        file.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin" if docker else str(tmp_path)
    if not docker:
        for tool in ("dirname", "bash"):
            (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = subprocess.run(
        [str(SCRIPT), *arguments],
        env={"PATH": path, "PYTHON": str(tmp_path / "python"), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done, calls


@pytest.mark.parametrize("status", [0, 1])
def test_two_servers_are_asked_and_removed(tmp_path: Path, status: int) -> None:
    done, calls = run(tmp_path, "tensorflow/serving:2.19.1", "-x", status=status)
    assert (done.returncode, done.stderr) == (status, "")
    runs = [words for words, *_ in calls if words[0] == "run"]
    (tests,) = [call for call in calls if "pytest" in call[0]]
    words, settings, there = tests
    assert there
    plain, batching = (
        settings["KERAS_MRL_TFS_BASE_PATH"],
        settings["KERAS_MRL_TFS_BATCHING_BASE_PATH"],
    )
    assert settings["KERAS_MRL_TFS_TARGET"] == "127.0.0.1:1"
    assert settings["KERAS_MRL_TFS_BATCHING_TARGET"] == "127.0.0.1:2"
    for flags, base in zip(runs, (plain, batching), strict=True):
        assert "tensorflow/serving:2.19.1" in flags
        assert {f"--model_base_path={base}", "--model_name=default"} <= set(flags)
        root = os.path.dirname(base)
        assert f"{root}:{root}:ro" in flags
    assert words[-1] == "-x"
    files = {Path(word).name for word in words if word.endswith(".py")}
    beside = (Path(__file__).parent / "server").glob("test_conformance*.py")
    assert files == {file.name for file in beside}
    removed = [words[-1] for words, *_ in calls if words[0] == "rm"]
    assert removed == ["container-a", "container-b"]
    assert not os.path.exists(plain)


def test_without_docker_the_remedy_is_named(tmp_path: Path) -> None:
    done, calls = run(tmp_path, docker=False)
    assert done.returncode == 2
    assert done.stderr == (
        "conformance.sh: The real server runs in docker. Received: no docker on PATH. "
        "Install it, or run make test.\n"
    )
    assert calls == []
