"""Serve a model over gRPC and REST, with TensorFlow Serving's own flags.

Where `tensorflow_model_server` is on PATH this command becomes it, with the flags as they were
given. Elsewhere, or with --dev, the development server of keras-mrl serves the same files: it is
for development and tests, and production runs tensorflow/serving.

  keras-mrl serve --model_name digits --model_base_path keras-mrl-demo/models/digits --port 8500
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .refuse import refuse, unknown_flags
from .server_flags import add_flags, as_text, given, lacking

_REAL_SERVER = "tensorflow_model_server"
_MAX_PORT = 2**16 - 1
_DEFAULTS = {"model_name": "default", "port": 8500, "file_system_poll_wait_seconds": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; they are those of `tensorflow_model_server`."""
    add_flags(parser)
    parser.add_argument(
        "--dev",
        action="store_true",
        help=f"run the development server even where {_REAL_SERVER} is on PATH",
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Become the real server, or run the development server until a signal ends it."""
    flags = given(arguments)
    for name in ("port", "rest_api_port"):
        port = flags.get(name, 0)
        if not 0 <= port <= _MAX_PORT:  # gRPC would take what is left of it modulo 2**16
            return refuse(
                f"--{name} must lie in 0..{_MAX_PORT}. Received: {port}. "
                "Choose another, or 0 for any free one.",
                status=2,
            )
    if not flags.get("model_base_path") and not flags.get("model_config_file"):
        return refuse(
            "A server must have models. Received: neither --model_base_path nor "
            "--model_config_file. Give one of them.",
            status=2,
        )
    # The real server refuses relative paths; so that a path means one thing, both get this one.
    if (base_path := flags.get("model_base_path")) and "://" not in base_path:
        flags["model_base_path"] = str(Path(base_path).absolute())
    real = shutil.which(_REAL_SERVER)
    if real and not arguments.dev:
        os.execv(real, [real, *as_text(_DEFAULTS | flags), *rest])
    if others := lacking(rest):
        return refuse(
            "The development server must be started with flags it has. Received: "
            f"{' '.join(others)}, of {_REAL_SERVER} alone. Leave them out here, and give them to "
            "tensorflow/serving.",
            status=2,
        )
    if rest:
        return refuse(unknown_flags(rest) + f" {_REAL_SERVER} may know more.", status=2)
    return _run_development_server(_DEFAULTS | flags)


def _run_development_server(flags: dict[str, Any]) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        from keras_mrl_serving.server import DevServer
    except ImportError as error:
        return refuse(
            "The development server runs SavedModels with TensorFlow. "
            f"Received: {error}. Install it: pip install 'keras-mrl[server]'."
        )
    served = repr(flags["model_name"])
    if flags.get("model_config_file"):
        served = f"the models of {flags['model_config_file']!r}"
    server = DevServer(flags.pop("model_base_path", None), **flags)
    try:
        target = server.start()
    except (OSError, RuntimeError, ValueError) as error:
        return refuse(str(error))

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        server.stop()

    signal.signal(signal.SIGTERM, stop)
    rest = ""
    if server.rest_api_port is not None:
        rest = f" and http://{target.rpartition(':')[0]}:{server.rest_api_port}"
    print(f"Serving {served} at {target}{rest}. Stop with Ctrl-C.", flush=True)
    try:
        server.wait()
    except KeyboardInterrupt:
        server.stop()
    return 0
