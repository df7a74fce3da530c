"""What a projection gains on rows that it was not made of, beside truncation and PCA.

For each query the full-width neighbours are known. All measures come from the ranks that those rows
have at a dim: recall is the share whose rank is at most k, and a shortlist of s holds the share
whose rank is at most s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl_serving.projection import Projection, check_rows, principal_directions, unit_rows

from .._arrays import Array
from .._dims import blocks, check_dims
from .neighbors import check_gallery, nearest_ids
from .plots import plot_by_dim
from .quality import Quality

HELD = (0.95, 0.98)  # shares of the neighbours that a shortlist is to hold

_ROWS_AT_ONCE = 4096
_QUERIES_AT_ONCE = 512
_SLACK = 1e-6  # by which a score must exceed another to rank before it: more than rounding
_NDCG = 10
_MARGIN = 0.005  # less than this is no difference

TRUNCATION, PCA = "truncation", "pca"


@dataclass(frozen=True)
class ProjectionReport:
    """The measures of each way to shorten embeddings, by dim.

    Args:
        by_method: Method to its measures; "truncation" and "pca" are always among them.
        rows: Rows of the gallery.
        queries: How many queries were asked.
        k: Full-width neighbours of each query that were looked for.
        full: Measures at the full width, such as the `ndcg@10` of pairs; empty without pairs.

    Examples:
        >>> report = ProjectionReport(
        ...     {name: Quality({8: {"recall@10": 0.2}}) for name in ("truncation", "pca")},
        ...     rows=1000,
        ...     queries=50,
        ...     k=10,
        ... )
        >>> print(report.table())
        method      dim  recall@10
        truncation    8     0.2000
        pca           8     0.2000
        >>> report.findings()
        []
    """

    by_method: Mapping[str, Quality]
    rows: int
    queries: int
    k: int
    full: Mapping[str, float] = field(default_factory=dict)

    def table(self) -> str:
        """Return all measures, a line for each dim of each method."""
        names = list(next(iter(self.by_method.values())).by_measure())
        cells = [["method", "dim", *names]]
        for method, quality in self.by_method.items():
            for dim, measures in quality.items():
                cells.append([method, str(dim), *(_number(measures[name]) for name in names)])
        for name, value in self.full.items():
            row = ["full width", ""] + ["" for _ in names]
            row[2 + names.index(name)] = _number(value)
            cells.append(row)
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in cells
        )

    def findings(self) -> list[str]:
        """Return a sentence for each way in which a projection loses; none where it does not."""
        sentences = []
        for method in self.by_method:
            if method == TRUNCATION:
                continue
            for name in (f"recall@{self.k}", f"ndcg@{_NDCG}"):
                for rival in (TRUNCATION, PCA):
                    if rival != method:
                        sentences += self._losses(method, rival, name)
        return sentences

    def _losses(self, method: str, rival: str, name: str) -> list[str]:
        own, other = (self.by_method[side].by_measure().get(name, {}) for side in (method, rival))
        lost = [dim for dim in own if own[dim] < other[dim] - _MARGIN]
        if not lost:
            return []
        dims = ", ".join(map(str, lost))
        worst = max(lost, key=lambda dim: other[dim] - own[dim])
        sentence = (
            f"{method} loses to {rival} at {dims}: {name} of prefixes alone is {own[worst]:.3f} "
            f"and not {other[worst]:.3f} at {worst}."
        )
        if rival == TRUNCATION:
            sentence += (
                " These embeddings seem to be trained Matryoshka: take the projection for "
                "shortlists at most, and rank by the embeddings as they are."
            )
        return [sentence]

    def plot(self, path: str | Path) -> None:
        """Draw the recall of prefixes by dim, a line for each method.

        Args:
            path: File to write; its suffix chooses the format (.png, .svg).
        """
        name = f"recall@{self.k}"
        lines = {method: quality.by_measure()[name] for method, quality in self.by_method.items()}
        title = f"Full-width neighbours that a prefix finds, {self.rows:,} rows"
        plot_by_dim(lines, path, title=title, measure=name)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON."""
        return {
            "rows": self.rows,
            "queries": self.queries,
            "k": self.k,
            "full": dict(self.full),
            "methods": {
                method: {str(dim): dict(measures) for dim, measures in quality.items()}
                for method, quality in self.by_method.items()
            },
        }


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def score_projection(
    projection: Projection,
    gallery: Any,
    queries: Any,
    k: int = 10,
    pairs: tuple[Any, Any] | None = None,
    dims: Sequence[int] | None = None,
    pca: Projection | None = None,
) -> ProjectionReport:
    """Return what prefixes are worth as they are, after PCA, and projected, at every dim.

    `recall@k` is the share of a query's full-width neighbours that the prefix alone finds.
    `shortlist@0.95` is how many rows a prefix must hand on so that 95% of them are there. With
    pairs, `ndcg@10` is that of the right answers, which is a task that neighbours do not show.

    Args:
        projection: What is judged.
        gallery: Embeddings `(rows, width)`, memory-mapped ones too, of rows that the projection was
            not made of.
        queries: Embeddings `(queries, width)`, neither in the gallery nor among those rows.
        k: How many neighbours are looked for.
        pairs: Embeddings of other queries `(pairs, width)`, and the number of the right row of
            each in the gallery.
        dims: Prefix lengths; None means those of the projection.
        pca: Principal components to compare with; None means those of the gallery, which knows
            more than the projection does.

    Raises:
        ValueError: If the embeddings are of other widths, or the gallery has fewer than k rows.

    Examples:
        >>> from keras_mrl_serving.projection import Projection, principal_directions
        >>> rows = np.random.default_rng(0).normal(size=(300, 16)) * np.arange(1, 17)
        >>> projection = Projection(principal_directions(rows[:100]), dims=(4, 8))
        >>> report = score_projection(projection, rows[100:280], rows[280:], k=5)
        >>> report.by_method["pca"][4]["recall@5"] > report.by_method["truncation"][4]["recall@5"]
        True
    """
    k = check_gallery(len(gallery), k)
    width = check_rows(gallery, projection.width)
    ladder = projection.dims if dims is None else check_dims(dims)
    if projection.method == PCA:
        pca = projection
    elif pca is None:
        pca = Projection(principal_directions(gallery, ladder[-1]), ladder)
    truncation = Projection(np.eye(ladder[-1], width), ladder)
    methods = {TRUNCATION: truncation, PCA: pca, projection.method: projection}
    questions = unit_rows(queries)
    neighbors = nearest_ids(gallery, questions, width, k)
    right = None if pairs is None else (unit_rows(pairs[0]), np.asarray(pairs[1])[:, None])
    by_method = {}
    for name, method in methods.items():
        ranks = ranks_by_dim(method, gallery, questions, neighbors, ladder)
        measures = {dim: _measures(ranks[dim], k) for dim in ladder}
        if right is not None:
            answers = ranks_by_dim(method, gallery, *right, ladder)
            for dim in ladder:
                measures[dim][f"ndcg@{_NDCG}"] = _gain(answers[dim])
        by_method[name] = Quality(measures)
    full = {}
    if right is not None:
        identity = Projection(np.eye(width), (width,))
        full[f"ndcg@{_NDCG}"] = _gain(ranks_by_dim(identity, gallery, *right, (width,))[width])
    return ProjectionReport(by_method, len(gallery), len(questions), k, full)


def _measures(ranks: Array, k: int) -> dict[str, float]:
    """Return the measures of the ranks `(queries, k)` of true neighbours."""
    ordered = np.sort(ranks, axis=None)
    measures: dict[str, float] = {f"recall@{k}": float((ranks <= k).mean())}
    for share in HELD:
        measures[f"shortlist@{share}"] = int(ordered[int(np.ceil(share * ordered.size)) - 1])
    return measures


def _gain(ranks: Array) -> float:
    """Return the nDCG of right answers, one a query, at these ranks `(queries, 1)`."""
    return float(np.where(ranks <= _NDCG, 1 / np.log2(1.0 + ranks), 0.0).mean())


def ranks_by_dim(
    projection: Projection, gallery: Any, queries: Array, targets: Array, dims: Sequence[int]
) -> dict[int, Array]:
    """Return the ranks from 1 that some rows have for each query, by cosine of the first dims.

    The gallery is read once, a block at a time. Of rows that are equally near none comes before.

    Args:
        projection: Applied to both sides.
        gallery: `(rows, width)`.
        queries: `(queries, width)`.
        targets: Numbers of rows of the gallery `(queries, targets)`.
        dims: Prefix lengths.

    Shapes:
        Returns int64 `(queries, targets)` for every dim.

    Examples:
        >>> from keras_mrl.evaluation.projection import ranks_by_dim
        >>> from keras_mrl_serving import Projection
        >>> rows = np.eye(3, dtype=np.float32)
        >>> same = Projection(np.eye(3), (3,))
        >>> ranks_by_dim(same, rows, rows[:1], np.array([[0, 2]]), (3,))[3].tolist()
        [[1, 2]]
    """
    ladder = tuple(dims)
    asked = projection.transform(queries, ladder[-1])
    own = projection.transform(unit_rows(gallery[np.unique(targets)]), ladder[-1])
    places = np.searchsorted(np.unique(targets), targets)
    scores = {}
    for dim in ladder:
        left, right = unit_rows(asked[:, :dim]), unit_rows(own[:, :dim])
        scores[dim] = np.einsum("qtd,qd->qt", right[places], left)
    ranks = {dim: np.ones(targets.shape, np.int64) for dim in ladder}
    for start in range(0, len(gallery), _ROWS_AT_ONCE):
        rows = projection.transform(unit_rows(gallery[start : start + _ROWS_AT_ONCE]), ladder[-1])
        for first in range(0, len(asked), _QUERIES_AT_ONCE):
            part = slice(first, first + _QUERIES_AT_ONCE)
            product: Any = 0.0
            for begin, dim in blocks(ladder):
                product = product + asked[part, begin:dim] @ rows[:, begin:dim].T
                lengths = (np.linalg.norm(side[:, :dim], axis=1) for side in (asked[part], rows))
                of_query, of_row = (np.maximum(length, 1e-6) for length in lengths)
                cosines = product / of_row
                least = (scores[dim][part] + _SLACK) * of_query[:, None]
                for target in range(targets.shape[1]):
                    nearer = cosines > least[:, target : target + 1]
                    ranks[dim][part, target] += nearer.sum(axis=1)
    return ranks
