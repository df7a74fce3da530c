"""One comparison that many tests read."""

import fcntl
import os

import pytest

from tests.helpers.comparisons import Compared, compare_digits, load_comparison


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Made by the first of pytest's processes that needs it; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compared"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "lines.json").exists():
            compare_digits(folder)
    return load_comparison(folder)
