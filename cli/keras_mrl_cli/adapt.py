"""Make embeddings Matryoshka that were not trained so.

The embeddings are the rows of an .npy file, such as an API or a sentence encoder made; it is
memory-mapped and may be larger than the memory. No labels are needed. An orthogonal projection
orders their directions, so that a prefix finds what the whole finds; cosines at the full width
stay as they are. It is judged on rows that it was not made of, beside truncation and PCA.

--out holds the projection, report.json, report.svg and projected.npy: all rows, projected, for
an index (index build --adaptor) or any other database. Interrupted, the same command goes on
after the last row that was safe, with the projection that is there.

  keras-mrl adapt --embeddings E.npy --out adapted
  keras-mrl adapt --embeddings E.npy --method listwise --out adapted
  keras-mrl adapt --embeddings E.npy --pairs Q.npy I.npy --out adapted
  keras-mrl adapt --embeddings E.npy --max-dim 256 --dims 64,256 --out adapted
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from .output import Progress, print_json, print_line, print_lines, print_note
from .shared import (
    DONE,
    Option,
    RefusalError,
    command,
    count_option,
    dims,
    ended_by_signals,
    json_option,
    needing,
    refuse,
    refusing,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from keras_mrl import MatryoshkaAdaptor

    Array = npt.NDArray[Any]

PROJECTED, REPORT, PICTURE = "projected.npy", "report.json", "report.svg"
_DIMS = (16, 32, 64, 128)
_STEPS, _ROWS, _SEED = 600, 10_000, 0
_JUDGED_QUERIES, _JUDGED_ROWS, _JUDGED_SHARE = 500, 25_000, 5  # a fifth of few rows judges
_LEAST_JUDGED = 20


@command(
    __doc__,
    Option("--embeddings", required=True, metavar="E.npy", help="the rows to project"),
    Option("--out", required=True, metavar="DIR", help="folder of the projection and the rows"),
    Option(
        "--dims",
        type=dims,
        metavar="M,...",
        help="prefixes that shall be useful (16,32,64,128)",
    ),
    Option(
        "--method",
        type=click.Choice(["pca", "listwise", "pairwise"]),
        default="pca",
        help="principal components, or learnt from there: nearest rows in the same order "
        "(listwise), or the same cosines (pairwise) (pca)",
    ),
    count_option("--max-dim", "M", "how many directions there are (as many as the width)"),
    Option(
        "--pairs",
        nargs=2,
        metavar="Q.npy I.npy",
        help="queries, and for each the number of its right row in E.npy",
    ),
    Option(
        "--fingerprint",
        metavar="TEXT",
        help="fingerprint of the encoder; a client then refuses queries of another (unknown)",
    ),
    count_option("--rows", "ROWS", f"rows it is made of ({_ROWS:,}, or half)"),
    count_option("--steps", "N", f"steps of the optimizer ({_STEPS})", usual=_STEPS),
    count_option("--seed", "N", f"seed of rows and batches ({_SEED})", usual=_SEED, least=0),
    json_option(),
)
def adapt(arguments: SimpleNamespace) -> int:
    """Fit a projection, judge it and write the projected rows."""
    with needing("tensorflow", "A projection is learnt by Keras on TensorFlow, JAX or PyTorch."):
        import keras_mrl  # noqa: F401
    from keras_mrl_serving import KerasMrlError
    from keras_mrl_serving.projection import CARD

    from .files import load_array, load_embeddings

    out = Path(arguments.out)
    rows = load_embeddings("--embeddings", arguments.embeddings)
    pairs = None
    if arguments.pairs:
        queries, numbers = arguments.pairs
        pairs = load_embeddings("--pairs", queries), load_array(numbers)
    rule = "--out must be a folder that can be written."
    remedy = "Name another, or make room there."
    kinds = (KerasMrlError, ValueError)
    with refusing(*kinds, rule=rule, remedy=remedy, place=arguments.out), ended_by_signals():
        if (out / PROJECTED).exists():
            raise RefusalError(
                f"Projected rows are never overwritten. Received: --out {arguments.out}, which "
                f"holds {PROJECTED}. Remove the folder, or name another."
            )
        if (out / CARD).exists():
            adaptor = _begun(arguments)
        else:
            adaptor = _fitted(arguments, rows, pairs)
        return _project(arguments, adaptor, rows)


def _begun(arguments: SimpleNamespace) -> MatryoshkaAdaptor:
    """Return the projection of an earlier run that was interrupted."""
    from keras_mrl import MatryoshkaAdaptor

    adaptor = MatryoshkaAdaptor.load(arguments.out)
    given = arguments.method, arguments.fingerprint
    there = adaptor.method, adaptor.encoder_fingerprint
    if given != there or arguments.dims not in (None, adaptor.dims):
        raise RefusalError(
            "A folder holds one projection. "
            f"Received: --out {arguments.out}, which holds one of the method {adaptor.method}, "
            f"dims {','.join(map(str, adaptor.dims))} and encoder {adaptor.encoder_fingerprint}, "
            "with other flags. Name another folder, or repeat the flags that began it."
        )
    print_note(f"Going on with the projection that is in {arguments.out}.")
    return adaptor


def _fitted(
    arguments: SimpleNamespace, rows: Array, pairs: tuple[Array, Array] | None
) -> MatryoshkaAdaptor:
    """Fit a projection to some rows, judge it on others, and save both."""
    from keras_mrl import MatryoshkaAdaptor

    width = rows.shape[1]
    most = width if arguments.max_dim is None else min(width, arguments.max_dim)
    adaptor = MatryoshkaAdaptor(
        arguments.dims or [dim for dim in _DIMS if dim < most] or [most],
        arguments.method,
        arguments.max_dim,
        steps=arguments.steps or _STEPS,
        encoder_fingerprint=arguments.fingerprint,
        max_rows=arguments.rows or _ROWS,
        seed=arguments.seed or _SEED,
        verbose=0 if arguments.json else 1,
    )
    parts = _Parts(rows, pairs, arguments.rows or _ROWS, adaptor.seed)
    adaptor.fit(rows[parts.fitted], parts.learning_pairs)
    report = None
    if len(parts.queries) >= _LEAST_JUDGED:
        gallery, queries = rows[parts.gallery], rows[parts.queries]
        report = adaptor.report(gallery, queries, pairs=parts.judging_pairs)
        if not arguments.json:
            print_lines(report.table())
        for sentence in report.findings():
            print_note(sentence)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if report is not None:
        (out / REPORT).write_text(json.dumps(report.to_json(), indent=1) + "\n")
        try:
            report.plot(out / PICTURE)
        except ImportError:
            print_note("No picture: pip install 'keras-mrl[evaluate]'.")
    adaptor.save(out)  # last: what is there before is of this run
    return adaptor


class _Parts:
    """Which rows fit, and which judge; no row does both."""

    def __init__(
        self, rows: Array, pairs: tuple[Array, Array] | None, most: int, seed: int
    ) -> None:
        import numpy as np

        rng = np.random.default_rng(seed)
        order = rng.permutation(len(rows))
        self.learning_pairs: tuple[Array, Array] | None = None
        self.judging_pairs: tuple[Array, Array] | None = None
        answers = np.zeros(0, np.int64)
        if pairs is not None:
            from keras_mrl.adapt import check_pairs

            check_pairs(rows, *pairs)
            answers = rng.permutation(np.unique(pairs[1]))
        held_out = answers[: min(len(answers) // _JUDGED_SHARE, _JUDGED_ROWS // 2)]
        learnt = np.setdiff1d(answers, held_out)
        rest = order[~np.isin(order, answers)]
        count = max(1, min(most, len(rows) // 2))
        self.fitted = np.sort(np.concatenate([learnt, rest])[: max(count, min(len(learnt), most))])
        rest = np.setdiff1d(rest, self.fitted, assume_unique=True)
        rest = rng.permutation(rest)
        judged = min(_JUDGED_QUERIES, len(rest) // _JUDGED_SHARE)
        self.queries = np.sort(rest[:judged])
        self.gallery = np.sort(np.concatenate([held_out, rest[judged:]])[:_JUDGED_ROWS])
        if pairs is not None:
            self.learning_pairs = _within(pairs, self.fitted)
            self.judging_pairs = _within(pairs, self.gallery)


def _within(pairs: tuple[Array, Array], part: Array) -> tuple[Array, Array] | None:
    """Return the pairs whose right row is in a part, and its number there; None without any."""
    import numpy as np

    queries, numbers = pairs
    inside = np.isin(numbers, part)
    if not inside.any():
        return None
    return queries[inside], np.searchsorted(part, numbers[inside])


def _project(arguments: SimpleNamespace, adaptor: MatryoshkaAdaptor, rows: Array) -> int:
    """Write all rows, projected; print what was made."""
    done = 0

    def report(count: int, _: int) -> None:
        nonlocal done
        done = count
        progress.show(count)

    path = os.path.join(arguments.out, PROJECTED)
    try:
        with Progress(lambda: len(rows)) as progress:
            projected = adaptor.projection_.transform_to_file(rows, path, progress=report)
    except (KeyboardInterrupt, SystemExit):
        refuse(
            f"{done:,} of {len(rows):,} rows are projected; the same command goes on after the "
            "last row that was safe."
        )
        raise
    facts = {
        "out": arguments.out,
        "rows": len(projected),
        "dim": projected.shape[1],
        "dims": list(adaptor.dims),
        "method": adaptor.method,
        "fingerprint": adaptor.fingerprint,
    }
    if arguments.json:
        print_json(**facts)
    else:
        print_line(f"{len(projected)} rows of dim {projected.shape[1]} are in {path}.")
        build = f"keras-mrl index build --adaptor {arguments.out} --out gallery.index"
        print_line(f"Build an index of them: {build}")
    return DONE
