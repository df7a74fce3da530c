"""The package costs nothing until it is used, and its NumPy floor needs nothing but NumPy."""

import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

import keras_mrl_serving
from keras_mrl_serving import embeddings

NUMPY_FLOOR = [
    *("contract", "cascade", "embeddings", "errors", "flows", "funnel", "index", "inputs"),
    *("options", "results", "version"),
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
    said = run(program, ("tensorflow", "keras", "jax", "torch"))
    assert said == "Client('localhost:1', model='default')"


def test_the_package_alone_imports_neither_numpy_nor_grpc() -> None:
    assert run("import keras_mrl_serving", ("numpy", "grpc", "google")) == ""


def test_every_name_is_the_one_of_its_home() -> None:
    for home, names in keras_mrl_serving._HOMES.items():
        module = import_module(f"keras_mrl_serving.{home}")
        for name in names:
            assert getattr(keras_mrl_serving, name) is getattr(module, name)
            assert not isinstance(getattr(keras_mrl_serving, name), ModuleType)
    assert len(set(keras_mrl_serving.__all__)) == len(keras_mrl_serving.__all__)
    assert dir(keras_mrl_serving) == sorted(keras_mrl_serving.__all__)


def test_no_public_name_is_a_module_s() -> None:
    """Importing a submodule would put it where the name is."""
    assert not set(keras_mrl_serving.__all__) & {*NUMPY_FLOOR, "client", "server"}


@pytest.mark.parametrize("before", [*NUMPY_FLOOR, "client", "_transport", "_wire"])
def test_truncate_is_a_function_whatever_was_imported_before(before: str) -> None:
    kept = dict(vars(keras_mrl_serving))
    try:
        vars(keras_mrl_serving).pop("truncate", None)
        import_module(f"keras_mrl_serving.{before}")
        from keras_mrl_serving import truncate

        assert truncate is embeddings.truncate
    finally:
        vars(keras_mrl_serving).update(kept)


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError) as caught:
        keras_mrl_serving.Clients  # noqa: B018, reading it is the test
    assert str(caught.value) == "module 'keras_mrl_serving' has no attribute 'Clients'"


@pytest.mark.parametrize("module", ["keras_mrl_serving", "keras_mrl_serving.index"])
def test_importing_takes_no_time(module: str) -> None:
    clock = "time.perf_counter()"
    program = f"import time\nstart = {clock}\nimport {module}\nprint({clock} - start)"
    assert min(float(run(program)) for _ in range(3)) <= 0.3
