"""The development server itself: a model, a poller and a port."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from os import PathLike, fspath
from types import TracebackType

import grpc

from .model import ServedModel, no_versions
from .service import add_services
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
    """Serves the SavedModels under a base path over gRPC as TensorFlow Serving does, in process.

    For development and tests; production runs `tensorflow/serving` on the very same files.

    Args:
        base_path: the folder whose numeric children are the versions; the highest is served.
        model_name: the name requests ask for.
        port: the port to listen on; 0 takes a free one.
        host: the address to listen on.
        file_system_poll_wait_seconds: how often `base_path` is looked at; 0 means only at start.

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
    ) -> None:
        self.port = port
        self._host = host
        self._wait_s = file_system_poll_wait_seconds
        self._model = ServedModel(model_name, fspath(base_path))
        self._server: grpc.Server | None = None
        self._stopping = threading.Event()
        self._poller = threading.Thread(target=self._poll_for_ever, name="poller", daemon=True)

    def start(self) -> str:
        """Loads the highest version, then opens the port; returns the address, `host:port`.

        Raises:
            FileNotFoundError: `base_path` is no folder, or holds no version.
            RuntimeError: the version does not load, or the server was started before.
            OSError: the port is taken.
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
        self._load_first_version()
        server = grpc.server(ThreadPoolExecutor(), options=_OPTIONS)
        add_services(server, {self._model.name: self._model})
        try:
            self.port = server.add_insecure_port(f"{self._host}:{self.port}")
        except RuntimeError as error:
            self._model.close()
            raise OSError(
                f"The address must be free. Received: host={self._host!r}, port={self.port}, "
                "which cannot be bound. Choose another port, or port=0 for any free one."
            ) from error
        server.start()
        self._server = server
        if self._wait_s > 0:
            self._poller.start()
        target = f"{self._host}:{self.port}"
        _logger.info("%s: serving %s on %s", self._model.name, self._model.base_path, target)
        return target

    def stop(self) -> None:
        """Closes the port, gives requests under way five seconds, and unloads the model."""
        self._stopping.set()
        if self._poller.is_alive():
            self._poller.join()
        if self._server is not None:
            self._server.stop(_GRACE_S).wait()
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
