"""Errors with a code and a text of TensorFlow Serving, and how they go over gRPC."""

import grpc

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_MAX_MESSAGE_BYTES = 1024
STOPPED = "The server was stopped before it answered."


class StatusError(Exception):
    """A request or a load that failed, with the code and the text TensorFlow Serving would send.

    Args:
        code: the gRPC status code.
        message: the text, uncut.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def number(self) -> int:
        """The code as TensorFlow's `error.Code`, whose numbers are gRPC's."""
        return int(self.code.value[0])


def invalid_argument(message: str) -> StatusError:
    """The error of most malformed requests."""
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, message)


def failed_precondition(message: str) -> StatusError:
    """The error of a request that the state of the server or of a batch forbids."""
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, message)


def unimplemented(message: str) -> StatusError:
    """The error of a request that this server does not answer."""
    return StatusError(grpc.StatusCode.UNIMPLEMENTED, message)


def stopped() -> StatusError:
    """The error of a request that the end of the server cuts off."""
    return StatusError(grpc.StatusCode.UNAVAILABLE, STOPPED)


def from_number(number: int, message: str) -> StatusError:
    """The error of a TensorFlow exception, which knows its code by number."""
    return StatusError(_CODES[number], message)


def truncated(message: str) -> str:
    """The text as it goes over gRPC, in a small header: TensorFlow Serving keeps 1024 bytes."""
    data = message.encode()
    if len(data) <= _MAX_MESSAGE_BYTES:
        return message
    return data[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "...TRUNCATED"
