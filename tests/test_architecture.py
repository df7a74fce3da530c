"""Who may import whom: docs/design.md as a test, by reading every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "keras_mrl": ROOT / "keras_mrl",
    "keras_mrl_export": ROOT / "export" / "keras_mrl_export",
    "keras_mrl_serving": ROOT / "serving" / "keras_mrl_serving",
    "keras_mrl_cli": ROOT / "cli" / "keras_mrl_cli",
}
# The floors of the serving room, lowest first: a module imports its own floor and those below.
FLOORS = (
    {
        "calls",
        "contract",
        "cascade",
        "cascade_certify",
        "cascade_cuts",
        "cascade_fill",
        "cascade_report",
        "cascade_search",
        "confidence",
        "drift",
        "embeddings",
        "errors",
        "flows",
        "funnel",
        "guarantee",
        "inputs",
        "manifest_json",
        "options",
        "oracle",
        "quality",
        "results",
        "retrieval",
        "temperatures",
        "thresholds",
        "version",
        "version_folders",
    },
    {
        "index",
        "_failures",
        "questions",
        "rounds",
        "knowledge",
        "conversation",
        "testing",
        "corpus",
        "embedding_file",
    },
    {
        "_tensors",
        "_messages",
        "_channel",
        "_status",
        "_rpc",
        "_rpc_aio",
        "_wire_pb2",
        "saved_model",
    },
    {"client", "aio"},
    {"_session"},
    {"server"},
)
NUMPY_FLOOR = {f"keras_mrl_serving.{name}" for name in FLOORS[0]}
TENSORFLOW = {"tensorflow", "tensorflow_serving"}
LAZY_IN_TRAIN = {"sklearn", "matplotlib", "faiss", "tensorboard"}


def modules() -> list[Path]:
    return sorted(file for room in ROOMS.values() for file in room.rglob("*.py"))


def name_of(file: Path) -> str:
    room = next(folder for folder in ROOMS.values() if file.is_relative_to(folder))
    parts = file.relative_to(room.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, top_level: bool = False) -> Iterator[str]:
    """Full names of what `file` imports; those inside functions only if not `top_level`."""
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        skipped = top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not skipped:
            waiting.extend(ast.iter_child_nodes(node))


def is_of(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(file: Path) -> list[str]:
    room = name_of(file).partition(".")[0]
    return [name for name in imports(file) if not is_allowed(room, file, name)]


def is_allowed(room: str, file: Path, name: str) -> bool:
    top = name.partition(".")[0]
    if top == room or top in sys.stdlib_module_names:
        return True
    if room == "keras_mrl":
        lazy = "evaluation" in file.parts or file.name == "callbacks.py"
        if lazy and top in LAZY_IN_TRAIN:
            return name not in set(imports(file, top_level=True))
        if file.name == "_backend.py" and top in {"tensorflow", "torch"}:
            return name not in set(imports(file, top_level=True))
        return top in {"keras", "numpy"} or is_of(name, NUMPY_FLOOR)
    if room == "keras_mrl_export":
        floor = NUMPY_FLOOR | {"keras_mrl_serving._session", "keras_mrl_serving.index.ExactIndex"}
        return top in {"keras", "keras_mrl", "numpy", "cloudpickle", *TENSORFLOW} or is_of(
            name, floor
        )
    if room == "keras_mrl_serving":
        if top in TENSORFLOW:
            return file.name == "_session.py" or "server" in file.parts
        if top == "grpc_health":
            return "server" in file.parts
        if top in {"faiss", "qdrant_client"}:
            return file.parent.name == "index"
        return top in {"numpy", "grpc", "google"}
    return top in {*ROOMS, "keras", "numpy", "sklearn", "PIL"}


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_a_module_imports_only_what_its_room_may(file: Path) -> None:
    assert violations(file) == []


def floor_of(name: str) -> int:
    part = name.split(".")[1]
    return next(height for height, names in enumerate(FLOORS) if part in names)


@pytest.mark.parametrize(
    "file",
    [f for f in modules() if "keras_mrl_serving" in f.parts and name_of(f).count(".")],
    ids=name_of,
)
def test_a_serving_module_imports_no_floor_above_its_own(file: Path) -> None:
    own = floor_of(name_of(file))
    serving = {n for n in imports(file) if n.startswith("keras_mrl_serving.")}
    names = {n.replace("keras_mrl_serving._wire_pb2.", "") for n in serving}
    above = [n for n in names if n.count(".") and floor_of(n) > own]
    assert above == []


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in modules()
        if file.parent.name == "keras_mrl_cli"
        or (file.name == "__init__.py" and "keras_mrl_cli" in file.parts)
    ],
    ids=name_of,
)
def test_a_command_imports_no_room_at_module_level(file: Path) -> None:
    others = set(ROOMS) - {"keras_mrl_cli"}
    assert [name for name in imports(file, top_level=True) if is_of(name, others)] == []


def test_nobody_imports_the_command_line() -> None:
    importers = [
        name_of(file)
        for file in modules()
        if "keras_mrl_cli" not in file.parts
        and any(is_of(n, {"keras_mrl_cli"}) for n in imports(file))
    ]
    assert importers == []


@pytest.mark.parametrize("folder", ["export", "serving", "cli"])
def test_the_outer_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "module", ["keras_mrl_serving", "keras_mrl_serving.client", "keras_mrl_cli.__main__"]
)
def test_the_client_and_the_command_line_need_no_framework(module: str) -> None:
    blocked = "('tensorflow', 'keras', 'jax', 'torch', 'keras_mrl')"
    done = run(f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {module}")
    assert done.returncode == 0, done.stderr


def test_without_keras_the_training_room_says_how_to_get_it() -> None:
    done = run("import sys; sys.modules['keras'] = None; import keras_mrl")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: keras_mrl needs Keras and one of its backends. "
        "Received: import of keras halted; None in sys.modules. "
        "Install one: pip install 'keras-mrl[tensorflow]' (or [jax], [torch]). "
        "The client alone, keras_mrl_serving, needs none."
    )


def test_modules_stay_small() -> None:
    long = {name_of(f): n for f in modules() if (n := len(f.read_text().splitlines())) > 300}
    assert long == {}
