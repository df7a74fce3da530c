"""Who may import whom: docs/design.md as a test, by reading every file."""

import ast
import graphlib
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
TENSORFLOW = {"tensorflow", "tensorflow_serving", "tensorflow_text"}
LAZY_IN_TRAIN = {"sklearn", "matplotlib", "faiss", "tensorboard", "PIL"}


def modules() -> list[Path]:
    return sorted(file for room in ROOMS.values() for file in room.rglob("*.py"))


def name_of(file: Path) -> str:
    room = next(folder for folder in ROOMS.values() if file.is_relative_to(folder))
    parts = file.relative_to(room.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, top_level: bool = False) -> Iterator[str]:
    """Full names of what `file` imports; only those that importing it runs if `top_level`."""
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
        skipped = top_level and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        )
        if not skipped:
            waiting.extend(ast.iter_child_nodes(node))


def is_of(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


FILE_OF = {name_of(file): file for file in modules()}
# Which module each name that `keras_mrl_serving` hands out comes from.
HOME_OF = {
    n.rpartition(".")[2]: n.rpartition(".")[0] for n in imports(FILE_OF["keras_mrl_serving"])
}


def module_of(name: str) -> str:
    """The module of the four rooms that an imported name lies in."""
    if name in FILE_OF:
        return name
    package, _, last = name.rpartition(".")
    return HOME_OF[last] if package == "keras_mrl_serving" else package


def needs(name: str) -> set[str]:
    """The packages that a module and all it imports at module level need."""
    found: set[str] = set()
    waiting, seen = [name], {name}
    while waiting:
        file = FILE_OF[waiting.pop()]
        for imported in imports(file, top_level=True):
            module = module_of(imported)
            if module in FILE_OF and module not in seen and module.count("."):
                seen.add(module)
                waiting.append(module)
            found.add(imported.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"keras_mrl_serving"}


def serving_needs(name: str) -> set[str]:
    """The packages that a name of the serving room needs; all there are for one of another room."""
    return needs(module_of(name)) if is_of(name, {"keras_mrl_serving"}) else {name}


def violations(file: Path) -> list[str]:
    room = name_of(file).partition(".")[0]
    return [name for name in imports(file) if not is_allowed(room, file, name)]


def is_allowed(room: str, file: Path, name: str) -> bool:
    top = name.partition(".")[0]
    if top == room or top in sys.stdlib_module_names:
        return True
    if room == "keras_mrl":
        lazy = (
            not {"evaluation", "comparison"}.isdisjoint(file.parts) or file.name == "callbacks.py"
        )
        if lazy and top in LAZY_IN_TRAIN:
            return name not in set(imports(file, top_level=True))
        # PyTorch computes in place, TensorFlow's strategies count their replicas, and keras-hub's
        # tokenizers are graphs of TensorFlow.
        if (file.name, top) in {
            ("_torch.py", "torch"),
            ("rowwise.py", "tensorflow"),
            ("_tokens.py", "tensorflow"),
            ("text.py", "keras_hub"),
        }:
            return name not in set(imports(file, top_level=True))
        return top in {"keras", "numpy"} or serving_needs(name) <= {"numpy"}
    if room == "keras_mrl_export":
        if (file.name, top) == ("wordpiece.py", "keras_hub"):  # whose tokenizers it copies
            return name not in set(imports(file, top_level=True))
        return (
            top in {"keras", "keras_mrl", "numpy", "google", "cloudpickle", *TENSORFLOW}
            or is_of(name, {"keras_mrl_serving._session"})
            or serving_needs(name) <= {"numpy", "grpc", "google"}
        )
    if room == "keras_mrl_serving":
        if top in TENSORFLOW:
            return file.name == "_session.py" or "server" in file.parts
        if top in ("grpc_health", "h11"):
            return "server" in file.parts
        if top in {"faiss", "qdrant_client", "qdrant_edge"}:
            return file.parent.name == "index"
        if top == "PIL":
            return file.name == "images.py"
        if top == "opentelemetry":
            return file.name == "observer.py" and name not in set(imports(file, top_level=True))
        return top in {"numpy", "grpc", "google"}
    return top in {*ROOMS, "click", "keras", "numpy", "sklearn", "PIL"}


@pytest.mark.parametrize("file", modules(), ids=name_of)
def test_a_module_imports_only_what_its_room_may(file: Path) -> None:
    assert violations(file) == []


def in_house(file: Path) -> set[str]:
    """The modules of the four rooms that `file` imports, wherever in the file."""
    own = (n for n in imports(file) if is_of(n, set(ROOMS)))
    return {module_of(n) for n in own} & set(FILE_OF) - {name_of(file)}


def test_no_circle_of_imports() -> None:
    graph = {name: in_house(file) for name, file in FILE_OF.items()}
    for name, others in graph.items():  # a package's __init__ hands out names of its own modules
        if FILE_OF[name].name == "__init__.py":
            graph[name] = {n for n in others if not n.startswith(f"{name}.")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


# Which folders of the serving room a folder may import, besides itself; "" is the room's own files.
MAY_IMPORT = {
    "cascade": {""},
    "index": {"", "cascade"},
    "server": {"", "cascade", "index"},
    "": {"cascade", "index"},
}


def folder_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


@pytest.mark.parametrize(
    "file", [f for f in modules() if "keras_mrl_serving" in f.parts], ids=name_of
)
def test_a_serving_folder_imports_none_above_it(file: Path) -> None:
    own = folder_of(name_of(file))
    serving = {n for n in in_house(file) if n.startswith("keras_mrl_serving")}
    assert {n for n in serving if folder_of(n) not in MAY_IMPORT[own] | {own}} == set()


# A command's module is imported when the command is called. Its help is printed by then, so it may
# import no framework of its own; the modules before it import no room at all.
DOOR = {f"keras_mrl_cli{name}" for name in ("", ".__main__", ".output", ".shared")}
FRAMEWORKS = {"keras", "sklearn", "PIL", "keras_mrl", "keras_mrl_export", *TENSORFLOW}


@pytest.mark.parametrize(
    "file", [file for file in modules() if "keras_mrl_cli" in file.parts], ids=name_of
)
def test_the_command_line_imports_no_framework_at_module_level(file: Path) -> None:
    unwanted = {"keras_mrl_serving.server", *FRAMEWORKS}
    if name_of(file) in DOOR:
        unwanted |= {"keras_mrl_serving", "numpy"}
    top_level = imports(file, top_level=True)
    assert [name for name in top_level if is_of(module_of(name), unwanted)] == []


def test_the_front_door_imports_no_command() -> None:
    for name in DOOR:
        own = {module_of(n) for n in imports(FILE_OF[name], top_level=True)}
        assert {n for n in own if is_of(n, {"keras_mrl_cli"})} <= DOOR


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
