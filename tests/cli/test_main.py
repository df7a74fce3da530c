"""The front door: its help, its errors, and that it opens where nothing else is installed."""

import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from keras_mrl_cli import serve
from keras_mrl_cli.__main__ import COMMANDS
from keras_mrl_cli.shared import command
from tests.helpers.cli import FRAMEWORKS, KERAS_MRL, Call, run_without

ROOMS = ("keras_mrl", "keras_mrl_export", "keras_mrl_serving")
LIBRARIES = (*FRAMEWORKS, "sklearn", "matplotlib", "faiss", "qdrant_client", "PIL", "cloudpickle")
PARTS = {"build", "show"}  # of index
PATHS = [[name] for name in COMMANDS] + [["index", part] for part in sorted(PARTS)]
SCRIPT = Path(sys.executable).with_name("keras-mrl")


@pytest.mark.parametrize("door", [[str(SCRIPT)], KERAS_MRL], ids=["script", "module"])
def test_help_needs_nothing_installed_and_lists_the_commands(
    tmp_path: Path, door: list[str]
) -> None:
    blocked = (*LIBRARIES, *ROOMS, "numpy", "grpc")
    status, out, err = run_without(blocked, tmp_path, *door, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("Usage: keras-mrl [OPTIONS] COMMAND ...\n")
    listed = re.findall(r"^  (\w+) +(.+)$", out.partition("Commands:\n")[2], re.MULTILINE)
    assert dict(listed) == COMMANDS


HELP = """
import sys
from keras_mrl_cli.__main__ import main
for path in sys.argv[1:]:
    assert main([*path.split(), "--help"]) == 0
"""


def test_the_help_of_every_command_needs_no_framework(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HELP, *map(" ".join, PATHS)]
    status, out, err = run_without(LIBRARIES, tmp_path, *words)
    assert (status, err) == (0, "")
    usages = [line for line in out.splitlines() if line.startswith("Usage: ")]
    assert len(usages) == len(PATHS)


def test_a_module_of_a_command_is_imported_when_it_is_called(tmp_path: Path) -> None:
    program = "import sys, keras_mrl_cli.__main__ as door\n"
    program += "door.main(['deploy', '--help']); print(*sys.modules)"
    status, out, err = run_without((), tmp_path, sys.executable, "-c", program)
    assert (status, err) == (0, "")
    modules = {name for name in out.splitlines()[-1].split() if name.startswith("keras_mrl")}
    assert modules == {
        "keras_mrl_cli",
        *(f"keras_mrl_cli.{name}" for name in ("__main__", "shared", "deploy", "output")),
    }


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_teaches(path: list[str], call: Call) -> None:
    status, out, err = call(*path, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: keras-mrl {' '.join(path)} ")
    assert max(map(len, out.splitlines())) <= 80
    assert f"\n    keras-mrl {' '.join(path)}" in out  # an example
    assert call(*path, "-h").out == out
    if len(path) == 1:
        assert f"\n  {COMMANDS[path[0]]}\n" in out  # the line that `keras-mrl --help` shows
    lines = out.partition("\nOptions:\n")[2].splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  --"):  # a flag, with its help beside or beneath it
            assert "  " in line.strip() or after.startswith("          "), line


def test_a_command_of_commands_lists_them(call: Call) -> None:
    out = call("index", "--help").out.partition("Commands:\n")[2]
    assert set(re.findall(r"^  (\w+)", out, re.MULTILINE)) == PARTS


def test_the_blocker_blocks(tmp_path: Path) -> None:
    ended = run_without(("numpy",), tmp_path, sys.executable, "-c", "import numpy")
    assert ended.err.splitlines()[-1] == "ImportError: numpy is blocked"


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"keras-mrl {version('keras-mrl')}\n", "")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "Missing command. Try 'keras-mrl --help'."),
        ("fly", "No such command 'fly'. Try 'keras-mrl --help'."),
        ("index", "Missing command. Try 'keras-mrl index --help'."),
        ("index drop", "No such command 'drop'. Try 'keras-mrl index --help'."),
        ("deploy", "Missing argument 'OUT_DIR'. Try 'keras-mrl deploy --help'."),
        ("deploy out", "Missing option '--base-path'. Try 'keras-mrl deploy --help'."),
        (
            "export m.keras --base-path",
            "Option '--base-path' requires an argument. Try 'keras-mrl export --help'.",
        ),
        (
            "serve --model_base_path x --port http",
            "Invalid value for '--port': 'http' is not a valid integer. "
            "Try 'keras-mrl serve --help'.",
        ),
        (
            "demo --backend openvino",
            "Invalid value for '--backend': 'openvino' is not one of 'tensorflow', 'jax', "
            "'torch'. Try 'keras-mrl demo --help'.",
        ),
        (
            "demo --epoch 3",
            "No such option '--epoch'. Did you mean '--epochs'? Try 'keras-mrl demo --help'.",
        ),
        ("demo --json=yes", "Option '--json' does not take a value. Try 'keras-mrl demo --help'."),
        ("demo it", "Got unexpected extra argument (it). Try 'keras-mrl demo --help'."),
    ],
)
def test_words_that_do_not_fit(words: str, text: str, call: Call) -> None:
    assert call.refused(*words.split(), status=2) == text


@pytest.mark.parametrize(
    ("words", "blocked", "text"),
    [
        (
            ["demo", "--backend", "jax", "--out", "out"],
            "sklearn",
            "The demo trains, exports, serves and draws. Received: sklearn is blocked. "
            "Install what it needs: pip install 'keras-mrl[jax,export,server,evaluate]'.",
        ),
        (
            ["export", "model.keras", "--base-path", "models"],
            "cloudpickle",
            "An export loads the model with Keras and writes it with TensorFlow. Received: "
            "cloudpickle is blocked. Install what it needs: pip install 'keras-mrl[export]'.",
        ),
        (
            ["serve", "--model_config_file", "models.config"],
            "tensorflow",
            "The development server runs SavedModels with TensorFlow. "
            "Received: tensorflow is blocked. "
            "Install what it needs: pip install 'keras-mrl[server]'.",
        ),
        (
            ["compare", "--data", "birds"],
            "matplotlib",
            "A comparison trains with Keras, probes with scikit-learn and draws with matplotlib. "
            "Received: matplotlib is blocked. "
            "Install what it needs: pip install 'keras-mrl[tensorflow,compare,images]'.",
        ),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, words: list[str], blocked: str, text: str
) -> None:
    status, _, err = run_without((blocked,), tmp_path, *KERAS_MRL, *words, PATH=str(tmp_path))
    assert status == 1
    assert err.splitlines()[-1] == f"keras-mrl: {text}"
    assert "Traceback" not in err


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    @command("Serve nothing.")
    def interrupted(_: SimpleNamespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "serve", interrupted)
    assert call.refused("serve", status=130) == "interrupted"
