"""Settings under which no call could succeed are refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import _transport
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.client import Client
from keras_mrl_serving.errors import InvalidInputError
from keras_mrl_serving.options import Options, Tls

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]


def test_the_defaults() -> None:
    assert Options() == Options(timeout_s=10.0, max_message_bytes=None)
    with pytest.raises(FrozenInstanceError):
        Options().timeout_s = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("timeout_s", [1, 0.001, np.float32(2.5), np.int64(3), 1e300])
def test_seconds_are_any_positive_number(timeout_s: float) -> None:
    assert Options(timeout_s=timeout_s).timeout_s == timeout_s


@pytest.mark.parametrize(
    "timeout_s", [0, 0.0, -1, float("nan"), float("inf"), -float("inf"), "1", None, [1], 1j]
)
def test_other_seconds_are_refused(timeout_s: Any, refuses: Refuses) -> None:
    text = (
        "timeout_s must be a positive number of seconds. "
        f"Received: timeout_s={timeout_s!r}. Give for example timeout_s=10.0."
    )
    with refuses(ValueError, text):
        Options(timeout_s=timeout_s)


@pytest.mark.parametrize("size", [1, 2**31 - 1, np.int64(4), None])
def test_bytes_are_any_positive_integer_that_grpc_takes(size: int | None) -> None:
    assert Options(max_message_bytes=size).max_message_bytes == size


@pytest.mark.parametrize("size", [0, -1, 2**31, 1.5, 4e6, "1", True, [1]])
def test_other_bytes_are_refused(size: Any, refuses: Refuses) -> None:
    text = (
        "max_message_bytes must be in 1..2147483647, or None for no limit. "
        f"Received: max_message_bytes={size!r}. Give None."
    )
    with refuses(ValueError, text):
        Options(max_message_bytes=size)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("max_attempts", 6, "max_attempts must be in 1..5. Received: max_attempts=6. Give 5."),
        ("max_attempts", 0, "max_attempts must be in 1..5. Received: max_attempts=0. Give 5."),
        (
            *("max_in_flight", 0),
            "max_in_flight must be in 1..2147483647. Received: max_in_flight=0. Give 4.",
        ),
        (
            *("max_batch_size", 0),
            "max_batch_size must be in 1..2147483647, or None for no limit. "
            "Received: max_batch_size=0. Give None.",
        ),
        (
            *("keepalive_s", 0),
            "keepalive_s must be a positive number of seconds. "
            "Received: keepalive_s=0. Give for example keepalive_s=10.0.",
        ),
        (
            *("max_backoff_s", None),
            "max_backoff_s must be a positive number of seconds. "
            "Received: max_backoff_s=None. Give for example max_backoff_s=10.0.",
        ),
    ],
)
def test_settings_that_could_not_work_are_refused(
    name: str, value: Any, text: str, refuses: Refuses
) -> None:
    with refuses(ValueError, text):
        Options(**{name: value})


def test_secrets_are_not_printed() -> None:
    options = Options(
        metadata={"authorization": "Bearer secret"},
        tls=Tls(private_key=b"secret", certificate_chain=b"secret", root_certificates=b"secret"),
    )
    assert "secret" not in repr(options)
    assert options.headers() == (("authorization", "Bearer secret"),)


@pytest.mark.parametrize(
    ("metadata", "received"),
    [
        ({"Auth": "x"}, "the name 'Auth', with a str"),
        ({"auth": "é"}, "the name 'auth', with a str"),
        ({"auth": b"x"}, "the name 'auth', with a bytes"),
        ({"auth-bin": "x"}, "the name 'auth-bin', with a str"),
        ({1: "x"}, "the name 1, with a str"),
        ({"auth": "a\nb"}, "the name 'auth', with a str"),
    ],
)
def test_metadata_that_grpc_does_not_send_is_refused(
    metadata: Any, received: str, refuses: Refuses
) -> None:
    text = (
        "Metadata is text in ASCII, under names of a-z, 0-9, '-', '_' and '.' that do not end in "
        f"-bin. Received: {received} as value. Write the name in lower case, strip line ends, "
        "and encode what is no text, for example with base64."
    )
    with refuses(InvalidInputError, text):
        Options(metadata=metadata)
    later = Options(metadata=lambda: metadata)
    with refuses(InvalidInputError, text):
        later.headers()


def test_half_a_certificate_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    text = (
        "A client proves who it is with private_key and certificate_chain together. "
        "Received: {} alone. Give both, or neither."
    )
    with refuses(ValueError, text.format("private_key")):
        Tls(private_key=b"key")
    (tmp_path / "chain.pem").write_bytes(b"chain")
    with refuses(ValueError, text.format("certificate_chain")):
        Tls.from_files(certificate_chain=tmp_path / "chain.pem")
    assert Tls.from_files(tmp_path / "chain.pem").root_certificates == b"chain"


@pytest.mark.parametrize(
    ("targets", "address"),
    [
        ("localhost:8500", "localhost:8500"),
        ("dns:///models:8500", "dns:///models:8500"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        (["127.0.0.1:8500"], "127.0.0.1:8500"),
        (["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:1"], "ipv4:127.0.0.1:1,127.0.0.1:2"),
        (["[::1]:1", "[::1]:2"], "ipv6:[::1]:1,[::1]:2"),
    ],
)
def test_targets_are_one_address(targets: Any, address: str) -> None:
    assert _transport.channel_address(targets) == address


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (
            "localhost",
            "A target must be 'host:port'. Received: 'localhost'. Give the server's gRPC port, "
            "for example localhost:8500.",
        ),
        (
            ["127.0.0.1:1", "models:"],
            "A target must be 'host:port'. Received: 'models:'. Give the server's gRPC port, "
            "for example models:8500.",
        ),
        (
            "one:1,two:2",
            "A target is one address. Received: 'one:1,two:2'. "
            "Give several as a list: ['one:1', 'two:2'].",
        ),
        (
            None,
            "A target is 'host:port', a list of them, or a transport. Received: NoneType. "
            "Give for example 'localhost:8500'.",
        ),
        (
            [],
            "A client needs a target. Received: an empty list. Give for example 'localhost:8500'.",
        ),
    ],
)
def test_targets_nobody_could_reach_are_refused(targets: Any, text: str, refuses: Refuses) -> None:
    with refuses(ValueError, text):
        Client(targets)
    with refuses(ValueError, text):
        AsyncClient(targets)
