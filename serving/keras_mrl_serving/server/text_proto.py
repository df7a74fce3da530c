"""Text protos: the files that flags of TensorFlow Serving name, and messages its package lacks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)

from ..untrusted import UntrustedFileError, read_bytes

_FILE_BYTES = 2**26
_TAB = 8
_BYTE_ORDER_MARK = "\ufeff"
_BAD_ESCAPE = "Invalid escape sequence in string literal."
_ESCAPE = re.compile(r"\\(?:[abfnrtv?\\'\"0-7]|[xX][0-9a-fA-F]|u|U|(.))", re.DOTALL)
_BLANK = re.compile(r"(?:[ \t\r\n\v\f]|#[^\n]*)*")
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_TOKEN = re.compile(
    r"""[0-9][\w.]*|\w+|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|.|""", re.DOTALL | re.ASCII
)
# What Python's parser says, what the C++ parser says instead, and where: at the token that Python
# points at, after it, after the name of the field, or at the end of the text.
_REASONS = (
    (r'(Message type ".*" has no field named ".*"\.)', "{0}", "after"),
    (r'(Field ".*" is specified along with .* oneof "[^"]*")', "{0}.", "after"),
    (
        r'Message type .* should not have multiple "(.*)" fields',
        'Non-repeated field "{0}" is specified multiple times.',
        "after name",
    ),
    (
        r"Enum type .* has no value named (\w+)\.",
        'Unknown enumeration value of "{0}" for field "{field}".',
        "after",
    ),
    (r"Enum type", "Expected integer or identifier, got: {token}", "at"),
    (
        r'Expected "true" or "false"',
        'Invalid value for boolean field "{field}". Value: "{token}".',
        "after",
    ),
    (r'Expected "}"', "Expected identifier, got: ", "end"),
    (r'(Expected ".")\.', '{0}, found "{token}".', "at"),
    (r"Expected identifier or number", "Expected identifier, got: {token}", "at"),
    (r"Expected string but found", "Expected string, got: {token}", "at"),
    (r"Couldn't parse integer|Value out of range: -", "Expected integer, got: {token}", "at"),
    (r"Value out of range: (.*)", "Integer out of range ({0})", "at"),
    (r"Couldn't parse float", "Expected double, got: {token}", "at"),
    (r"String missing ending quote", "Unexpected end of string.", "end"),
)
# C++ reads a quoted string over several lines, as people paste PEM; Python wants them escaped.
_COMMENT_OR_STRING = re.compile(r"""#[^\n]*|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)


@dataclass(frozen=True)
class TextProtoFile:
    """The text proto that a flag names.

    Args:
        flag: the flag, for errors.
        path: the file.
        message: an empty message, which `read` fills.
        example: what such a file holds, for errors.
    """

    flag: str
    path: str
    message: Any
    example: str

    def read(self) -> Any:
        """Returns the message of the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no text proto of the message.
        """
        try:
            text = read_bytes(self.path, _FILE_BYTES).decode()
        except OSError as error:
            raise OSError(
                f"{self.flag} must be a file that can be read. Received: {self.flag}={self.path!r} "
                f"({error.strerror}). Correct the path."
            ) from error
        except UnicodeDecodeError as error:
            raise self.error("it is no UTF-8 text") from error
        except UntrustedFileError as error:
            raise self.error(str(error)) from error
        try:
            if (escape := _bad_escape(text)) is not None:
                raise self._parse_error(text, escape, _BAD_ESCAPE)
            return text_format.Parse(_COMMENT_OR_STRING.sub(_on_one_line, text), self.message)
        except text_format.ParseError as error:
            raise self._parse_error(text, *_reason_of_cpp(error, text)) from error

    def _parse_error(self, text: str, offset: int, reason: str) -> ValueError:
        """The error of a text that does not parse, in the words that TensorFlow Serving logs."""
        before = text[:offset]
        line = before.rpartition("\n")[2].encode().expandtabs(_TAB)
        place = f"{before.count(chr(10)) + 1}:{len(line) + 1}"
        if text.startswith(_BYTE_ORDER_MARK):
            reason = f"{reason} It begins with a byte order mark: save it without"
        return self.error(
            f"Error parsing text-format {self.message.DESCRIPTOR.full_name}: {place}: {reason}"
        )

    def error(self, reason: str) -> ValueError:
        """The error of a file that can be read but not used."""
        return ValueError(
            f"{self.flag} must be a text proto of {self.message.DESCRIPTOR.full_name}. Received: "
            f"{self.flag}={self.path!r}, {reason.rstrip('.')}. Correct the file: {self.example}."
        )


def empty_message(name: str, fields: Mapping[str, str]) -> Any:
    """An empty message of a type that `tensorflow-serving-api` ships without.

    Args:
        name: its name within `tensorflow.serving`.
        fields: the type of each field in the words of a .proto file.
    """
    file = descriptor_pb2.FileDescriptorProto(
        name=f"keras_mrl_serving/{name}.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    message = file.message_type.add(name=name)
    # The fields are read from text alone, so their numbers are free.
    for number, (field_name, declaration) in enumerate(fields.items(), start=1):
        repeated, _, kind = declaration.rpartition(" ")
        label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
        field = message.field.add(name=field_name, number=number, label=label)
        if "." in kind:
            field.type, field.type_name = kinds.TYPE_MESSAGE, f".{kind}"
        else:
            field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()  # its own, lest the package ships the message one day
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName(f"tensorflow.serving.{name}")
    )()


def _on_one_line(match: re.Match[str]) -> str:
    text = match[0]
    return text if text.startswith("#") else text.replace("\r", "").replace("\n", "\\n")


def _bad_escape(text: str) -> int | None:
    """Where a string has a backslash that C++ does not take, and Python does: in a Windows path."""
    for match in _COMMENT_OR_STRING.finditer(text):
        if not match[0].startswith("#"):
            for escape in _ESCAPE.finditer(text, match.start(), match.end()):
                if escape[1]:
                    return escape.start(1)
    return None


def _reason_of_cpp(error: text_format.ParseError, text: str) -> tuple[int, str]:
    """Where a text does not parse and why, in the words of the C++ parser."""
    place = _original_offset(text, error.GetLine() or 1, error.GetColumn() or 1)
    token, field = _token(text, place), (_WORD.findall(text, 0, place) or [""])[-1]
    message = re.sub(r"^[0-9: ]*(?:'.*': )?", "", str(error), flags=re.DOTALL)
    reason, where = f"{message.rstrip('.')}.", "at"
    for python, cpp, cpp_where in _REASONS:
        if match := re.match(python, message, re.DOTALL):
            reason, where = cpp.format(*match.groups(), token=token, field=field), cpp_where
            break
    if where == "end":
        place = len(text)
    elif where == "after":
        place = _next_token(text, place + len(token))
    elif where == "after name":
        place = _next_token(text, text.rfind(field, 0, place) + len(field))
    if (code := ord(text[place : place + 1] or " ")) > 127:
        reason = f"Interpreting non ascii codepoint {chr(code).encode()[0]}."
    elif code < 32:
        reason = "Invalid control characters encountered in text."
    return place, reason


def _original_offset(text: str, line: int, column: int) -> int:
    """The place in a text of a place in what `_on_one_line` made of it."""
    changed = _COMMENT_OR_STRING.sub(_on_one_line, text)
    lines = changed.split("\n")
    offset = sum(len(before) + 1 for before in lines[: line - 1]) + column - 1
    growth = 0
    for match in _COMMENT_OR_STRING.finditer(text):
        if match.start() + growth >= offset:
            break
        growth += len(_on_one_line(match)) - len(match[0])
    return offset - growth


def _token(text: str, place: int) -> str:
    match = _TOKEN.match(text, place)
    return match[0] if match else ""


def _next_token(text: str, place: int) -> int:
    match = _BLANK.match(text, place)
    return match.end() if match else place
