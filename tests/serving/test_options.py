"""Settings under which no call could succeed are refused."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.options import Options

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
