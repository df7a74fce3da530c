"""Waiting for what other threads and processes bring about."""

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object], expectation: str = "the condition", timeout_s: float = 120
) -> None:
    """Return once the condition holds; after so long it is taken for lost."""
    give_up = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{expectation} did not come about: {condition()!r}")
        time.sleep(0.002)
