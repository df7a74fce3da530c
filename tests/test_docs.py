"""Every code block of README.md and docs/ runs, in the order a reader meets it.

Python blocks of one document share their names. A shell line that starts a server starts one, which
runs until the document ends; those that ask it run to their end. The pages of `guide` are one
example, and run as one document.
`print(...)  # text` must print that text (`...` stands for any).
"""

import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    "README.md": ["README.md"],
    "compare": ["docs/compare.md"],
    "exits": ["docs/exits.md"],
    "cascade": ["docs/cascade.md"],
    "watch": ["docs/watch.md"],
    "adapt": ["docs/adapt.md"],
    "coming from": ["docs/coming_from.md"],
    "text": ["docs/text.md"],
    "guide": [
        f"docs/{page}.md"
        for page in (
            *("train", "evaluate", "embeddings", "language_models"),
            *("export", "serve", "server", "other_languages", "retrieve"),
        )
    ],
}
ASKED = tuple(
    f"keras-mrl {command} "
    for command in (
        "adapt classify compare deploy embed export index inspect regress search"
    ).split()
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FORMULA = "math"  # no code: GitHub and the site set it
SAID = re.compile(r"^( *)(print\(.*\))  # (.+)$", re.MULTILINE)
PRELUDE = """
import atexit, shlex, shutil, socket, subprocess, sys, time

def start_server(line):
    server = subprocess.Popen([sys.executable, "-m", "keras_mrl_cli", *line.split()[1:]])
    atexit.register(server.wait)
    atexit.register(server.terminate)
    port = int(line.rpartition(" ")[2])
    for _ in range(6000):  # a busy machine; a server that ended is seen at once
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server ended"
        time.sleep(0.1)
    raise TimeoutError(line)

def run_line(line):
    subprocess.run([sys.executable, "-m", "keras_mrl_cli", *shlex.split(line)[1:]], check=True)

def node(text):
    if shutil.which("node"):
        subprocess.run(["node", "--input-type=module", "--eval", text], check=True)

def curl(line):
    if shutil.which("curl"):
        subprocess.run(["curl", "--silent", "--fail", *shlex.split(line)[1:]], check=True)
        print()
"""


def blocks(document: str) -> list[tuple[str, str]]:
    return [
        (match[1], match[2])
        for page in DOCUMENTS[document]
        for match in BLOCK.finditer((ROOT / page).read_text())
        if match[1] != FORMULA
    ]


def test_every_document_with_code_is_run() -> None:
    written = {
        "README.md",
        *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
    }
    with_code = {
        page
        for page in written
        if any(match[1] != FORMULA for match in BLOCK.finditer((ROOT / page).read_text()))
    }
    assert with_code == {page for pages in DOCUMENTS.values() for page in pages}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_code_runs_and_prints_what_it_says(document: str, tmp_path: Path) -> None:
    program = [PRELUDE]
    for language, text in blocks(document):
        if language == "python":
            program.append(SAID.sub(r"\1\2; print('# ' + '''\3''')", text))
            continue
        if language == "js":
            program.append(f"node({text!r})")
            continue
        assert language == "sh"
        for line in text.strip().splitlines():
            if line.startswith("make "):  # the two commands themselves are what runs this test
                subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, check=True)
            elif line.startswith("curl "):
                program.append(f"curl({line!r})")
            elif line.startswith(ASKED):
                program.append(f"run_line({line!r})")
            else:
                assert line.startswith("keras-mrl serve ")
                program.append(f"start_server({line!r})")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    promises = [i for i, line in enumerate(said) if line.startswith("# ")]
    assert promises
    for i in promises:
        pattern = re.sub(r"\[", "[[]", said[i][2:]).replace("...", "*")
        assert fnmatch.fnmatchcase(said[i - 1], pattern), said[max(i - 9, 0) : i + 1]


def test_links_inside_the_documentation_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_extras_named_in_messages_and_docs_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    files = [*ROOT.glob("docs/**/*.md"), ROOT / "README.md", *ROOT.glob("**/keras_mrl*/**/*.py")]
    named = {
        extra.strip()
        for file in files
        if ".venv" not in file.parts
        for group in re.findall(r"keras-mrl\[([a-z, ]+)\]", file.read_text())
        for extra in group.split(",")
    }
    assert named
    assert named <= set(project["optional-dependencies"])


def test_the_map_of_the_files_names_each_once() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    chapters = re.findall(r"^### `(.+?)/`(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    listed = sorted(
        f"{folder}/{name}"
        for folder, table in chapters
        for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
        for name in re.findall(r"`([\w/]+\.py)`", row)
    )
    rooms = ("keras_mrl", "export", "serving", "cli")
    files = (file for room in rooms for file in (ROOT / room).rglob("*.py"))
    assert listed == sorted(
        str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py"
    )
