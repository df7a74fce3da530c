"""The measures of every dim: what evaluations return, and the bar while they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import keras


class Quality(dict[int, dict[str, float]]):
    """Dim to measure to number: what every evaluation by dim returns.

    A plain dict in all but three things: printed, it is a table, `by_measure` turns it round for
    figures, and `output` says which output of a model was judged, so that
    `export_saved_model(quality=...)` refuses that of another.

    Args:
        measures: Dim to measure to number; None means none yet.
        output: Which output of a model was judged; None of a model that has one.

    Examples:
        >>> quality = Quality({8: {"ndcg@10": 0.5, "mrr@10": 0.625}, 16: {"ndcg@10": 0.75}})
        >>> print(quality)
        dim  ndcg@10  mrr@10
          8   0.5000  0.6250
         16   0.7500       -
        >>> quality[8]["mrr@10"]
        0.625
    """

    def __init__(
        self, measures: Mapping[int, dict[str, float]] | None = None, output: str | None = None
    ) -> None:
        super().__init__(measures or {})
        self.output = output

    def by_measure(self) -> dict[str, dict[int, float]]:
        """Return measure to dim to number, as `plot_by_dim` takes its lines.

        Examples:
            >>> Quality({8: {"ndcg@10": 0.5}, 16: {"ndcg@10": 0.75}}).by_measure()
            {'ndcg@10': {8: 0.5, 16: 0.75}}
        """
        names = dict.fromkeys(name for measures in self.values() for name in measures)
        return {
            name: {dim: measures[name] for dim, measures in self.items() if name in measures}
            for name in names
        }

    def __str__(self) -> str:
        names = list(self.by_measure())
        rows = [["dim", *names]]
        for dim, measures in self.items():
            cells = [f"{measures[name]:.4f}" if name in measures else "-" for name in names]
            rows.append([str(dim), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )


def progress_bar(steps: int, unit: str, verbose: int) -> Callable[[], None]:
    """Return a function to call after every step, which draws a bar where `verbose` is not 0.

    The bar is there before the first step, which may take minutes.

    Examples:
        >>> from keras_mrl.evaluation.quality import progress_bar
        >>> progress_bar(3, "block", verbose=0)()
    """
    if not verbose:
        return lambda: None
    bar = keras.utils.Progbar(steps, unit_name=unit)
    bar.update(0)
    return lambda: bar.add(1)
