"""The front door: its help, its errors, and that it opens where nothing else is installed."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from keras_mrl_cli import serve
from keras_mrl_cli.__main__ import main, parser

NOT_INSTALLED = ("keras", "tensorflow", "jax", "torch", "grpc", "numpy", "sklearn", "matplotlib")
ROOMS = ("keras_mrl", "keras_mrl_export", "keras_mrl_serving")
COMMANDS = ["demo", "compare", "export", "serve", "deploy"]
COMMANDS += ["classify", "embed", "index", "search", "inspect"]
PARTS = ["build", "show"]  # of index
WITH_FLAGS = [[command] for command in COMMANDS if command != "index"]
WITH_FLAGS += [["index", part] for part in PARTS]
SCRIPT = Path(sys.executable).with_name("keras-mrl")

BLOCKER = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in json.loads(os.environ["BLOCKED"]):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def run(
    folder: Path, command: list[str], blocked: tuple[str, ...] = (), **environment: str
) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command in a process where some packages do not import."""
    (folder / "sitecustomize.py").write_text(BLOCKER)
    done = subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "BLOCKED": json.dumps(blocked),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


DOORS = pytest.mark.parametrize(
    "door", [[str(SCRIPT)], [sys.executable, "-m", "keras_mrl_cli"]], ids=["script", "module"]
)


@DOORS
def test_help_needs_nothing_installed_and_lists_the_commands(
    tmp_path: Path, door: list[str]
) -> None:
    status, out, err = run(tmp_path, [*door, "--help"], NOT_INSTALLED + ROOMS)
    assert (status, err) == (0, "")
    assert out.startswith("usage: keras-mrl [-h] [--version] COMMAND ...\n")
    listed = re.findall(r"^    (\w+)", out, re.MULTILINE)  # a wrapped line begins further right
    assert listed == COMMANDS


@DOORS
@pytest.mark.parametrize("command", [*WITH_FLAGS, ["index"]], ids=" ".join)
def test_the_help_of_a_command_needs_nothing_installed(
    tmp_path: Path, door: list[str], command: list[str]
) -> None:
    status, out, err = run(tmp_path, [*door, *command, "--help"], NOT_INSTALLED + ROOMS)
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: keras-mrl {' '.join(command)} [-h]")


def test_a_command_of_commands_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["index", "--help"])
    assert re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE) == PARTS


def test_the_blocker_blocks(tmp_path: Path) -> None:
    _, _, err = run(tmp_path, [sys.executable, "-c", "import numpy"], NOT_INSTALLED)
    assert err.splitlines()[-1] == "ImportError: numpy is blocked"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"keras-mrl {version('keras-mrl')}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "keras-mrl: error: the following arguments are required: COMMAND"),
        (
            ["fly"],
            "keras-mrl: error: argument COMMAND: invalid choice: 'fly' "
            "(choose from 'demo', 'compare', 'export', 'serve', 'deploy', 'classify', 'embed', "
            "'index', 'search', 'inspect')",
        ),
        (["index"], "keras-mrl index: error: the following arguments are required: COMMAND"),
        (
            ["index", "drop"],
            "keras-mrl index: error: argument COMMAND: invalid choice: 'drop' "
            "(choose from 'build', 'show')",
        ),
        (
            ["inspect"],
            "keras-mrl inspect: error: the following arguments are required: WHAT",
        ),
        (
            ["serve", "--model_base_path", "x", "--port", "http"],
            "keras-mrl serve: error: argument --port: invalid int value: 'http'",
        ),
        (
            ["demo", "--backend", "openvino"],
            "keras-mrl demo: error: argument --backend: invalid choice: 'openvino' "
            "(choose from 'tensorflow', 'jax', 'torch')",
        ),
    ],
)
def test_commands_and_flags_that_do_not_fit(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == text


def refusal(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that cannot go on."""
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("keras-mrl: ")
    return printed.err.removeprefix("keras-mrl: ").removesuffix("\n")


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The commands set variables for the process they usually have to themselves."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("PATH", str(tmp_path))  # no tensorflow_model_server
    return tmp_path


@pytest.mark.usefixtures("clean_environment")
def test_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    rule = "Only known flags are taken. "
    assert refusal(["demo", "--epoch", "3"], 2, capsys) == (
        rule + "Received: --epoch 3. See the command's --help for those there are."
    )
    arguments = ["serve", "--model_base_path=x", "--model_nam", "y"]
    assert refusal(arguments, 2, capsys) == (
        rule + "Received: --model_nam y. See the command's --help for those there are. "
        "tensorflow_model_server may know more."
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--epochs", "0"], "--epochs must be at least 1. Received: 0. Try 10."),
        (["--seed=-1"], "--seed must lie in 0..4294967295. Received: -1. Leave it out for 0."),
        (
            ["--seed", "4294967296"],
            "--seed must lie in 0..4294967295. Received: 4294967296. Leave it out for 0.",
        ),
    ],
)
def test_values_the_demo_cannot_use(
    arguments: list[str], text: str, clean_environment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(["demo", "--out", str(clean_environment / "o"), *arguments], 2, capsys) == text
    assert os.listdir(clean_environment) == []


def test_a_backend_of_the_environment_is_checked_too(
    clean_environment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "openvino")
    assert refusal(["demo", "--out", str(clean_environment / "o")], 2, capsys) == (
        "KERAS_BACKEND must be one of tensorflow, jax, torch for the demo. "
        "Received: openvino. Give --backend."
    )


def test_out_must_be_a_folder(clean_environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = clean_environment / "file"
    file.write_text("mine")
    for out, why in ((file, "File exists"), (file / "below", "Not a directory")):
        assert refusal(["demo", "--out", str(out)], 1, capsys) == (
            f"--out must be a folder that can be written. Received: {out} ({why}). Name another."
        )
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "blocked", "text"),
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
            ["serve", "--model_base_path", "models"],
            "tensorflow",
            "The development server runs SavedModels with TensorFlow. "
            "Received: tensorflow is blocked. Install it: pip install 'keras-mrl[server]'.",
        ),
    ],
)
def test_what_is_not_installed_is_named(
    tmp_path: Path, command: list[str], blocked: str, text: str
) -> None:
    door = [sys.executable, "-m", "keras_mrl_cli"]
    status, _, err = run(tmp_path, [*door, *command], (blocked,), PATH=str(tmp_path))
    assert status == 1
    assert err.splitlines()[-1] == f"keras-mrl: {text}"
    assert "Traceback" not in err


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "run", interrupted)
    assert refusal(["serve", "--model_base_path", "x"], 130, capsys) == "interrupted"


def test_every_flag_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in WITH_FLAGS:
        with pytest.raises(SystemExit):
            parser().parse_args([*command, "--help"])
        lines = capsys.readouterr().out.split("options:\n")[1].splitlines()
        flags = [line for line in lines if line.startswith("  --")]
        assert flags
        for flag, after in zip(lines, [*lines[1:], ""], strict=True):
            if flag in flags:
                assert "  " in flag.strip() or after.startswith("          "), flag
