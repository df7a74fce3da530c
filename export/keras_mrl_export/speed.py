"""Is a cascade over exits faster than the whole model? Measured on the machine that exports."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

Run = Callable[[str, Mapping[str, npt.NDArray[Any]]], Any]

_LAPS = 5
_ROWS = 8  # at a time


def slower_than(
    run: Run,
    cascade: str,
    whole: str,
    rows: Mapping[str, npt.NDArray[Any]],
    clock: Callable[[], float] = time.perf_counter,
) -> str | None:
    """Return what to warn of if one signature takes longer than another; None if it does not.

    Both are run in turn, and the medians count. They have run before, so both are warm.

    Args:
        run: Runs a signature.
        cascade: The signature that should be faster.
        whole: The other one.
        rows: Inputs of both.
        clock: Seconds.

    Examples:
        >>> times = iter(range(20))
        >>> slower_than(lambda *_: None, "classify_adaptive", "classify_8", {}, lambda: next(times))
    """
    batch = {name: array[:_ROWS] for name, array in rows.items()}
    taken: dict[str, list[float]] = {cascade: [], whole: []}
    for _ in range(_LAPS):
        for name, times in taken.items():
            start = clock()
            run(name, batch)
            times.append(clock() - start)
    own, other = (1000 * statistics.median(times) for times in taken.values())
    if own <= other:
        return None
    size = min((len(array) for array in batch.values()), default=0)
    return (
        "A cascade over exits should take less time than the whole model. "
        f"Received: {cascade} took {own:.3g} ms and {whole} {other:.3g} ms for the first {size} "
        "rows of the sample, here. Ask fewer exits, or none: an exit takes time whatever its "
        "multiply-adds are."
    )
