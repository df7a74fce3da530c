"""The server in a process of its own, which is given the published folder and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keras_mrl_serving import Client, KerasMrlError

_START_S = 120.0
_SHOWN_LINES = 10


@contextmanager
def serving(base_path: Path, name: str, log: Path) -> Iterator[Client]:
    """Run `keras-mrl serve` over `base_path`, give a client of it, and end it afterwards.

    Raises:
        RuntimeError: If it ends, or does not answer, before it serves; with the end of its log.
    """
    port = _free_port()
    command = [sys.executable, "-m", "keras_mrl_cli", "serve", f"--model_name={name}"]
    command += [f"--model_base_path={base_path.absolute()}", f"--port={port}"]
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=base_path, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        with Client(f"127.0.0.1:{port}", model=name) as client:
            _wait(client, process, log)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            client.describe()
        except KerasMrlError as error:
            if process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])
            raise RuntimeError(
                f"The server must answer within {_START_S:g} s of its start. "
                f"Received: {error} Its log ends:\n{tail}\nMend what it names and run again."
            ) from error
        return


def _free_port() -> int:
    # The real server takes no port 0, so a free one is found here.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
