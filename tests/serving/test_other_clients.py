"""The clients of docs/other_languages.md ask a model of texts as ours does: Node.js and curl."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from keras_mrl_serving import Client
from keras_mrl_serving.server import DevServer
from tests.helpers.text_servers import save_text_model, text_manifest

PAGE = (Path(__file__).parents[2] / "docs" / "other_languages.md").read_text()
BIRDS = ["bees see ultraviolet light", "owls hear mice under snow", "eels cross an ocean", "a b"]
TEXTS = ["what do bees see?", "who hears mice? 🦉"]  # of the page


class Served(NamedTuple):
    """Where a model of texts is asked."""

    url: str
    client: Client


@pytest.fixture(scope="module", params=["query", "plain"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A model of texts with its gallery, with prompts and without."""
    prompts = {"query": "query: "} if request.param == "query" else {}
    manifest = text_manifest(prompts, model_id=None)
    folder = save_text_model(tmp_path_factory.mktemp("notes"), manifest, BIRDS)
    server = DevServer(folder, model_name="notes", rest_api_port=0)
    with server as target, Client(target, model="notes") as client:
        yield Served(f"http://localhost:{server.rest_api_port}/v1/models/notes", client)


def test_node_asks_in_text(served: Served) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not on this machine")
    (program,) = re.findall(r"^```js\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    program, count = re.subn(r'"http://localhost:\d+/v1/models/notes"', f'"{served.url}"', program)
    assert count == 1
    done = subprocess.run(
        [node, "--input-type=module", "--eval", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = served.client.retrieve(TEXTS)
    np.testing.assert_array_equal(json.loads(done.stdout), expected.ids)


def test_curl_asks_in_text(served: Served) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not on this machine")
    lines = [line for line in PAGE.splitlines() if line.startswith("curl ") and "retrieve" in line]
    (line,) = lines
    line = re.sub(r"http://localhost:\d+/v1/models/notes", served.url, line)
    prompt = served.client.describe().prompts.get("query", "")
    line = line.replace(TEXTS[0], prompt + TEXTS[0])
    done = subprocess.run(
        [curl, "--silent", "--fail-with-body", *shlex.split(line)[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    answer = json.loads(done.stdout)["outputs"]
    expected = served.client.retrieve(TEXTS[:1])
    np.testing.assert_array_equal(answer["ids"], expected.ids)
    np.testing.assert_allclose(answer["scores"], expected.scores, atol=1e-6)
