"""How a client talks to its server."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a `Client`.

    Args:
        timeout_s: Seconds one call may take, connection included.
        max_message_bytes: Largest message sent or received; None means no limit. (gRPC's own
            default, 4 MiB, is just too small for 1024 embeddings of 1024 float32.)

    Raises:
        ValueError: If a setting is not positive.
    """

    timeout_s: float = 10.0
    max_message_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings under which no call could succeed."""
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise ValueError(
                "timeout_s must be a positive number of seconds. "
                f"Received: timeout_s={self.timeout_s!r}. Give for example timeout_s=10.0."
            )
        if self.max_message_bytes is not None and self.max_message_bytes <= 0:
            raise ValueError(
                "max_message_bytes must be positive, or None for no limit. "
                f"Received: max_message_bytes={self.max_message_bytes!r}. Give None."
            )
