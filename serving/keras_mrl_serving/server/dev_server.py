"""The development server itself: a model, a poller and its ports."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike, fspath
from types import TracebackType

import grpc

from .http_server import HttpServer
from .model import ServedModel, no_versions
from .rest import answer
from .service import add_services
from .tls import server_credentials
from .versions import list_versions

_logger = logging.getLogger("keras_mrl_serving.server")
_GRACE_S = 5.0
_OPTIONS = (
    # TensorFlow Serving limits no message; Python's default is 4 MB.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # With it two servers share one port in silence, and each answers half of the requests.
    ("grpc.so_reuseport", 0),
)


class DevServer:
    """Serves the SavedModels under a base path as TensorFlow Serving does, in process.

    For development and tests; production runs `tensorflow/serving` on the very same files.

    Args:
        base_path: the folder whose numeric children are the versions; the highest is served.
        model_name: the name requests ask for.
        port: the port to listen on; 0 takes a free one.
        host: the address to listen on.
        file_system_poll_wait_seconds: how often `base_path` is looked at; 0 means only at start.
        rest_api_port: the port of the REST surface; 0 takes a free one, None means without.
        ssl_config_file: text proto of `tensorflow.serving.SSLConfig`; with it the gRPC port
            speaks TLS. REST stays plain HTTP, as TensorFlow Serving's does.

    Examples:
        >>> with DevServer("models/flowers") as target:  # doctest: +SKIP
        ...     channel = grpc.insecure_channel(target)
    """

    def __init__(
        self,
        base_path: str | PathLike[str],
        *,
        model_name: str = "default",
        port: int = 0,
        host: str = "127.0.0.1",
        file_system_poll_wait_seconds: float = 1.0,
        rest_api_port: int | None = None,
        ssl_config_file: str | PathLike[str] | None = None,
    ) -> None:
        self.port = port
        self.rest_api_port = rest_api_port
        self._ssl_config_file = ssl_config_file
        self._host = host
        self._wait_s = file_system_poll_wait_seconds
        self._model = ServedModel(model_name, fspath(base_path))
        self._server: grpc.Server | None = None
        self._http: HttpServer | None = None
        self._stopping = threading.Event()
        self._poller = threading.Thread(target=self._poll_for_ever, name="poller", daemon=True)

    def start(self) -> str:
        """Loads the highest version, then opens the ports; returns the gRPC one's `host:port`.

        Raises:
            FileNotFoundError: `base_path` is no folder, or holds no version.
            RuntimeError: the version does not load, or the server was started before.
            OSError: a port is taken, or `ssl_config_file` cannot be read.
            ValueError: `ssl_config_file` holds no usable SSLConfig.
        """
        if self._server is not None:
            raise RuntimeError(
                "A DevServer starts once. Received: a second start(). Make another DevServer."
            )
        _logger.warning(
            "This server is for development and tests. Production runs tensorflow/serving on the "
            "very same files: %s",
            self._model.base_path,
        )
        ssl_config_file = self._ssl_config_file
        credentials = server_credentials(fspath(ssl_config_file)) if ssl_config_file else None
        self._load_first_version()
        server = grpc.server(ThreadPoolExecutor(), options=_OPTIONS)
        models = {self._model.name: self._model}
        add_services(server, models)
        try:
            if self.rest_api_port is not None:
                self._http = self._bind_http(models, self.rest_api_port)
            self._bind(server, credentials)  # last: what it has bound stays so until it is gone
        except OSError:
            if self._http is not None:
                self._http.stop(0)
            self._model.close()
            raise
        server.start()
        self._server = server
        if self._http is not None:
            self._http.start()
        if self._wait_s > 0:
            self._poller.start()
        target = f"{self._host}:{self.port}"
        _logger.info("%s: serving %s on %s", self._model.name, self._model.base_path, target)
        if self.rest_api_port is not None:
            _logger.info("REST on http://%s:%d/v1/models", self._host, self.rest_api_port)
        return target

    def stop(self) -> None:
        """Closes the ports, gives requests under way five seconds, and unloads the model."""
        self._stopping.set()
        if self._poller.is_alive():
            self._poller.join()
        if self._server is not None:
            stopped = self._server.stop(_GRACE_S)
            if self._http is not None:
                self._http.stop(_GRACE_S)
            stopped.wait()
        self._model.close()

    def wait(self) -> None:
        """Blocks until the server is stopped, by another thread or by a signal's exception."""
        if self._server is not None:
            self._server.wait_for_termination()

    def __enter__(self) -> str:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _bind(self, server: grpc.Server, credentials: grpc.ServerCredentials | None) -> None:
        address = f"{self._host}:{self.port}"
        try:
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise self._not_free(f"port={self.port}") from error

    def _bind_http(self, models: dict[str, ServedModel], port: int) -> HttpServer:
        try:
            http = HttpServer(self._host, port, partial(answer, models))
        except (OSError, OverflowError) as error:
            raise self._not_free(f"rest_api_port={port}") from error
        self.rest_api_port = http.server_port
        return http

    def _not_free(self, port: str) -> OSError:
        return OSError(
            f"The address must be free. Received: host={self._host!r}, {port}, "
            f"which cannot be bound. Choose another port, or {port.partition('=')[0]}=0 for any "
            "free one."
        )

    def _load_first_version(self) -> None:
        name, path = self._model.name, self._model.base_path
        try:
            found = list_versions(path)
        except OSError as error:
            raise FileNotFoundError(
                f"base_path must be a folder that can be read. Received: base_path={path!r} "
                f"({error.strerror}). Export a model to {path}/1 first, or correct the path."
            ) from error
        if not found:
            raise FileNotFoundError(
                f"base_path must hold a version of the model. Received: {no_versions(name, path)} "
                f"Put the SavedModel at {path}/1, or give the folder above the numbered one."
            )
        self._model.poll()
        newest = self._model.versions()[0]
        if newest.error is not None:
            raise RuntimeError(
                f"The highest version must load. Received: version {newest.number} of model "
                f"{name}, {newest.error.code.name}: {newest.error.message}. Export it again, or "
                "remove it so that a lower one is served."
            )

    def _poll_for_ever(self) -> None:
        problem = ""
        while not self._stopping.wait(self._wait_s):
            try:
                self._model.poll()
                now = ""
            except OSError as error:
                now = f"base path {self._model.base_path} cannot be read: {error.strerror}"
            if now not in ("", problem):  # once, not at every look
                _logger.warning("%s: %s", self._model.name, now)
            problem = now
