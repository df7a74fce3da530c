import numpy as np
import pytest

from keras_mrl.evaluation.neighbors import first_equal

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dim", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("values", [2, 3, 1000])
def test_the_first_of_equal_rows_is_found(dim: int, values: int) -> None:
    """Sparse rows, many alike at a glance, some of them equal to the end."""
    few = RNG.integers(0, values, (100, 40)) * (RNG.random((100, 40)) < 0.1)
    rows = few[RNG.integers(0, 100, 300)].astype(float)
    rows[rows == 0] *= np.where(RNG.random((rows == 0).sum()) < 0.5, -1, 1)  # zeros of both signs
    seen: dict[tuple[float, ...], int] = {}
    expected = [seen.setdefault(tuple(row[:dim] + 0.0), i) for i, row in enumerate(rows)]
    assert first_equal(rows.astype(np.float32), dim).tolist() == expected
    assert first_equal(rows.astype(np.float64), dim).tolist() == expected


def test_rows_that_all_differ_are_each_their_own() -> None:
    rows = RNG.normal(size=(20_000, 24)).astype(np.float32)
    assert first_equal(rows, 24).tolist() == list(range(20_000))
