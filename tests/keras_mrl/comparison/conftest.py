"""One comparison that many tests read."""

import pytest

from tests.helpers.comparisons import Compared, compare_digits


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return compare_digits(tmp_path_factory.mktemp("compared"))
