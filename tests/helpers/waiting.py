"""Waiting for what other threads and processes bring about."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], expectation: str = "the condition") -> None:
    """Return once the condition holds; after two minutes it is taken for lost."""
    give_up = time.monotonic() + 120
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{expectation} did not come about: {condition()!r}")
        time.sleep(0.002)
