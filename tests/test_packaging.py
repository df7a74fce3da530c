"""What is shipped: one distribution, four import packages, four dependencies."""

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from keras_mrl_cli.deploy import FILES

ROOT = Path(__file__).parents[1]
PACKAGES = {"keras_mrl", "keras_mrl_cli", "keras_mrl_export", "keras_mrl_serving"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # Of the tracked files alone, so that what is built is what a clone would build.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        file = ROOT / name
        if name and file.is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


def test_every_package_says_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_every_module_is_shipped(wheel: zipfile.ZipFile) -> None:
    rooms = [ROOT / "keras_mrl", *(p for p in ROOT.glob("*/keras_mrl*") if p.is_dir())]
    modules = {
        str(file.relative_to(room.parent))
        for room in rooms
        for file in room.rglob("*.py")
        if room.name in PACKAGES and room.parent.name != "tests"
    }
    assert modules
    assert modules <= set(wheel.namelist())
    others = {"keras_mrl_serving/_wire.proto", "keras_mrl_serving/manifest.schema.json"}
    others |= {f"keras_mrl_serving/deploy/{name}" for name in FILES}
    assert others <= set(wheel.namelist())


def test_the_base_needs_what_the_client_and_the_command_line_need(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    base = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(base) == ["click>=8.5", "grpcio>=1.75", "numpy>=2.0", "protobuf>=6.31.1"]


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]


def test_every_requirement_is_pinned_in_the_constraints() -> None:
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {
        requirement.partition(">=")[0].partition("[")[0].lower()
        for group in groups
        for requirement in group
    }
    assert names - {"keras-mrl"} <= pinned
