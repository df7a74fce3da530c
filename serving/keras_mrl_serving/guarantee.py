"""A promise about rows not yet seen, and how many it takes to make one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Guarantee:
    """What was certified of a policy, on rows that no threshold was chosen on.

    With probability at least 1 - delta over the draw of those rows, the chance that a new row is
    one the full dim has right and the cascade wrong is at most `risk`.

    Args:
        risk: That chance.
        delta: How often the promise may fail.
        size: Number of rows it was certified on.
        errors: How many of them the full dim had right and the cascade wrong.

    Examples:
        >>> Guarantee(risk=0.01, delta=0.05, size=2000, errors=9)
        Guarantee(risk=0.01, delta=0.05, size=2000, errors=9)
    """

    risk: float
    delta: float
    size: int
    errors: int


def least_rows(risk: float, delta: float) -> int:
    """Return how many rows without an error it takes to promise anything.

    Examples:
        >>> least_rows(risk=0.01, delta=0.05)
        299
    """
    return math.ceil(math.log(delta) / math.log1p(-risk))


def rows_for(rate: float, risk: float, delta: float) -> int | None:
    """Return about how many rows it takes to promise `risk` where a share `rate` are errors.

    Args:
        rate: What is expected of them.
        risk: As in `Guarantee`.
        delta: As in `Guarantee`.

    Returns:
        None where errors are as frequent as the risk, or nearly: no number would do.

    Examples:
        >>> rows_for(0.0, risk=0.01, delta=0.05), rows_for(0.005, risk=0.01, delta=0.05)
        (299, 1326)
        >>> rows_for(0.02, risk=0.01, delta=0.05)
    """
    rows = least_rows(risk, delta)
    while rows < _MOST_ROWS and rate < risk:
        if chance_of_so_few(math.ceil(rate * rows), rows, risk) <= delta:
            return rows
        rows += rows // 20 + 1
    return None


def chance_of_so_few(errors: int, size: int, risk: float) -> float:
    """Return the chance of at most so many errors in `size` rows if each were one with `risk`.

    It is the p-value of "the risk is larger": a binomial tail, exact for losses of 0 and 1.

    Examples:
        >>> round(chance_of_so_few(0, 299, 0.01), 4)
        0.0495
        >>> chance_of_so_few(3, 3, 0.5)
        1.0
    """
    k = np.arange(errors + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])
    ways = log_factorial[size] - log_factorial[k] - log_factorial[size - k]
    terms = ways + k * math.log(risk) + (size - k) * math.log1p(-risk)
    most = terms.max()
    return float(min(1.0, math.exp(most) * np.exp(terms - most).sum()))
