"""The settings of a client: timeouts, retries, sizes, certificates, metadata."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InvalidInputError
from .integers import as_int, is_positive_integer

if TYPE_CHECKING:
    import grpc

    from .observer import Observer

LARGEST_ANSWER_BYTES = 2**28  # unless the options say otherwise
_LARGEST_COUNT = 2**31 - 1  # gRPC's limit for its settings
_MOST_ATTEMPTS = 5
_METADATA_NAME = re.compile(r"(?!.*-bin$)[a-z0-9_.-]+")
_METADATA_VALUE = re.compile(r"[ -~]*")


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Certificates, each as the bytes of a PEM file.

    Args:
        root_certificates: Authorities that may sign the server's certificate; None takes gRPC's.
        private_key: Private key of the client, if the server asks for a certificate (mTLS).
        certificate_chain: Certificates of the client, if the server asks for them (mTLS).
        server_name: Name in the server's certificate, if it is not the target's.

    Raises:
        ValueError: If there is a key without a certificate, or the other way round, or if what
            was given is no PEM of certificates, or of a private key without a password.

    Examples:
        >>> Tls(server_name="models.example.com").server_name
        'models.example.com'
    """

    root_certificates: bytes | None = field(default=None, repr=False)
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Refuse half of a client's certificate."""
        if (self.private_key is None) != (self.certificate_chain is None):
            only = "private_key" if self.certificate_chain is None else "certificate_chain"
            raise ValueError(
                "A client proves who it is with private_key and certificate_chain together. "
                f"Received: {only} alone. Give both, or neither."
            )
        _check_certificates("root_certificates", self.root_certificates)
        _check_certificates("certificate_chain", self.certificate_chain)
        key = self.private_key
        if key is not None and (not _PRIVATE_KEY.search(key) or b"ENCRYPTED" in key):
            raise _pem_error("private_key", "a private key without a password", key)

    @classmethod
    def from_files(
        cls,
        root_certificates: str | os.PathLike[str] | None = None,
        private_key: str | os.PathLike[str] | None = None,
        certificate_chain: str | os.PathLike[str] | None = None,
        server_name: str | None = None,
    ) -> Tls:
        """Read the certificates from PEM files.

        Raises:
            OSError: If a file does not read.
            ValueError: As for `Tls`; or if the key is not that of the certificate.
        """
        files = (root_certificates, private_key, certificate_chain)
        roots, key, chain = (None if f is None else Path(f).read_bytes() for f in files)
        tls = cls(
            root_certificates=roots,
            private_key=key,
            certificate_chain=chain,
            server_name=server_name,
        )
        if private_key is not None and certificate_chain is not None:
            try:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.set_ciphers("ALL:@SECLEVEL=0")  # how strong a key must be, gRPC decides
                context.load_cert_chain(certificate_chain, private_key, password=b"")
            except ssl.SSLError as error:
                raise ValueError(
                    "private_key must be the key of the first certificate of certificate_chain. "
                    f"Received: {os.fspath(private_key)} and {os.fspath(certificate_chain)} "
                    f"({error.reason or 'they do not read'}). Give the two of one client."
                ) from None
        return tls


def _check_certificates(name: str, pem: bytes | None) -> None:
    """Raise a `ValueError` unless this is a PEM of certificates; nothing of it is repeated."""
    if pem is None:
        return
    blocks = _CERTIFICATE.findall(pem)
    try:
        ssl.create_default_context(cadata=b"\n".join(blocks).decode("ascii"))
        is_one = bool(blocks)
    except (ssl.SSLError, ValueError):
        is_one = False
    if not is_one:
        raise _pem_error(name, "whole certificates", pem)


def _pem_error(name: str, rule: str, pem: bytes) -> ValueError:
    labels = [label.decode("ascii") for label in _PEM_LABEL.findall(pem)]
    kind = f"with {', '.join(sorted(set(labels)))}" if labels else "that are no PEM"
    return ValueError(
        f"{name} must be {rule} in PEM. Received: {len(pem)} bytes {kind}. "
        "Give the contents of the right file."
    )


_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_PRIVATE_KEY = re.compile(rb"-----BEGIN ([A-Z]+ )?PRIVATE KEY-----")
_PEM_LABEL = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a client.

    Args:
        timeout_s: Seconds an answer may take: connection, retries and all of its calls together.
            If the rows are split, each part has its own timeout.
        max_attempts: How often a call is sent at most, 1 to 5. Only UNAVAILABLE is tried again:
            the client did not reach the server, or the server's queue is full.
        first_backoff_s: Seconds before the second attempt, give or take a fifth; each later wait
            is twice as long.
        max_backoff_s: The longest wait between two attempts, give or take a fifth.
        max_batch_size: Rows of one call; more are split. None means no limit. (TensorFlow
            Serving with batching refuses more than its own `max_batch_size`, by default 1000.)
        max_message_bytes: Largest message sent or received, decompressed; rows are split to stay
            below it. None sends up to protobuf's 2 GiB and takes answers of up to 256 MiB, since
            an answer needs three times its size in memory while it arrives. (gRPC's own default,
            4 MiB, is just too small for 1024 embeddings of 1024 float32.)
        max_in_flight: Calls under way at once, if rows are split.
        tls: Certificates; None talks in the clear.
        metadata: Headers of every call, such as `{"authorization": "Bearer ..."}`, or a function
            that returns them for each call. Names are in lower case.
        proxy: Whether a proxy is asked that the environment names: `grpc_proxy`, `https_proxy` or
            `http_proxy`, in lower case, unless `no_proxy` names the target. Loopback and lists of
            targets are asked without one.
        compress: Whether requests are compressed with gzip.
        keepalive_s: Seconds between keepalive pings, at least 1; None sends none. TensorFlow
            Serving hangs up on clients that ping, unless it was started with
            `--grpc_channel_arguments=grpc.keepalive_permit_without_calls=1,`
            `grpc.http2.min_ping_interval_without_data_ms=10000` (here for every 10 s).
        interceptors: The user's own gRPC interceptors, such as those of OpenTelemetry: of
            `grpc` for a `Client`, of `grpc.aio` for an `AsyncClient`.
        observer: Is told of every call and of every adaptive answer, in the thread of the call:
            `OpenTelemetryMetrics()`, or an `observer.Observer` of your own.

    Raises:
        ValueError: If a setting is one under which no call could succeed.

    Examples:
        >>> Options(timeout_s=2.5).max_attempts
        5
    """

    timeout_s: float = 10.0
    max_attempts: int = _MOST_ATTEMPTS
    first_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    max_batch_size: int | None = 1000
    max_message_bytes: int | None = None
    max_in_flight: int = 4
    tls: Tls | None = None
    metadata: Mapping[str, str] | Callable[[], Mapping[str, str]] = field(
        default_factory=dict, repr=False
    )
    proxy: bool = True
    compress: bool = False
    keepalive_s: float | None = None
    interceptors: tuple[grpc.UnaryUnaryClientInterceptor | grpc.aio.ClientInterceptor, ...] = ()
    observer: Observer | None = None

    def __post_init__(self) -> None:
        """Refuse settings under which no call could succeed."""
        for name in ("timeout_s", "first_backoff_s", "max_backoff_s"):
            self._check_seconds(name)
        if self.keepalive_s is not None:
            self._check_seconds("keepalive_s")
        if not callable(self.metadata):
            self.headers()
        if self.tls is not None and not isinstance(self.tls, Tls):
            raise ValueError(
                f"tls must be a Tls, or None. Received: {type(self.tls).__name__}. "
                "Read one with Tls.from_files."
            )
        if not isinstance(self.proxy, bool):
            raise ValueError(
                f"proxy must be True or False. Received: {type(self.proxy).__name__}. "
                "Name a proxy in the environment variable http_proxy."
            )
        self._check_count("max_attempts", _MOST_ATTEMPTS)
        self._check_count("max_in_flight", _LARGEST_COUNT)
        for name in ("max_batch_size", "max_message_bytes"):
            if getattr(self, name) is not None:
                self._check_count(name, _LARGEST_COUNT, ", or None for no limit", "None")

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of one call as gRPC takes it.

        Raises:
            InvalidInputError: If gRPC cannot send this metadata.

        Examples:
            >>> Options(metadata={"authorization": "Bearer 5e1f"}).headers()
            (('authorization', 'Bearer 5e1f'),)
        """
        metadata = self.metadata() if callable(self.metadata) else self.metadata
        if not isinstance(metadata, Mapping):
            raise InvalidInputError(
                "metadata must be a mapping, or a function that returns one. "
                f"Received: {type(metadata).__name__}. Give for example {{'authorization': '...'}}."
            )
        for name, value in metadata.items():
            if not (
                isinstance(name, str)
                and isinstance(value, str)
                and _METADATA_NAME.fullmatch(name)
                and _METADATA_VALUE.fullmatch(value)
            ):
                raise InvalidInputError(
                    "Metadata is text in ASCII, under names of a-z, 0-9, '-', '_' and '.' that do "
                    f"not end in -bin. Received: the name {name!r}, with a "
                    f"{type(value).__name__} as value. Write the name in lower case, strip "
                    "line ends, and encode what is no text, for example with base64."
                )
        return tuple(metadata.items())

    def _check_seconds(self, name: str) -> None:
        seconds: object = getattr(self, name)
        if not isinstance(seconds, Real) or not isfinite(seconds) or seconds <= 0:
            raise ValueError(
                f"{name} must be a positive number of seconds. "
                f"Received: {name}={seconds!r}. Give for example {name}=10.0."
            )

    def _check_count(self, name: str, largest: int, none: str = "", remedy: str = "") -> None:
        value: object = getattr(self, name)
        if not is_positive_integer(value) or as_int(value) > largest:
            default = remedy or str(getattr(type(self), name))
            raise ValueError(
                f"{name} must be in 1..{largest}{none}. Received: {name}={value!r}. Give {default}."
            )
