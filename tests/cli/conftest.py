"""What the tests of the command line share: one exported model, one server of small models."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.cli import Call, Ended, Exported, embeddings, export_tiny_model
from tests.helpers.input_models import SPECS, save


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a command is called in: an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A classifier with a layer of the user's own, exported by the command itself."""
    return export_tiny_model(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def input_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small models, each under its name."""
    folder = tmp_path_factory.mktemp("input_models")
    for name in SPECS:
        save(name, folder / name / "1")
    return folder


@pytest.fixture(scope="session")
def target(input_models: Path) -> Iterator[str]:
    """A development server of the small models."""
    from keras_mrl_serving.server import DevServer

    config = input_models / "models.config"
    models = "".join(
        f'config {{ name: "{name}" base_path: "{input_models / name}" '
        'model_platform: "tensorflow" }\n'
        for name in SPECS
    )
    config.write_text(f"model_config_list {{ {models} }}")
    with DevServer(model_config_file=str(config), file_system_poll_wait_seconds=0) as target:
        yield target


Ask = Callable[..., Ended]


@pytest.fixture
def ask(call: Call, target: str, folder: Path) -> Ask:
    """Call a command about a small model, in an empty folder."""
    del folder
    return lambda command, model, *words: call(
        command, "--target", target, "--model", model, *words
    )


@pytest.fixture
def run(call: Call, folder: Path) -> Call:
    """Call `index` in a folder that holds a gallery."""
    del folder
    np.save("E.npy", embeddings())
    return call.of("index")
