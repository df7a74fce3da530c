"""Bounds that hold whatever the model is: of a share, and of a net loss of accuracy.

A row that the last stage has right and the cascade wrong is 0 or 1, so the number of these is
binomial and its tail exact. A net loss is 1, 0 or -1 for each row, and the chance of a gain is not
known. Of the bounds for such a sum, the bets of Waudby-Smith and Ramdas and that of Hoeffding and
Bentkus take 2.2 times the rows of a test that knew that chance, and 30 times where one row in 30
changes. So the exact tail of the two counts is taken, at the worst chance of a gain that the counts
leave possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@lru_cache(maxsize=8)
def _log_factorials(size: int) -> Floats:
    """Return the logarithms of 0! to size!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])


def chance_of_so_few(errors: int, size: int, risk: float) -> float:
    """Return the chance of at most so many errors in `size` rows if each were one with `risk`.

    It is the p-value of "the risk is larger": a binomial tail, exact for losses of 0 and 1.

    Examples:
        >>> round(chance_of_so_few(0, 299, 0.01), 4)
        0.0495
        >>> chance_of_so_few(3, 3, 0.5)
        1.0
    """
    if errors >= size:
        return 1.0
    k = np.arange(errors + 1)
    logs = _log_factorials(size)
    log_ways = logs[size] - logs[k] - logs[size - k]
    log_terms = log_ways + k * math.log(risk) + (size - k) * math.log1p(-risk)
    largest = log_terms.max()
    return float(min(1.0, math.exp(largest) * np.exp(log_terms - largest).sum()))


_HALVINGS = 50


def most_likely_share(count: int, size: int, delta: float) -> float:
    """Return the upper bound of a share of which `count` of `size` rows were counted.

    The share is above it in at most `delta` of all draws of the rows.

    Reference:
        Clopper and Pearson, The use of confidence or fiducial limits, Biometrika 26, 1934.

    Examples:
        >>> round(most_likely_share(0, 299, 0.05), 4)
        0.01
    """
    if count >= size:
        return 1.0
    low, high = count / size, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if chance_of_so_few(count, size, middle) > delta:
            low = middle
        else:
            high = middle
        if high - low < 1e-9:
            break
    return high


def share_interval(count: int, size: int, delta: float = 0.05) -> tuple[float, float]:
    """Return an interval that holds a share in at least 1 - delta of all draws of the rows.

    Args:
        count: How many rows were counted.
        size: Of how many.
        delta: How often the interval may miss the share.

    Reference:
        As `most_likely_share`.

    Examples:
        >>> [round(end, 3) for end in share_interval(5, 100)]
        [0.016, 0.113]
    """
    low = 1 - most_likely_share(size - count, size, delta / 2)
    return low, most_likely_share(count, size, delta / 2)


_STEP = 0.03  # of that chance, in standard deviations of the net loss
_SPREAD = 5.0  # standard deviations around the mean that are summed; the rest counts as passing


@lru_cache(maxsize=4096)
def chance_of_such_a_drop(
    errors: int, gains: int, size: int, drop: float, nuisance: float = 5e-4
) -> float:
    """Return the p-value of "the accuracy falls by more than `drop`".

    Args:
        errors: Rows that became wrong.
        gains: Rows that became right.
        size: All rows.
        drop: The fall in question, above 0.
        nuisance: Chance that the share of gains lies outside of what is looked at. It is in the
            p-value.

    Formula:
        max over q of P(T(E, G) <= T(errors, gains)), with (E, G) trinomial of the chances q + drop
        and q, and T = (E - G - size drop) / sqrt(max(E + G, size drop)); plus nuisance. Of q, an
        interval of confidence 1 - nuisance around gains / size is looked at, in steps so small
        that the largest chance within each is bounded by its ends: T falls where an error is taken
        away or a gain is added, so the chance is at most that of the fewest errors and most gains.

    Reference:
        Berger and Sidik, Exact unconditional tests for a 2 x 2 matched-pairs design, Statistical
        Methods in Medical Research 12, 2003; Berger and Boos, P values maximized over a confidence
        set for the nuisance parameter, JASA 89, 1994.

    Examples:
        >>> chance_of_such_a_drop(4, 1, 1000, 0.01) < 0.05 < chance_of_such_a_drop(9, 1, 1000, 0.01)
        True
    """
    margin = size * drop
    limit = (errors - gains - margin) / math.sqrt(max(errors + gains, margin))
    if limit >= 0:
        return 1.0
    low, high = share_interval(gains, size, nuisance)
    high = min(high, (1 - drop) / 2)
    largest, share = 0.0, min(low, high)
    while share < high or largest == 0:
        step = _STEP * math.sqrt((drop + 2 * share) / size)
        following = min(share + step, high)
        largest = max(largest, _chance_at(limit, size, drop, share + drop, following))
        share = following
    return min(1.0, largest + nuisance)


def _chance_at(limit: float, size: int, drop: float, harmed: float, gained: float) -> float:
    """Return the chance that T is at most `limit`, for rows of these chances of both."""
    margin = size * drop
    errors, gains = (_counts(size, chance)[:, None] for chance in (harmed, gained))
    gains = gains.T
    fails = errors - gains - margin > limit * np.sqrt(np.maximum(errors + gains, margin))
    unchanged = size - errors - gains
    fails &= unchanged >= 0
    logs = _log_factorials(size)
    rest = max(1 - harmed - gained, 1e-300)
    log_terms = (
        logs[size]
        - (logs[errors] - errors * math.log(harmed))
        - (logs[gains] - gains * math.log(max(gained, 1e-300)))
        - (logs[np.maximum(unchanged, 0)] - unchanged * math.log(rest))
    )
    return 1 - float(np.exp(log_terms, where=fails, out=np.zeros(fails.shape)).sum())


def _counts(size: int, chance: float) -> npt.NDArray[np.int64]:
    """Return the counts that all but never are exceeded on either side."""
    mean, spread = size * chance, _SPREAD * math.sqrt(size * chance * (1 - chance)) + 7
    return np.arange(max(0, math.floor(mean - spread)), min(size, math.ceil(mean + spread)) + 1)


def least_rows(risk: float, delta: float) -> int:
    """Return how many rows without an error it takes to promise anything.

    Examples:
        >>> least_rows(risk=0.01, delta=0.05)
        299
    """
    return math.ceil(math.log(delta) / math.log1p(-risk))


_MOST_ROWS = 1_000_000


def rows_for(passes: Callable[[int], bool], least: int) -> int | None:
    """Return about how many rows it takes until a test passes.

    Args:
        passes: Whether a number of rows does.
        least: The first number that is tried.

    Returns:
        None where no number does, up to a million.

    Examples:
        >>> rows_for(lambda rows: chance_of_so_few(-(-rows // 200), rows, 0.01) <= 0.05, 299)
        1326
        >>> rows_for(lambda rows: False, 299)
    """
    rows = least
    while rows < _MOST_ROWS:
        if passes(rows):
            return rows
        rows += rows // 20 + 1
    return None
