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
            with open(self.path, encoding="utf-8") as file:
                text = file.read()
            return text_format.Parse(_COMMENT_OR_STRING.sub(_on_one_line, text), self.message)
        except OSError as error:
            raise OSError(
                f"{self.flag} must be a file that can be read. Received: {self.flag}={self.path!r} "
                f"({error.strerror}). Correct the path."
            ) from error
        except UnicodeDecodeError as error:
            raise self.error("it is no UTF-8 text") from error
        except text_format.ParseError as error:
            raise self.error(str(error)) from error

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
