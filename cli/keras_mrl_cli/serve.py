"""Serve a model over gRPC and REST, with TensorFlow Serving's flags.

Where `tensorflow_model_server` is on PATH this command becomes it, with the flags as they were
given. Elsewhere, or with --dev, the development server of keras-mrl serves the same files: it is
for development and tests, and production runs tensorflow/serving. It bounds what clients may take
of it, as docs/server.md lists. SIGTERM or Ctrl-C ends it within ten seconds, a second one at once.

  keras-mrl serve --model_base_path models/digits --model_name digits
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import click

from .output import print_line, print_note
from .shared import (
    DONE,
    FAILED,
    MAX_PORT,
    MISUSED,
    Option,
    RefusalError,
    command,
    count_option,
    needing,
    refusing,
)

_REAL_SERVER = "tensorflow_model_server"
_HOST = "127.0.0.1"
_MAX_STOP_S = 10.0  # a little more than the server's own time to stop
_STOPPING = (
    "keras-mrl: Stopping. Requests under way have five seconds; another signal ends them now."
)
_ENDED = 0  # no signal has this number
_DEFAULTS = {"model_name": "default", "port": 8500, "file_system_poll_wait_seconds": 1}


def truth(text: str) -> bool:
    """Return a boolean as TensorFlow's flags spell it."""
    if text not in ("true", "false"):
        raise click.BadParameter(f"must be true or false. Received: {text}")
    return text == "true"


# By name: how a value is read, and the help; in brackets, the value without the flag.
FLAGS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "model_base_path": (
        str,
        "folder that holds the model's versions, each in a folder named by its number",
    ),
    "model_name": (str, "name clients ask for (default)"),
    "port": (int, "gRPC port; 0 lets the system choose (8500)"),
    "file_system_poll_wait_seconds": (
        int,
        "seconds between looks for new versions; 0 means only at start, below 0 never (1)",
    ),
    "model_config_file": (
        str,
        "text proto of ModelServerConfig: many models, version policies, labels; takes the place "
        "of --model_base_path and --model_name (none)",
    ),
    "model_config_file_poll_wait_seconds": (
        int,
        "seconds between reloads of that file; 0 means never (0)",
    ),
    "rest_api_port": (int, "HTTP port of the REST API; 0 lets the system choose (no REST)"),
    "rest_api_timeout_in_ms": (int, "how long a REST call may compute, in milliseconds (30000)"),
    "grpc_socket_path": (str, "Unix domain socket to listen on as well (none)"),
    "grpc_channel_arguments": (
        str,
        "options of the gRPC server, as in grpc.max_connection_age_ms=60000,key=value (none)",
    ),
    "ssl_config_file": (
        str,
        "text proto of SSLConfig; with it the gRPC port speaks TLS (no TLS)",
    ),
    "enable_batching": (truth, "compute requests in batches (false)"),
    "batching_parameters_file": (str, "text proto of BatchingParameters (its defaults)"),
    "enable_model_warmup": (truth, "replay warm-up records before a version serves (true)"),
    "enable_grpc_healthcheck_service": (truth, "serve grpc.health.v1 (false)"),
    "enable_serialization_as_tensor_content": (
        truth,
        "answer in bytes instead of one field per dtype (false)",
    ),
    "allow_version_labels_for_unavailable_models": (
        truth,
        "let new labels stand for versions that are not available, as none is at start (false)",
    ),
    "max_num_load_retries": (int, "how often a version that does not load is tried again (5)"),
    "load_retry_interval_micros": (int, "microseconds between two tries (60000000)"),
}
# The flags that the real server has besides, up to 2.20.
_ONLY_REAL = frozenset(
    """
    enable_per_model_batching_parameters enable_profiler enable_signature_method_name_check
    flush_filesystem_caches grpc_max_threads mixed_precision monitoring_config_file num_load_threads
    num_request_iterations_for_warmup num_tflite_interpreters_per_pool num_tflite_pools
    num_unload_threads per_process_gpu_memory_fraction platform_config_file prefer_tflite_model
    remove_unused_fields_from_bundle_metagraph rest_api_enable_cors_support rest_api_num_threads
    saved_model_tags skip_initialize_tpu tensorflow_inter_op_parallelism
    tensorflow_intra_op_parallelism tensorflow_session_config_file tensorflow_session_parallelism
    thread_pool_factory_config_file use_alts_credentials version xla_cpu_compilation_enabled
    xla_gpu_compilation_enabled
    """.split()
)


def _option(name: str, read: Callable[[str], Any], text: str) -> Option:
    flag = f"--{name}"
    if name in ("port", "rest_api_port"):  # gRPC would take any other number modulo 2**16
        remedy = "Choose another, or 0 for any free one."
        return count_option(flag, "N", text, least=0, most=MAX_PORT, remedy=remedy)
    if read is not truth:
        return Option(flag, type=read, metavar="N" if read is int else "TEXT", help=text)
    settings: dict[str, Any] = {"is_flag": False, "flag_value": "true"}  # without a value: true
    return Option(flag, type=read, metavar="true|false", help=text, **settings)


@command(
    __doc__,
    *(_option(name, read, text) for name, (read, text) in FLAGS.items()),
    Option(
        "--dev",
        is_flag=True,
        help=f"run the development server even where {_REAL_SERVER} is on PATH",
    ),
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def serve(arguments: SimpleNamespace) -> int:
    """Become the real server, or run the development server until a signal ends it."""
    flags = {name: getattr(arguments, name) for name in FLAGS}
    flags = {name: value for name, value in flags.items() if value is not None}
    if not flags.get("model_base_path") and not flags.get("model_config_file"):
        raise RefusalError(
            "A server must have models. Received: neither --model_base_path nor "
            "--model_config_file. Give one of them.",
            MISUSED,
        )
    # The real server refuses relative paths; so that a path means one thing, both get this one.
    if (base_path := flags.get("model_base_path")) and "://" not in base_path:
        flags["model_base_path"] = str(Path(base_path).absolute())
    flags = _DEFAULTS | flags
    real = shutil.which(_REAL_SERVER)
    if real and not arguments.dev:
        os.execv(real, [real, *_as_words(flags), *arguments.rest])
    _check_rest(arguments.rest)
    _check_start(flags)
    return _run_development_server(flags)


def _as_words(flags: Mapping[str, Any]) -> list[str]:
    """Return flags as TensorFlow's own parser reads them."""
    values = {name: flags[name] for name in FLAGS if name in flags}
    return [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in values.items()
    ]


def _check_rest(words: Sequence[str]) -> None:
    """Raise `RefusalError` for words that are no flags of the development server."""
    only_real = [word for word in words if word.removeprefix("--").partition("=")[0] in _ONLY_REAL]
    if only_real:
        raise RefusalError(
            "The development server must be started with flags it has. Received: "
            f"{' '.join(only_real)}, of {_REAL_SERVER} alone. Leave them out here, and give them "
            "to tensorflow/serving.",
            MISUSED,
        )
    if words:
        raise RefusalError(
            f"Only known flags are taken. Received: {' '.join(words)}. "
            f"See the command's --help for those there are. {_REAL_SERVER} may know more.",
            MISUSED,
        )


def _check_start(flags: Mapping[str, Any]) -> None:
    """Raise `RefusalError` for a wrong folder or a taken port, without loading TensorFlow."""
    from keras_mrl_serving.saved_model import check_versions
    from keras_mrl_serving.server.addresses import check_free

    with refusing(OSError):
        if not flags.get("model_config_file"):
            check_versions(flags["model_name"], flags["model_base_path"])
        for name in ("port", "rest_api_port"):
            check_free(_HOST, name, flags.get(name, 0))


def _run_development_server(flags: dict[str, Any]) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    lines = logging.StreamHandler()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[lines]
    )
    logging.getLogger("absl").setLevel(logging.WARNING)
    with needing("server", "The development server runs SavedModels with TensorFlow."):
        from keras_mrl_serving.server import DevServer
        from keras_mrl_serving.server.log import Escaping
    lines.addFilter(Escaping())  # of what gRPC and asyncio log, too
    served = repr(flags["model_name"])
    if flags.get("model_config_file"):
        served = f"the models of {flags['model_config_file']!r}"
    server = DevServer(flags.pop("model_base_path", None), host=_HOST, **flags)
    with _events() as events:
        with refusing(OSError, RuntimeError, ValueError):
            target = events.result_of(server.start)
        rest_target = ""
        if server.rest_api_port is not None:
            rest_target = f" and http://{target.rpartition(':')[0]}:{server.rest_api_port}"
        print_line(f"Serving {served} at {target}{rest_target}. Stop with Ctrl-C.")
        events.wait_for_signal()
        print_note(_STOPPING)
        events.result_of(server.stop, _MAX_STOP_S)
    # Python would wait for the threads of pools, and a model may never give one back.
    _end_at_once(DONE)


class _Events:
    """What the main thread waits for: signals, and the ends of calls in threads of their own.

    A handler in Python would run between two instructions of the main thread, which may be waiting
    for a lock, or be within a minute of TensorFlow's code. So signals are read from a socket.
    """

    def __init__(
        self, reader: socket.socket, writer: socket.socket, numbers: Sequence[int]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = numbers

    def wait_for_signal(self) -> None:
        """Return once a signal has come."""
        self._next(None)

    def result_of(self, call: Callable[[], Any], max_s: float | None = None) -> Any:
        """Return what a call returns, or raise what it raises; a signal ends the process at once.

        So does the time, where it is limited.
        """
        results: list[Any] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(call())
            except BaseException as error:  # raised again by the thread that waits
                errors.append(error)
            self._writer.send(bytes((_ENDED,)))

        threading.Thread(target=work, name=call.__name__, daemon=True).start()
        try:
            event = self._next(max_s)
        except TimeoutError:
            print_note(f"keras-mrl: The server did not end within {max_s:g} s. It is ended now.")
            _end_at_once(FAILED)
        if event != _ENDED:
            _end_at_once(128 + event)
        if errors:
            raise errors[0]
        return results[0]

    def _next(self, max_s: float | None) -> int:
        self._reader.settimeout(max_s)
        while (event := self._reader.recv(1)[0]) not in (_ENDED, *self._numbers):
            pass  # a signal that something else handles
        return event


@contextmanager
def _events() -> Iterator[_Events]:
    """The signals that end the server, for as long as the context lasts."""
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) is not signal.SIG_IGN  # as in the background of a shell
    ]
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        previous = [signal.signal(number, lambda *_: None) for number in numbers]
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield _Events(reader, writer, numbers)
        finally:
            signal.set_wakeup_fd(previous_fd)
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)


def _end_at_once(status: int) -> NoReturn:
    """End the process without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
