"""Requests that are no message of their method."""

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

_UNREADABLE = object()


class RefusesUnreadable(grpc.ServerInterceptor):
    """Refuses a request that cannot be read from within its handler.

    Left to it, gRPC's Python server refuses with the same code and text, and keeps the state of
    the call for ever: 15 KB for each.
    """

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call, with another reader where one message is answered by one."""
        handler: Any = continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler

        def read(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return _UNREADABLE

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            if request is _UNREADABLE:
                context.abort(grpc.StatusCode.INTERNAL, "Exception deserializing request!")
            return handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)
