"""A transport over gRPC for asyncio."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

import grpc

from . import _channel
from ._messages import decode, encode, stubs
from ._status import translate
from .calls import Envelope, Reply
from .options import Options


class AioTransport:
    """Sends envelopes over one channel of `grpc.aio`, opened in the loop that sends first.

    Args:
        targets: One address, or several that serve the same models.
        options: How to connect and send.

    Raises:
        ValueError: If an address is none, or an interceptor is not one of `grpc.aio`.
    """

    def __init__(self, targets: str | Sequence[str], options: Options) -> None:
        self._address = _channel.address(targets)
        self.target = targets if isinstance(targets, str) else ",".join(targets)
        self._options = options
        self._pid = os.getpid()
        self._interceptors = _channel.checked_interceptors(options, grpc.aio.ClientInterceptor)
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send_async(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        if os.getpid() != self._pid:
            raise _channel.forked(self.target)
        if self._closed:
            raise _channel.closed(self.target)
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._open(loop)
        if loop is not self._loop:
            raise _channel.of_another_loop(self.target)
        method, message = encode(envelope)
        began = time.monotonic()
        try:
            response = await self._stubs[method](
                message,
                timeout=_channel.deadline(envelope.remaining_s),
                metadata=self._options.headers(),
            )
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise _channel.closed(self.target) from error
            raise
        except grpc.RpcError as error:
            if self._closed:  # by another task, in mid-call
                raise _channel.closed(self.target) from error
            took_s = time.monotonic() - began
            raise translate(error, envelope, self.target, self._options, took_s) from error
        except grpc.aio.UsageError as error:  # grpc's word for a channel closed meanwhile
            raise _channel.closed(self.target) from error
        return decode(envelope, response, self.target)

    async def close_async(self) -> None:
        """Close the channel."""
        self._closed = True
        if self._channel is not None and asyncio.get_running_loop() is self._loop:
            await self._channel.close()

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        options = self._options
        arguments, compression = _channel.arguments(options), _channel.compression(options)
        credentials = _channel.credentials(options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(
                self._address, arguments, compression, self._interceptors
            )
        else:
            self._channel = grpc.aio.secure_channel(
                self._address, credentials, arguments, compression, self._interceptors
            )
        self._stubs = stubs(self._channel)
