"""Mapped rows that were read once are given back, and come again for whoever asks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from keras_mrl_export.parity import forget

ROWS = np.arange(4_000_000, dtype=np.float32).reshape(-1, 4)


def mapped_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssFile"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", ROWS)
    return tmp_path / "rows.npy"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is in memory")
def test_what_was_read_leaves_the_memory_and_comes_back(file: Path) -> None:
    rows = np.load(file, mmap_mode="r")
    before = mapped_kib()
    assert rows.sum() == ROWS.sum()
    read = mapped_kib()
    forget(rows[:, 1:])  # a view is of the same file
    assert read - before > 15_000
    assert mapped_kib() - before < 1_000
    np.testing.assert_array_equal(rows, ROWS)


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_what_was_written_is_never_lost(file: Path, mode: str) -> None:
    rows = np.load(file, mmap_mode=mode)  # type: ignore[arg-type]
    rows[3] = -1
    forget(rows)
    assert rows[3].tolist() == [-1, -1, -1, -1]


def test_an_array_in_memory_is_left_as_it_is() -> None:
    rows = ROWS.copy()
    forget(rows)
    np.testing.assert_array_equal(rows, ROWS)
