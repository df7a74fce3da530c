"""What the suite holds itself to: no test leans on another, on a private name, or on the clock."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
ROOMS = ("keras_mrl", "keras_mrl_cli", "keras_mrl_export", "keras_mrl_serving")
PRIVATE = re.compile(r"(^|\.)_[^_.]\w*$")
# Modules that are private to the application, not to the room.
MODULES = {
    *("_arrays", "_dims", "_masks", "_session", "_torch"),
    *("_connection", "_targets", "_transport", "_wire", "_wire_pb2"),
}
NOT_OURS = {"_PRINTED_WARNING"}  # TensorFlow's, which logs each of its warnings once
CLOCK = re.compile(
    r"assert .*(monotonic|perf_counter|process_time|time\(\)).*[<>]"
    r"|assert .*\b(elapsed|seconds|took|duration)\b.* <"
)


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """Module and name of every `from module import name`."""
    for node in nodes(file):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def patched(file: Path) -> Iterator[str]:
    """The names that `monkeypatch.setattr` and `delattr` replace."""
    for node in nodes(file):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".setattr", ".delattr")):
            strings = (a.value for a in node.args[:2] if isinstance(a, ast.Constant))
            yield from (value for value in strings if isinstance(value, str))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_a_test_leans_on_nothing_it_does_not_own(file: Path) -> None:
    names = list(imported(file))
    tests = [f"{m}.{n}" for m, n in names if re.search(r"\btests\b.*\btest_", f"{m}.{n}")]
    assert tests == []
    ours = [(m, n) for m, n in names if m.partition(".")[0] in ROOMS]
    assert [f"{m}.{n}" for m, n in ours if PRIVATE.search(n) and n not in MODULES] == []
    assert [n for n in patched(file) if PRIVATE.search(n) and n not in NOT_OURS] == []
    if file.name != Path(__file__).name:
        # A wait that gives up at last raises: `helpers/waiting.py`.
        assert [line for line in file.read_text().splitlines() if CLOCK.search(line)] == []
