"""Text protos of flags: multi-line strings, files that cannot be used, and messages of our own."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from google.protobuf import text_format, wrappers_pb2
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from keras_mrl_serving.server.text_proto import TextProtoFile, empty_message


def text_proto(path: Path) -> TextProtoFile:
    return TextProtoFile("some_file", str(path), wrappers_pb2.StringValue(), 'value: "a"')


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ('value: "a"  # it\'s "b"', "a"),
        ('value: "a\nb\r\nc"', "a\nb\nc"),
        ("value: 'a\n\"b'", 'a\n"b'),
        ('# "a\nvalue: "b"', "b"),
        ('value: "a\\\\"', "a\\"),
        ('value: "a" "b"', "ab"),
    ],
)
def test_strings_may_go_over_several_lines(tmp_path: Path, text: str, value: str) -> None:
    """As C++ reads them, which Python does not; in comments, quotes are nothing special."""
    file = tmp_path / "file"
    file.write_bytes(text.encode())
    assert text_proto(file).read().value == value


def reason(path: Path, text: bytes, message: Any) -> str:
    """What is wrong with a file, from the words on that TensorFlow Serving logs."""
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"^some_file must be a text proto of ") as caught:
        TextProtoFile("some_file", str(path), message, "a: 1").read()
    start = f"Received: some_file='{path}', "
    return str(caught.value).partition(start)[2].removesuffix(". Correct the file: a: 1.")


def test_a_file_that_is_no_text_proto(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("value: 1")
    with pytest.raises(ValueError, match="must be a text proto") as caught:
        text_proto(file).read()
    assert str(caught.value) == (
        "some_file must be a text proto of google.protobuf.StringValue. Received: "
        f"some_file='{file}', Error parsing text-format google.protobuf.StringValue: 1:8: Expected "
        'string, got: 1. Correct the file: value: "a".'
    )
    assert reason(file, b"\xff", wrappers_pb2.StringValue()) == "it is no UTF-8 text"


# What the C++ parser of TensorFlow says is in test_the_words_are_those_of_the_cpp_parser.
WRONG = (
    "model_config_list { confg {} }",
    "model_config_list {\n\t\tconfg {} }",
    'model_config_list { config { name: "gr\u00fcn" nam: "x" } }',
    'config { name: "m" base_path: "/m" }',
    'model_config_list { config { name "m" } }',
    "model_config_list { config { name: m } }",
    "model_config_list { config { name: } }",
    "model_config_list: 5",
    "model_config_list = {}",
    "model_config_list",
    "model_config_list {",
    'model_config_list {\n config {\n name: "a"\n',
    'model_config_list { config { name: "m" } # \u00fc\n',
    "model_config_list { } }",
    '{"model_config_list": 1}',
    '"x"',
    "\ufeffmodel_config_list {}",
    "m\u00f6del_config_list {}",
    'model_config_list { config { name: "m" \x01 } }',
    "model_config_list {\n config { model_type: FOO } }",
    'model_config_list { config { model_type: "TENSORFLOW" } }',
    'model_config_list { config { name: "a" name: "b" } }',
    "model_config_list {} model_config_list {}",
    "model_config_list {} custom_model_config {}",
    "model_config_list { config { model_version_policy { latest { num_versions: 1 } all {} } } }",
    'model_config_list { config { model_version_policy { latest { num_versions: "x" } } } }',
    "model_config_list { config { model_version_policy { latest { num_versions: -1 } } } }",
    "model_config_list { config { model_version_policy { specific { versions: 1.5 } } } }",
    "model_config_list { config { model_version_policy { latest { num_versions: 9999999999 } } } }",
    "model_config_list { config { logging_config { sampling_config { sampling_rate: a } } } }",
    'model_config_list { config [ { name: "a" } { name: "b" } ] }',
    r'model_config_list { config { name: "C:\models" } }',
    "model_config_list { /* C */ }",
)


@pytest.fixture
def cpp_reason(capfd: pytest.CaptureFixture[str]) -> Callable[[str, Any], str]:
    """The first line that the C++ parser logs of a text, from its words on."""

    def first_line(text: str, message: Any) -> str:
        files: dict[str, FileDescriptorProto] = {}
        add_file(message.DESCRIPTOR.file, files)
        descriptors = FileDescriptorSet(file=files.values()).SerializeToString()
        with pytest.raises(tf.errors.DataLossError):
            tf.io.decode_proto(
                text.encode(),
                message.DESCRIPTOR.full_name,
                [],
                [],
                descriptor_source=b"bytes://" + descriptors,
                message_format="text",
            )
        return re.search("Error parsing text-format .*", capfd.readouterr().err)[0].rstrip(".")  # type: ignore[index]

    return first_line


def add_file(file: FileDescriptor, files: dict[str, FileDescriptorProto]) -> None:
    if file.name not in files:
        for dependency in file.dependencies:
            add_file(dependency, files)
        files[file.name] = FileDescriptorProto()
        file.CopyToProto(files[file.name])


@pytest.mark.parametrize("text", WRONG)
def test_the_words_are_those_of_the_cpp_parser(
    tmp_path: Path, text: str, cpp_reason: Callable[[str, Any], str]
) -> None:
    said = reason(tmp_path / "file", text.encode(), ModelServerConfig())
    said = said.removesuffix(". It begins with a byte order mark: save it without")
    assert said == cpp_reason(text, ModelServerConfig())


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    assert reason(tmp_path / "file", b"\xef\xbb\xbfmodel_config_list {}", ModelServerConfig()) == (
        "Error parsing text-format tensorflow.serving.ModelServerConfig: 1:1: Interpreting non "
        "ascii codepoint 239. It begins with a byte order mark: save it without"
    )


def test_a_string_without_its_end(tmp_path: Path) -> None:
    """Which TensorFlow Serving reads to the end of the file; the parser of later ones does not."""
    text = b'value: "a\n# b'
    assert reason(tmp_path / "file", text, wrappers_pb2.StringValue()) == (
        "Error parsing text-format google.protobuf.StringValue: 2:4: Unexpected end of string"
    )


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("b: maybe c {}", "1:10", 'Invalid value for boolean field "b". Value: "maybe"'),
        ('a: "x\ny" d: 1', "2:5", 'Message type "tensorflow.serving.Ours" has no field named "d"'),
    ],
)
def test_reasons_in_messages_of_our_own(tmp_path: Path, text: str, place: str, words: str) -> None:
    message = empty_message("Ours", {"a": "string", "b": "bool", "c": "google.protobuf.BoolValue"})
    assert reason(tmp_path / "file", text.encode(), message) == (
        f"Error parsing text-format tensorflow.serving.Ours: {place}: {words}"
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(OSError, match="must be a file") as caught:
        text_proto(file).read()
    assert str(caught.value) == (
        f"some_file must be a file that can be read. Received: some_file='{file}' (No such file or "
        "directory). Correct the path."
    )


def test_a_message_of_our_own() -> None:
    fields = {"a": "string", "b": "repeated int64", "c": "google.protobuf.BoolValue"}
    message = text_format.Parse('a: "x" b: [1, 2] c { value: true }', empty_message("Ours", fields))
    assert message.DESCRIPTOR.full_name == "tensorflow.serving.Ours"
    assert (message.a, list(message.b), message.c.value) == ("x", [1, 2], True)
    assert not empty_message("Ours", fields).HasField("c")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(ValueError, match=r"file', a FIFO, not a regular file\. Correct the file:"):
        text_proto(tmp_path / "file").read()
