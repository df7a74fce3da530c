"""A blocking transport over gRPC."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc

from . import _channel
from ._messages import decode, encode, stubs
from ._status import translate
from .calls import Envelope, Reply
from .options import Options


class GrpcTransport:
    """Sends envelopes over one gRPC channel; any number of threads may share it.

    Args:
        targets: One address, or several that serve the same models.
        options: How to connect and send.

    Raises:
        ValueError: If an address is none, or an interceptor is not one of `grpc`.
    """

    def __init__(self, targets: str | Sequence[str], options: Options) -> None:
        self._address = _channel.address(targets)
        self._interceptors = _channel.checked_interceptors(
            options, grpc.UnaryUnaryClientInterceptor
        )
        self.target = targets if isinstance(targets, str) else ",".join(targets)
        self._options = options
        self._closed = False
        self._opening = threading.Lock()
        self._open()

    def send(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        if self._closed:
            raise _channel.closed(self.target)
        if os.getpid() != self._pid:
            self._open_after_fork()
        method, message = encode(envelope)
        began = time.monotonic()
        try:
            response = self._stubs[method](
                message,
                timeout=_channel.deadline(envelope.remaining_s),
                metadata=self._options.headers(),
            )
        except (grpc.RpcError, ValueError) as error:
            if self._closed:  # by another thread, in mid-call
                raise _channel.closed(self.target) from error
            if isinstance(error, ValueError):
                raise
            took_s = time.monotonic() - began
            raise translate(error, envelope, self.target, self._options, took_s) from error
        return decode(envelope, response, self.target)

    def close(self) -> None:
        """Close the channel."""
        self._closed = True
        self._channel.close()

    def _open(self) -> None:
        options = self._options
        arguments, compression = _channel.arguments(options), _channel.compression(options)
        credentials = _channel.credentials(options)
        if credentials is None:
            channel = grpc.insecure_channel(self._address, arguments, compression)
        else:
            channel = grpc.secure_channel(self._address, credentials, arguments, compression)
        self._channel = grpc.intercept_channel(channel, *self._interceptors)
        self._stubs = stubs(self._channel)
        self._pid = os.getpid()

    def _open_after_fork(self) -> None:
        """Give a forked child a channel of its own; gRPC closes the one it inherited."""
        with self._opening:
            if os.getpid() != self._pid:
                self._open()
