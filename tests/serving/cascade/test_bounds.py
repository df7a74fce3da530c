"""Bounds beside what they bound, counted over every outcome."""

import math

import numpy as np
import pytest

from keras_mrl_serving.cascade.bounds import (
    chance_of_so_few,
    chance_of_such_a_drop,
    least_rows,
    most_likely_share,
    share_interval,
)


@pytest.mark.parametrize(("errors", "size", "risk"), [(0, 10, 0.1), (3, 40, 0.2), (40, 40, 0.3)])
def test_the_tail_is_the_sum_of_its_terms(errors: int, size: int, risk: float) -> None:
    terms = [math.comb(size, k) * risk**k * (1 - risk) ** (size - k) for k in range(errors + 1)]
    assert chance_of_so_few(errors, size, risk) == pytest.approx(sum(terms))


@pytest.mark.parametrize(("risk", "delta"), [(0.01, 0.05), (0.2, 0.5), (0.001, 0.001)])
def test_the_least_rows_are_the_least(risk: float, delta: float) -> None:
    least = least_rows(risk, delta)
    assert chance_of_so_few(0, least, risk) <= delta < chance_of_so_few(0, least - 1, risk)


def trinomial(errors: int, gains: int, size: int, harmed: float, gained: float) -> float:
    ways = math.comb(size, errors) * math.comb(size - errors, gains)
    rest = 1 - harmed - gained
    return float(ways * harmed**errors * gained**gains * rest ** (size - errors - gains))


@pytest.mark.parametrize(("size", "drop", "delta"), [(40, 0.1, 0.05), (25, 0.2, 0.1)])
def test_a_drop_that_is_there_is_missed_in_at_most_delta_of_all_outcomes(
    size: int, drop: float, delta: float
) -> None:
    """Every outcome of a drop just as large, whatever the chance of a gain is."""
    passing: list[tuple[int, int]] = []
    for gains in range(size + 1):
        for errors in range(size + 1 - gains):  # fewer errors are more likely to pass
            if chance_of_such_a_drop(errors, gains, size, drop, delta / 100) > delta:
                break
            passing.append((errors, gains))
    assert len(passing) > size
    assert (0, 2) in passing
    for gained in np.linspace(1e-4, (1 - drop) / 2 - 1e-4, 60).tolist():
        for more in (0.0, 0.02):  # a larger drop is missed more rarely
            harmed = gained + drop + more
            if harmed + gained < 1:
                chance = sum(trinomial(e, g, size, harmed, gained) for e, g in passing)
                assert chance <= delta


@pytest.mark.parametrize(("errors", "gains", "size", "drop"), [(1, 0, 60, 0.1), (3, 2, 90, 0.08)])
def test_the_chance_of_a_drop_is_little_above_the_worst(
    errors: int, gains: int, size: int, drop: float
) -> None:
    def statistic(e: int, g: int) -> float:
        return (e - g - size * drop) / math.sqrt(max(e + g, size * drop))

    limit = statistic(errors, gains)
    passing = [
        (e, g)
        for e in range(size + 1)
        for g in range(size + 1 - e)
        if statistic(e, g) <= limit + 1e-12
    ]
    low, high = share_interval(gains, size, 5e-4)
    worst = max(
        sum(trinomial(e, g, size, share + drop, share) for e, g in passing)
        for share in np.linspace(low, high, 150).tolist()
    )
    chance = chance_of_such_a_drop(errors, gains, size, drop) - 5e-4
    assert worst - 1e-5 <= chance <= 1.1 * worst + 1e-4


def test_more_errors_and_fewer_gains_make_a_drop_likelier() -> None:
    chances = [chance_of_such_a_drop(errors, 3, 800, 0.01) for errors in range(0, 12, 2)]
    assert chances == sorted(chances)
    assert chances[0] < 0.01 < 0.4 < chances[-1]
    chances = [chance_of_such_a_drop(6, gains, 800, 0.01) for gains in range(0, 9, 2)]
    assert chances == sorted(chances, reverse=True)
    assert chance_of_such_a_drop(800, 0, 800, 0.01) == 1


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.37, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_an_interval_holds_the_share_in_all_but_delta_of_the_outcomes(
    share: float, delta: float
) -> None:
    size = 60
    covered = 0.0
    for count in range(size + 1):
        low, high = share_interval(count, size, delta)
        assert low <= count / size <= high
        if low <= share <= high:
            covered += math.comb(size, count) * share**count * (1 - share) ** (size - count)
    assert covered >= 1 - delta


def test_an_upper_bound_leaves_delta() -> None:
    for count, size, delta in ((0, 10, 0.05), (3, 40, 0.1), (299, 300, 0.01)):
        bound = most_likely_share(count, size, delta)
        assert chance_of_so_few(count, size, bound) == pytest.approx(delta, rel=1e-4)
    assert most_likely_share(10, 10, 0.05) == 1
