"""How a client talks to its server."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from numbers import Real

from .contract import as_int

_MOST_BYTES = 2**31 - 1  # gRPC's own limit of the setting


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a `Client`.

    Args:
        timeout_s: Seconds one call may take, connection included.
        max_message_bytes: Largest message sent or received; None means no limit. (gRPC's own
            default, 4 MiB, is just too small for 1024 embeddings of 1024 float32.)

    Raises:
        ValueError: If a setting is no positive number.

    Examples:
        >>> Options(timeout_s=2.5)
        Options(timeout_s=2.5, max_message_bytes=None)
    """

    timeout_s: float = 10.0
    max_message_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings under which no call could succeed."""
        seconds: object = self.timeout_s
        if not isinstance(seconds, Real) or not isfinite(seconds) or seconds <= 0:
            raise ValueError(
                "timeout_s must be a positive number of seconds. "
                f"Received: timeout_s={self.timeout_s!r}. Give for example timeout_s=10.0."
            )
        try:
            most = 1 if self.max_message_bytes is None else as_int(self.max_message_bytes)
        except TypeError:
            most = 0
        if not 0 < most <= _MOST_BYTES:
            raise ValueError(
                f"max_message_bytes must be in 1..{_MOST_BYTES}, or None for no limit. "
                f"Received: max_message_bytes={self.max_message_bytes!r}. Give None."
            )
