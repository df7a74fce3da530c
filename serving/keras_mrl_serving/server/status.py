"""An answer that is an error, and how TensorFlow Serving carries it over gRPC."""

from typing import Any

import grpc
from google.protobuf import text_format

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_MAX_MESSAGE_BYTES = 1024


class StatusError(Exception):
    """A request, or a load, that failed with a code and a text of TensorFlow Serving.

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


def from_number(number: int, message: str) -> StatusError:
    """The error of a TensorFlow exception, which knows its code by number."""
    return StatusError(_CODES[number], message)


def truncated(message: str) -> str:
    """The text as it goes over gRPC, in a small header: TensorFlow Serving keeps 1024 bytes."""
    data = message.encode()
    if len(data) <= _MAX_MESSAGE_BYTES:
        return message
    return data[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "...TRUNCATED"


# The text protos that TensorFlow Serving's flags name, read from their files.


def read_text_proto(path: str, message: Any, flag: str, example: str) -> Any:
    """The message of a file.

    Args:
        path: file with the text of the proto.
        message: an empty message, which is filled.
        flag: the flag that names the file, for errors.
        example: what such a text looks like, for errors.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such text.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return text_format.Parse(file.read(), message)
    except OSError as error:
        raise OSError(
            f"{flag} must be a file that can be read. Received: {flag}={path!r} "
            f"({error.strerror}). Correct the path."
        ) from error
    except (UnicodeDecodeError, text_format.ParseError) as error:
        raise ValueError(
            f"{flag} must be a text proto of {message.DESCRIPTOR.full_name}. Received: "
            f"{flag}={path!r}, {str(error).rstrip('.')}. Correct the file: {example}."
        ) from error
