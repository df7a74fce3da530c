"""The package costs nothing until it is used, and its NumPy floor needs nothing but NumPy."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import keras_mrl_serving
from keras_mrl_serving import embeddings

NUMPY_FLOOR = [
    *("calls", "cascade", "contract", "embeddings", "errors", "flows", "funnel", "index"),
    *("inputs", "options", "results", "version"),
]
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Blocked())
"""


def run(program: str, blocked: tuple[str, ...] = ()) -> str:
    program = f"BLOCKED = {blocked!r}\n{BLOCK}\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_numpy_floor_works_where_only_numpy_is() -> None:
    frameworks = ("tensorflow", "keras", "jax", "torch", "grpc", "google")
    program = f"""
import numpy as np
import keras_mrl_serving as serve
from importlib import import_module

for module in {NUMPY_FLOOR}:
    import_module(f"keras_mrl_serving.{{module}}")
gallery = serve.truncate(np.eye(6) + 0.1, 4)
index = serve.ExactIndex.build(gallery, serve.FunnelSchedule((2, 4), (6,), 1))
assert index.search(gallery[:4]).ids.tolist() == [[0], [1], [2], [3]]
policy = serve.CascadePolicy.learn(np.eye(3)[[[0, 1], [2, 2]]] * 4, [1, 2], (2, 4))
manifest = serve.Manifest(name="m", kind="classifier", fingerprint="f", dims=(2, 4), width=4,
                          inputs={{}}, made_with={{}}, cascade=policy.to_json())
assert serve.CascadePolicy.from_json(manifest.cascade) == policy
assert serve.Manifest.from_json(manifest.to_json()) == manifest
assert serve.Options().timeout_s == 10
assert serve.__version__
try:
    manifest.check_dim(3)
except serve.UnknownDimError:
    print("refused")
assert not set(sys.modules) & set(BLOCKED)
"""
    assert run(program, frameworks) == "refused"


def test_the_client_works_where_no_framework_is() -> None:
    program = "from keras_mrl_serving import Client\nprint(Client('localhost:1'))"
    output = run(program, ("tensorflow", "keras", "jax", "torch"))
    assert output == "Client('localhost:1', model='default')"


@pytest.mark.parametrize(
    ("module", "own", "third_party"),
    [
        ("keras_mrl_serving", 1, set()),
        # Its parents: calls, errors, integers, manifest_schema, untrusted.
        ("keras_mrl_serving.contract", 7, {"numpy"}),
        ("keras_mrl_serving.index", None, {"numpy"}),
    ],
)
def test_importing_a_module_imports_little(
    module: str, own: int | None, third_party: set[str]
) -> None:
    program = f"""
import json, sys
before = set(sys.modules)
import {module}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    imported = json.loads(run(program))
    ours = [name for name in imported if name.partition(".")[0] == "keras_mrl_serving"]
    assert own is None or len(ours) == own, ours
    others = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert {name for name in others if not name.startswith("_")} - {"keras_mrl_serving"} == (
        third_party
    )


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    tree = ast.parse(Path(keras_mrl_serving.__file__).read_text())
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)
    )
    seen = {
        alias.name: f"keras_mrl_serving.{node.module}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name and node.level == 1
    }
    assert len(seen) == len(block.body)
    assert list(seen) == list(keras_mrl_serving.__all__)
    for name, module in seen.items():
        value = getattr(keras_mrl_serving, name)
        assert value is getattr(import_module(module), name)
        assert not isinstance(value, ModuleType)
    assert dir(keras_mrl_serving) == sorted(seen)


def test_no_public_name_is_a_module_s() -> None:
    """Importing a submodule would put it where the name is."""
    assert not set(keras_mrl_serving.__all__) & {*NUMPY_FLOOR, "client", "server"}


@pytest.mark.parametrize("before", [*NUMPY_FLOOR, "client", "_transport", "_wire"])
def test_truncate_is_a_function_whatever_was_imported_before(before: str) -> None:
    names = dict(vars(keras_mrl_serving))
    try:
        vars(keras_mrl_serving).pop("truncate", None)
        import_module(f"keras_mrl_serving.{before}")
        from keras_mrl_serving import truncate

        assert truncate is embeddings.truncate
    finally:
        vars(keras_mrl_serving).update(names)


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError) as caught:
        keras_mrl_serving.Clients  # noqa: B018, reading it is the test
    assert str(caught.value) == "module 'keras_mrl_serving' has no attribute 'Clients'"
