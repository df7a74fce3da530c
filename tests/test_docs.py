"""Every code block of README.md and docs/ runs, in the order a reader meets it.

Python blocks of one document share their names. A shell line that starts a server starts one, which
runs until the document ends; those that ask it run to their end. The pages of `guide` are one
example, and run as one document.
`print(...)  # text` must print that text (`...` stands for any).
"""

import fnmatch
import functools
import json
import os
import queue
import re
import subprocess
import sys
import threading
import tomllib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


PROBE = """
<!doctype html><body><script>
async function look(page, width) {
  const frame = document.createElement("iframe");
  Object.assign(frame.style, { width: `${width}px`, height: "900px" });
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; frame.src = page; });
  const inside = frame.contentDocument, root = inside.documentElement;
  const asked = frame.contentWindow.performance.getEntriesByType("resource").map((r) => r.name);
  const seen = {
    page, width,
    overflow: root.scrollWidth - root.clientWidth,
    background: frame.contentWindow.getComputedStyle(inside.body).backgroundColor,
    broken: [...inside.images].filter((own) => own.complete && !own.naturalWidth).length,
    formulas: [...inside.querySelectorAll("math")].filter((own) => own.clientHeight > 9).length,
    strangers: asked.filter((name) => new URL(name).origin !== location.origin),
  };
  frame.remove();
  return seen;
}
(async () => {
  const seen = [];
  for (const page of PAGES) for (const width of [1280, 390]) seen.push(await look(page, width));
  await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
})();
</script></body>
"""


@pytest.mark.soak
@pytest.mark.skipif("not os.environ.get('KERAS_MRL_SOAK')", reason="builds the site; a browser")
def test_the_site_is_whole_in_a_browser(tmp_path: Path) -> None:
    """Light and dark, wide and narrow; a missing chromium or mkdocs fails."""
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={site}"]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = [f"/{file.relative_to(site).parent}/" for file in site.rglob("index.html")]
    assert len(pages) == len([*(ROOT / "docs").rglob("*.md")])
    (site / "probe.html").write_text(PROBE.replace("PAGES", json.dumps(pages)))
    reports: queue.Queue[Any] = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    handler = functools.partial(Handler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/probe.html"
        backgrounds = []
        for scheme in (1, 0):  # light, dark
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
            flags += [f"--user-data-dir={tmp_path / str(scheme)}"]
            flags += [f"--blink-settings=preferredColorScheme={scheme}", address]
            browser = subprocess.Popen(["chromium", *flags], stderr=subprocess.DEVNULL)
            try:
                seen = reports.get(timeout=1200)
            finally:
                browser.terminate()
                browser.wait()
            assert len(seen) == 2 * len(pages)
            for own in seen:
                assert own["overflow"] <= 0, own
                assert own["broken"] == 0, own
                assert own["strangers"] == [], own
            assert sum(own["formulas"] for own in seen) > 0
            backgrounds.append({own["background"] for own in seen})
        server.shutdown()
    assert len(backgrounds[0]) == len(backgrounds[1]) == 1
    assert backgrounds[0] != backgrounds[1]


def test_the_lines_to_a_served_answer_are_counted_right() -> None:
    page = (ROOT / "docs" / "coming_from.md").read_text()
    part = page.partition("## Lines to the first served answer")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \|", part, re.MULTILINE)
    # Ours begins where "keras-mrl:" says so; what stands before are the data of both.
    ways = re.split(r"(?m)^(?:keras-mrl|sentence-transformers|TensorFlow)\b.*:$", part)
    counted = []
    for own in ways[1:]:
        own = own.partition("\n### ")[0]
        fenced = BLOCK.findall(own)
        code = [line for kind, text in fenced if kind == "python" for line in text.split("\n")]
        commands = [text for kind, text in fenced if kind == "sh"]
        if not fenced:
            theirs = re.findall(r"^    (.*)$", own, re.MULTILINE)
            commands = [line for line in theirs if line.startswith("$ ")]
            code = [line for line in theirs if line not in commands]
            compile("\n".join(code), "theirs", "exec")
        lines = [line for line in code if line.strip() and not line.startswith("#")]
        assert max(map(len, lines)) <= 100
        counted.append((str(len(lines)), str(len(commands))))
    assert [(lines, commands) for _, lines, commands in rows] == counted


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages)


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
