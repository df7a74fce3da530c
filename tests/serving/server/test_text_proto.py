"""Text protos of flags: multi-line strings, files that cannot be used, and messages of our own."""

from pathlib import Path

import pytest
from google.protobuf import text_format, wrappers_pb2

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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"value: 1", "1:8 : 'value: 1': Expected string but found: '1'"),
        (b"\xff", "it is no UTF-8 text"),
    ],
)
def test_a_file_that_is_no_text_proto(tmp_path: Path, data: bytes, reason: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="must be a text proto") as caught:
        text_proto(file).read()
    assert str(caught.value) == (
        "some_file must be a text proto of google.protobuf.StringValue. Received: "
        f"some_file='{file}', {reason}. Correct the file: value: \"a\"."
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
