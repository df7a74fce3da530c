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

from .refuse import refuse, unknown_flags

_REAL_SERVER = "tensorflow_model_server"
_MAX_PORT = 2**16 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; they are those of `tensorflow_model_server`."""
    parser.add_argument(
        "--model_base_path",
        required=True,
        help="folder that holds the model's versions, each in a folder named by its number",
    )
    parser.add_argument("--model_name", default="default", help="name clients ask for (default)")
    parser.add_argument(
        "--port", type=int, default=8500, help="gRPC port; 0 lets the system choose (8500)"
    )
    parser.add_argument(
        "--rest_api_port",
        type=int,
        help="HTTP port of the REST API; 0 lets the system choose (no REST)",
    )
    parser.add_argument(
        "--ssl_config_file",
        help="text proto of SSLConfig; with it the gRPC port speaks TLS (no TLS)",
    )
    parser.add_argument(
        "--file_system_poll_wait_seconds",
        type=int,
        default=1,
        help="seconds between looks for new versions (1)",
    )
    parser.add_argument(
        "--dev",
        action="store_true",
        help=f"run the development server even where {_REAL_SERVER} is on PATH",
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Become the real server, or run the development server until a signal ends it."""
    for flag, port in (("port", arguments.port), ("rest_api_port", arguments.rest_api_port or 0)):
        if not 0 <= port <= _MAX_PORT:  # gRPC would take what is left of it modulo 2**16
            return refuse(
                f"--{flag} must lie in 0..{_MAX_PORT}. Received: {port}. "
                "Choose another, or 0 for any free one.",
                status=2,
            )
    real = shutil.which(_REAL_SERVER)
    # The real server refuses relative paths; so that a path means one thing, both get this one.
    base_path = arguments.model_base_path
    if "://" not in base_path:
        base_path = str(Path(base_path).absolute())
    if real and not arguments.dev:
        flags = [
            f"--model_base_path={base_path}",
            f"--model_name={arguments.model_name}",
            f"--port={arguments.port}",
            f"--file_system_poll_wait_seconds={arguments.file_system_poll_wait_seconds}",
        ]
        if arguments.rest_api_port is not None:
            flags.append(f"--rest_api_port={arguments.rest_api_port}")
        if arguments.ssl_config_file is not None:
            flags.append(f"--ssl_config_file={arguments.ssl_config_file}")
        os.execv(real, [real, *flags, *rest])
    if rest:
        return refuse(unknown_flags(rest) + f" {_REAL_SERVER} may know more.", status=2)
    return _run_development_server(arguments, base_path)


def _run_development_server(arguments: argparse.Namespace, base_path: str) -> int:
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
    server = DevServer(
        base_path,
        model_name=arguments.model_name,
        port=arguments.port,
        file_system_poll_wait_seconds=arguments.file_system_poll_wait_seconds,
        rest_api_port=arguments.rest_api_port,
        ssl_config_file=arguments.ssl_config_file,
    )
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
    print(f"Serving {arguments.model_name!r} at {target}{rest}. Stop with Ctrl-C.", flush=True)
    try:
        server.wait()
    except KeyboardInterrupt:
        server.stop()
    return 0
