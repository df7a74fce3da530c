"""A cascade that takes longer than the whole model is told, with the times that were measured."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from keras_mrl_export.speed import slower_than

ROWS = {"x": np.zeros((20, 3), np.float32)}


class Runs:
    """Runs that take given milliseconds, on a clock of their own."""

    def __init__(self, **milliseconds: Iterator[float]) -> None:
        self.milliseconds = milliseconds
        self.now_s = 0.0
        self.calls: list[tuple[str, int]] = []

    def run(self, signature: str, rows: Mapping[str, Any]) -> None:
        self.calls.append((signature, len(rows["x"])))
        self.now_s += next(self.milliseconds[signature]) / 1000

    def slower(self, rows: Any = ROWS) -> str | None:
        return slower_than(
            self.run, "classify_adaptive", "classify_8", rows, clock=lambda: self.now_s
        )


def test_the_warning_names_what_was_measured() -> None:
    """The median counts, of runs in turn: one that was disturbed changes nothing."""
    runs = Runs(
        classify_adaptive=iter([3.0, 4.5, 90.0, 4.0, 5.0]),
        classify_8=iter([2.0, 2.25, 0.5, 70.0, 3.0]),
    )
    assert runs.slower() == (
        "A cascade over exits should take less time than the whole model. Received: "
        "classify_adaptive took 4.5 ms and classify_8 2.25 ms for the first 8 rows of the sample, "
        "here. Ask fewer exits, or none: an exit takes time whatever its multiply-adds are."
    )
    assert runs.calls == [("classify_adaptive", 8), ("classify_8", 8)] * 5


def test_fewer_rows_are_named_as_so_many() -> None:
    runs = Runs(classify_adaptive=iter([2.0] * 5), classify_8=iter([1.0] * 5))
    assert "for the first 3 rows of the sample" in str(runs.slower({"x": ROWS["x"][:3]}))


def test_a_cascade_that_is_faster_or_as_fast_warns_of_nothing() -> None:
    for milliseconds in (1.0, 1.5):
        runs = Runs(classify_adaptive=iter([milliseconds] * 5), classify_8=iter([2.0] * 5))
        assert runs.slower() is None
