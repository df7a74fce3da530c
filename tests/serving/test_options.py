"""Settings under which no call could succeed are refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from keras_mrl_serving.errors import InvalidInputError
from keras_mrl_serving.options import Options, Tls

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

CA = trustme.CA()
CLIENT = CA.issue_cert("client@example.org")
ROOTS, KEY = CA.cert_pem.bytes(), CLIENT.private_key_pem.bytes()
CHAIN = CLIENT.cert_chain_pems[0].bytes()


def test_the_defaults() -> None:
    assert Options() == Options(timeout_s=10.0, max_message_bytes=None)
    with pytest.raises(FrozenInstanceError):
        Options().timeout_s = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("timeout_s", value) for value in (1, 0.001, np.float32(2.5), np.int64(3), 1e300)],
        *[("max_message_bytes", value) for value in (1, 2**31 - 1, np.int64(4), None)],
        *[("max_batch_size", None), ("keepalive_s", None), ("max_attempts", 5)],
    ],
)
def test_settings_are_kept_as_they_are(name: str, value: Any) -> None:
    assert getattr(Options(**{name: value}), name) == value


SECONDS = "a positive number of seconds"
ANY_SIZE = "in 1..2147483647, or None for no limit"


@pytest.mark.parametrize(
    ("name", "values", "rule", "remedy"),
    [
        (
            "timeout_s",
            [0, 0.0, -1, float("nan"), float("inf"), -float("inf"), "1", None, [1], 1j],
            *(SECONDS, "for example timeout_s=10.0"),
        ),
        ("max_backoff_s", [None], "a positive number of seconds", "for example max_backoff_s=10.0"),
        (
            "first_backoff_s",
            [0],
            "a positive number of seconds",
            "for example first_backoff_s=10.0",
        ),
        ("keepalive_s", [0], "a positive number of seconds", "for example keepalive_s=10.0"),
        ("max_message_bytes", [0, -1, 2**31, 1.5, 4e6, "1", True, [1]], ANY_SIZE, "None"),
        ("max_batch_size", [0], ANY_SIZE, "None"),
        ("max_attempts", [0, 6], "in 1..5", "5"),
        ("max_in_flight", [0], "in 1..2147483647", "4"),
    ],
)
def test_settings_under_which_no_call_could_succeed_are_refused(
    name: str, values: list[Any], rule: str, remedy: str, refuses: Refuses
) -> None:
    for value in values:
        text = f"{name} must be {rule}. Received: {name}={value!r}. Give {remedy}."
        with refuses(ValueError, text):
            Options(**{name: value})


@pytest.mark.parametrize("value", [None, 0, "http://birds:5e1f@proxy.example.org:3128"])
def test_a_proxy_is_named_in_the_environment(value: Any, refuses: Refuses) -> None:
    text = (
        f"proxy must be True or False. Received: {type(value).__name__}. "
        "Name a proxy in the environment variable http_proxy."
    )
    with refuses(ValueError, text):
        Options(proxy=value)


def test_secrets_are_not_printed() -> None:
    options = Options(
        metadata={"authorization": "Bearer secret"},
        tls=Tls(private_key=KEY, certificate_chain=CHAIN, root_certificates=ROOTS),
    )
    assert "secret" not in repr(options)
    assert "BEGIN" not in repr(options)
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
    (tmp_path / "chain.pem").write_bytes(CHAIN)
    with refuses(ValueError, text.format("certificate_chain")):
        Tls.from_files(certificate_chain=tmp_path / "chain.pem")
    assert Tls.from_files(tmp_path / "chain.pem").root_certificates == CHAIN


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"root_certificates": KEY},
            f"root_certificates must be whole certificates in PEM. Received: {len(KEY)} bytes with "
            "EC PRIVATE KEY. Give the contents of the right file.",
        ),
        (
            {"private_key": CHAIN, "certificate_chain": KEY},
            f"certificate_chain must be whole certificates in PEM. Received: {len(KEY)} bytes with "
            "EC PRIVATE KEY. Give the contents of the right file.",
        ),
        (
            {"private_key": ROOTS, "certificate_chain": CHAIN},
            "private_key must be a private key without a password in PEM. "
            f"Received: {len(ROOTS)} bytes with CERTIFICATE. Give the contents of the right file.",
        ),
        (
            {"root_certificates": b"secret"},
            "root_certificates must be whole certificates in PEM. Received: 6 bytes that are no "
            "PEM. Give the contents of the right file.",
        ),
        (
            {"root_certificates": ROOTS[:100] + ROOTS[120:]},
            f"root_certificates must be whole certificates in PEM. Received: {len(ROOTS) - 20} "
            "bytes with CERTIFICATE. Give the contents of the right file.",
        ),
    ],
)
def test_what_is_no_certificate_is_refused_unrepeated(
    settings: Any, text: str, refuses: Refuses
) -> None:
    with refuses(ValueError, text):
        Tls(**settings)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    key.write_bytes(KEY)
    chain.write_bytes(CA.issue_cert("other@example.org").cert_chain_pems[0].bytes())
    text = (
        "private_key must be the key of the first certificate of certificate_chain. "
        f"Received: {key} and {chain} (KEY_VALUES_MISMATCH). Give the two of one client."
    )
    with refuses(ValueError, text):
        Tls.from_files(None, key, chain)
    chain.write_bytes(CHAIN)
    assert Tls.from_files(None, key, chain).private_key == KEY
