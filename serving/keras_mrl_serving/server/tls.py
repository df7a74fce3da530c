"""TLS on the gRPC port, from the file that TensorFlow Serving takes as --ssl_config_file."""

import re
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

_REMEDY = "Correct the file: server_key, server_cert and custom_ca hold PEM text."
# C++ reads a quoted string over several lines, as people paste PEM; Python wants them escaped.
_COMMENT_OR_STRING = re.compile(r"""#[^\n]*|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)


def server_credentials(path: str) -> grpc.ServerCredentials:
    """The credentials of a server.

    Args:
        path: file with a text proto of `tensorflow.serving.SSLConfig`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such text, or its key and certificates cannot be used.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise OSError(
            f"ssl_config_file must be a file that can be read. Received: ssl_config_file={path!r} "
            f"({error.strerror}). Correct the path."
        ) from error
    except UnicodeDecodeError as error:
        raise _unusable(path, "it is no UTF-8 text") from error
    try:
        config = text_format.Parse(_COMMENT_OR_STRING.sub(_on_one_line, text), _ssl_config())
    except text_format.ParseError as error:
        raise _unusable(path, str(error).rstrip(".")) from error
    _check_pem(path, config)
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        config.custom_ca.encode() or None,
        config.client_verify,
    )


def _ssl_config() -> Any:
    """An empty SSLConfig; `tensorflow-serving-api` ships without this one message."""
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_mrl_serving/ssl_config.proto", package="tensorflow.serving", syntax="proto3"
    )
    message = file.message_type.add(name="SSLConfig")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name in ("server_key", "server_cert", "custom_ca"):
        message.field.add(name=name, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    message.field.add(name="client_verify", type=kinds.TYPE_BOOL, label=kinds.LABEL_OPTIONAL)
    for number, field in enumerate(message.field, start=1):
        field.number = number
    pool = descriptor_pool.DescriptorPool()  # its own, lest the package ships it one day
    pool.Add(file)
    found = pool.FindMessageTypeByName("tensorflow.serving.SSLConfig")
    return message_factory.GetMessageClass(found)()


def _on_one_line(match: re.Match[str]) -> str:
    found = match[0]
    return found if found.startswith("#") else found.replace("\r", "").replace("\n", "\\n")


def _check_pem(path: str, config: Any) -> None:
    """Tries key and certificates out: gRPC says of bad ones only that it cannot bind the port."""
    if config.client_verify and not config.custom_ca:
        raise _unusable(path, "client_verify without a custom_ca to verify clients with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with _in_file(config.server_cert) as certificate, _in_file(config.server_key) as key:
            context.load_cert_chain(
                certificate, key, password=""
            )  # an encrypted key fails, unasked
    except (ssl.SSLError, ValueError) as error:
        reason = f"server_key and server_cert are no PEM pair: {error}"
        raise _unusable(path, reason) from error
    try:
        if config.custom_ca:
            context.load_verify_locations(cadata=config.custom_ca)
    except (ssl.SSLError, ValueError) as error:
        raise _unusable(path, f"custom_ca is no PEM certificate: {error}") from error


@contextmanager
def _in_file(text: str) -> Iterator[str]:
    """The path of a file, which only its owner reads, for as long as the context lasts."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(text)
        file.flush()
        yield file.name


def _unusable(path: str, reason: str) -> ValueError:
    return ValueError(
        "ssl_config_file must be a text proto of tensorflow.serving.SSLConfig. "
        f"Received: ssl_config_file={path!r}, {reason}. {_REMEDY}"
    )
