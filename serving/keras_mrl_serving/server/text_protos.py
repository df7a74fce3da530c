"""The text protos that TensorFlow Serving's flags name, read from their files."""

from typing import Any

from google.protobuf import text_format


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
