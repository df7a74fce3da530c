"""The development server: models and their pollers, behind a gRPC port and perhaps a REST port.

The ports open once the first versions are loaded, as in TensorFlow Serving. A missing base path or
version, or a version that does not load, ends the start at once; TensorFlow Serving would wait for
it, or try it again for five minutes.
"""

import os
import threading
import time
from functools import partial
from os import PathLike, fspath
from typing import Any

import grpc

from ..saved_model import check_versions
from .addresses import not_free
from .batching_config import batching_parameters
from .config import Configuration, check_logging, read_config, single_model
from .grpc_messages import CallThreads, MessageReader
from .grpc_options import (
    add_health,
    server_credentials,
    server_options,
    socket_address,
)
from .http_server import HttpServer
from .loading import LoadOptions, load
from .log import logger
from .models import Models, Retries, absent_version, absent_versions, aspired_versions
from .poller import ConfigPoller, Poller, model_poller
from .requests import add_services
from .rest import answer
from .status import StatusError

_GRACE_S = 5.0
_CANCEL_S = 1.0
_ARRIVAL_S = 0.25  # calls on their way to the server have come by then
_SENDING_S = 0.25  # the last answers have gone by then
# Most of them wait: for a message, a batch or a reload. Those that compute release the GIL.
_MAX_THREADS = 256
StrPath = str | PathLike[str]


class DevServer:
    """Serves SavedModels as TensorFlow Serving does, in process.

    For development and tests; production runs `tensorflow/serving` on the very same files. The
    arguments are its flags.

    Args:
        base_path: the folder whose numeric children are the versions; the highest is served.
        model_name: the name of the model in requests.
        model_config_file: text proto of `tensorflow.serving.ModelServerConfig`: models, version
            policies and labels. It takes the place of `base_path` and `model_name`.
        model_config_file_poll_wait_seconds: how often that file is reloaded; 0 means never.
        port: the port to listen on; 0 takes a free one.
        host: the address to listen on.
        grpc_socket_path: a Unix domain socket to listen on as well; None means without.
        grpc_channel_arguments: options of the gRPC server, `key=value,key=value`.
        rest_api_port: the port of the REST surface; 0 takes a free one, None means without.
        rest_api_timeout_in_ms: how long a REST call may compute; 0 or less means without limit.
        ssl_config_file: text proto of `tensorflow.serving.SSLConfig`; with it the gRPC port
            speaks TLS. REST stays plain HTTP, as TensorFlow Serving's does.
        file_system_poll_wait_seconds: how often base paths are read; 0 means only at the start,
            so that models a reload adds never come; below 0 not even then, and `poll` does.
        max_num_load_retries: how often a version that does not load is tried again.
        load_retry_interval_micros: the time between two tries.
        allow_version_labels_for_unavailable_models: whether a new label may stand for a version
            that is not available, as none is at the start.
        enable_batching: whether requests are computed in batches.
        batching_parameters_file: text proto of `tensorflow.serving.BatchingParameters`.
        enable_model_warmup: whether warm-up records are replayed before a version serves.
        enable_grpc_healthcheck_service: whether `grpc.health.v1` is served.
        enable_serialization_as_tensor_content: whether answers come in bytes, not in the field of
            each dtype.

    Examples:
        >>> with DevServer("models/flowers") as target:  # doctest: +SKIP
        ...     channel = grpc.insecure_channel(target)
    """

    def __init__(
        self,
        base_path: StrPath | None = None,
        *,
        model_name: str = "default",
        model_config_file: StrPath | None = None,
        model_config_file_poll_wait_seconds: float = 0.0,
        port: int = 0,
        host: str = "127.0.0.1",
        grpc_socket_path: StrPath | None = None,
        grpc_channel_arguments: str = "",
        rest_api_port: int | None = None,
        rest_api_timeout_in_ms: int = 30_000,
        ssl_config_file: StrPath | None = None,
        file_system_poll_wait_seconds: float = 1.0,
        max_num_load_retries: int = 5,
        load_retry_interval_micros: int = 60_000_000,
        allow_version_labels_for_unavailable_models: bool = False,
        enable_batching: bool = False,
        batching_parameters_file: StrPath | None = None,
        enable_model_warmup: bool = True,
        enable_grpc_healthcheck_service: bool = False,
        enable_serialization_as_tensor_content: bool = False,
    ) -> None:
        self.port = port
        self.rest_api_port = rest_api_port
        self._host = host
        self._base_path = None if base_path is None else _absolute(fspath(base_path))
        self._model_name = model_name
        self._config_file = _text(model_config_file)
        self._config_wait_s = model_config_file_poll_wait_seconds
        self._socket_path = _text(grpc_socket_path)
        self._channel_arguments = grpc_channel_arguments
        self._rest_timeout_s = max(rest_api_timeout_in_ms, 0) / 1000 or None
        self._ssl_config_file = _text(ssl_config_file)
        self._wait_s = file_system_poll_wait_seconds
        self._retries = Retries(
            max_num=max_num_load_retries, interval_s=max(load_retry_interval_micros, 0) / 1e6
        )
        self._allow_labels = allow_version_labels_for_unavailable_models
        self._enable_batching = enable_batching
        self._batching_file = _text(batching_parameters_file)
        self._enable_warmup = enable_model_warmup
        self._enable_health = enable_grpc_healthcheck_service
        self._as_tensor_content = enable_serialization_as_tensor_content
        self._models: Models | None = None
        self._server: grpc.Server | None = None
        self._threads = CallThreads(_MAX_THREADS)
        self._reader = MessageReader(lambda: self._threads.num_queued)
        self._http: HttpServer | None = None
        self._configuration: Configuration | None = None
        self._poller: Poller | None = None
        self._config_poller: ConfigPoller | None = None

    def start(self) -> str:
        """Loads the first versions, then opens the ports; returns the gRPC one's `host:port`.

        Raises:
            FileNotFoundError: a base path is no folder, or holds no version.
            RuntimeError: a version does not load, or the server was started before.
            OSError: a port is taken, or a file cannot be read.
            ValueError: there is neither a base path nor a config, or a file or the channel
                arguments hold something that cannot be used.
        """
        if self._server is not None:
            raise RuntimeError(
                "A DevServer starts once. Received: a second start(). Make another DevServer."
            )
        source = self._config_file or self._base_path
        if source is None:
            raise ValueError(
                "A DevServer must have models. Received: neither base_path nor "
                "model_config_file. Give one of them."
            )
        logger.warning(
            "This server is for development and tests. Production runs tensorflow/serving on the "
            "very same files: %s",
            source,
        )
        config = (
            read_config(self._config_file)
            if self._config_file
            else single_model(self._model_name, source)
        )
        credentials = server_credentials(self._ssl_config_file) if self._ssl_config_file else None
        options = server_options(self._channel_arguments)
        load_options = LoadOptions(
            enable_model_warmup=self._enable_warmup,
            batching_parameters=batching_parameters(self._enable_batching, self._batching_file),
        )
        models = Models(partial(load, options=load_options), self._retries)
        poller = model_poller(models, self._wait_s)
        configuration = Configuration(
            models, allow_labels_for_unavailable=self._allow_labels, wake=poller.wake
        )
        _apply_first(configuration, config, source)
        server = grpc.server(self._threads, interceptors=[self._reader], options=options)
        try:
            if self._wait_s >= 0:
                _load_first_versions(models, config)
            add_services(server, models, configuration, as_tensor_content=self._as_tensor_content)
            if self._enable_health:
                add_health(server)
            self._bind(server, models, credentials)
        except BaseException:
            if self._http is not None:
                self._http.stop(0)
            models.close()
            raise
        server.start()
        self._reader.start()
        self._models, self._configuration, self._server = models, configuration, server
        if self._http is not None:
            self._http.start()
        self._poller = poller
        poller.start()
        if self._config_file and self._config_wait_s > 0:
            self._config_poller = ConfigPoller(
                configuration, self._config_file, self._config_wait_s
            )
            self._config_poller.start()
        return self._log_addresses(config)

    def poll(self) -> None:
        """Reads the base paths now, then loads and unloads what has changed, in this thread."""
        if self._models is not None and self._poller is not None:
            self._models.poll()
            self._poller.wake()  # to learn when a version that just failed is tried again

    def stop(self) -> None:
        """Closes the ports and unloads the models, in eight seconds at most.

        Requests and loads under way have five seconds; requests that come meanwhile are
        UNAVAILABLE. Then runs are cancelled, which makes their requests UNAVAILABLE, too, and have
        a second to end. A load, or an op that does not heed the cancel, is left behind in its
        thread.
        """
        if self._configuration is not None:
            self._configuration.close()
        until = time.monotonic() + _GRACE_S

        def grace_s() -> float:
            return max(until - time.monotonic(), 0.0)

        stopping_http = None
        if self._http is not None:
            stopping_http = threading.Thread(
                target=self._http.stop, args=(_GRACE_S + _CANCEL_S,), name="rest end", daemon=True
            )
            stopping_http.start()
        # gRPC's own stop would cancel the calls that have come and have no thread yet. So it is
        # the last step, and the calls that come in the first moment are answered.
        if not self._threads.wait_until_quiet(_ARRIVAL_S):
            logger.info("%d calls under way have %g s.", self._threads.num_under_way, grace_s())
            self._reader.refuse_calls()
        if self._config_poller is not None:
            self._config_poller.stop(grace_s())
        if self._poller is not None:
            self._poller.stop(grace_s())
            self._poller = None
        if not self._threads.wait_until_quiet(grace_s()):
            logger.warning("%d calls are cut off: UNAVAILABLE.", self._threads.num_under_way)
        if stopping_http is not None:
            stopping_http.join(grace_s())
        if self._models is not None:
            self._models.close(_CANCEL_S)
        if stopping_http is not None:
            stopping_http.join(_CANCEL_S)
        if self._server is not None:
            self._server.stop(_SENDING_S).wait(_SENDING_S + _CANCEL_S)
        self._reader.stop()

    def wait(self) -> None:
        """Blocks until another thread stops the server, or a signal's handler raises."""
        if self._server is not None:
            self._server.wait_for_termination()

    def __enter__(self) -> str:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _bind(
        self, server: grpc.Server, models: Models, credentials: grpc.ServerCredentials | None
    ) -> None:
        if self.rest_api_port is not None:
            try:
                self._http = HttpServer(
                    self._host, self.rest_api_port, partial(answer, models, self._rest_timeout_s)
                )
            except (OSError, OverflowError) as error:
                raise not_free(self._host, "rest_api_port", self.rest_api_port) from error
            self.rest_api_port = self._http.server_port
        if self._socket_path is not None:
            address = socket_address(self._socket_path)
            try:
                _add_port(server, address, credentials)
            except RuntimeError as error:
                raise OSError(
                    "grpc_socket_path must be a path in a folder that can be written. Received: "
                    f"grpc_socket_path={self._socket_path!r}, which cannot be bound. Choose "
                    "another path."
                ) from error
        # Bound last: gRPC frees a port only when it frees the server.
        try:
            self.port = _add_port(server, f"{self._host}:{self.port}", credentials)
        except RuntimeError as error:
            raise not_free(self._host, "port", self.port) from error

    def _log_addresses(self, config: Any) -> str:
        target = f"{self._host}:{self.port}"
        for model in config.model_config_list.config:
            logger.info("%s: serving %s on %s", model.name, model.base_path, target)
        if self.rest_api_port is not None:
            logger.info("REST on http://%s:%d/v1/models", self._host, self.rest_api_port)
        return target


def _text(path: StrPath | None) -> str | None:
    return fspath(path) if path else None


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _apply_first(configuration: Configuration, config: Any, source: str) -> None:
    try:
        configuration.apply(config)
        check_logging(config)
    except StatusError as error:
        remedy = "Correct the file."
        if error.code is grpc.StatusCode.FAILED_PRECONDITION:
            remedy = (
                "At the start none is yet: leave the label out until a later reload, or give "
                "allow_version_labels_for_unavailable_models."
            )
        raise ValueError(
            "The config of the models must be one that can be served. Received: "
            f"{source!r}, {error.code.name}: {error.message.rstrip('.')}. {remedy}"
        ) from error


def _load_first_versions(models: Models, config: Any) -> None:
    for model in config.model_config_list.config:
        _check_has_versions(model)
    models.poll()
    for model in config.model_config_list.config:
        newest = models.versions(model.name)[0]
        if newest.failure is not None:
            raise RuntimeError(
                f"The highest version must load. Received: version {newest.number} of model "
                f"{model.name}, {newest.failure.code.name}: {newest.failure.message.rstrip('.')}. "
                "Export it again, or remove it so that a lower one is served."
            )


def _check_has_versions(model: Any) -> None:
    versions = check_versions(model.name, model.base_path)
    if not aspired_versions(versions, model.model_version_policy):
        text = absent_version(model.name, absent_versions(versions, model.model_version_policy)[0])
        raise FileNotFoundError(
            f"A specific version must stand under base_path. Received: {text} "
            f"Name one of {', '.join(map(str, versions))}, or leave the policy out."
        )


def _add_port(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    if credentials is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, credentials)
