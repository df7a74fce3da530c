"""The development server in a process of its own, as the command line starts it."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.helpers.cli import KERAS_MRL


class ServerProcess(NamedTuple):
    """A process, the address of its gRPC port, and its REST port."""

    process: subprocess.Popen[str]
    target: str
    rest_port: int


@contextmanager
def server_process(base: Path, log: Path) -> Iterator[ServerProcess]:
    """Serve the versions under `base` until the context ends; the log goes to a file."""
    words = ("serve", "--dev", "--port=0", "--rest_api_port=0", f"--model_base_path={base}")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*KERAS_MRL, *words], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            match = re.search(r"at (\S+:\d+) and http://127.0.0.1:(\d+)", line)
            assert match, line
            yield ServerProcess(process, match[1], int(match[2]))
        finally:
            process.terminate()
            process.communicate(timeout=600)
