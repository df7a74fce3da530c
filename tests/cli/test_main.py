"""The front door opens where nothing but the client is installed."""

import subprocess
import sys

import pytest

from keras_mrl_cli.__main__ import main

BLOCKED = ("tensorflow", "keras", "jax", "torch", "grpc", "numpy", "keras_mrl", "keras_mrl_export")


def run_blocked(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys\n"
        f"for name in {BLOCKED}: sys.modules[name] = None\n"
        "from keras_mrl_cli.__main__ import main\n"
        f"sys.exit(main({list(arguments)}))\n"
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_lists_every_command_without_any_framework() -> None:
    done = run_blocked("--help")
    assert done.returncode == 0, done.stderr
    assert "demo " in done.stdout
    assert "serve " in done.stdout


@pytest.mark.parametrize("command", ["demo", "serve"])
def test_a_command_explains_itself_without_any_framework(command: str) -> None:
    done = run_blocked(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: keras-mrl {command}" in done.stdout


def test_the_installed_command_is_this_one() -> None:
    command = [sys.executable, "-m", "keras_mrl_cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "keras-mrl 0.1.0\n"


def test_a_demo_without_its_extras_says_what_to_install() -> None:
    done = run_blocked("demo", "--out", "/dev/null/nowhere")
    assert done.returncode == 1
    assert done.stderr == (
        "keras-mrl: --out must be a folder that can be written. Received: /dev/null/nowhere "
        "(Not a directory). Name another.\n"
    )


def test_a_server_without_its_extra_says_what_to_install() -> None:
    done = run_blocked("serve", "--dev", "--model_base_path", "models")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "keras-mrl: The development server runs SavedModels with TensorFlow. Received: "
    )
    assert done.stderr.endswith("Install it: pip install 'keras-mrl[server]'.\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["demo", "--quick"],
            "keras-mrl: Only known flags are taken. Received: --quick. "
            "See the command's --help for those there are.\n",
        ),
        (
            ["demo", "--epochs", "0"],
            "keras-mrl: --epochs must be at least 1. Received: 0. Try 10.\n",
        ),
        (
            ["serve", "--dev", "--model_base_path", "m", "--enable_batching"],
            "keras-mrl: Only known flags are taken. Received: --enable_batching. See the "
            "command's --help for those there are. tensorflow_model_server may know more.\n",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == sentence
