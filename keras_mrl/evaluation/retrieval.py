"""The worth of every dim in a search: rankings of a corpus, judged by graded relevance."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from .._arrays import Array, check_features
from .._dims import check_dims
from .._tokens import tokenized
from ..models.cut import as_model, check_one_vector, gallery_backbone, split
from ..models.outputs import one_output
from ..text import preprocessor_of
from .inputs import check_inputs, dims_of, embed_parts, parts_of, rows_of
from .neighbors import BLOCK_ROWS, check_gallery, nearest_by_dim
from .quality import Quality, progress_bar
from .relevance import Ids, Qrels, Relevance, read_qrels


def score_retrieval(
    queries: Any,
    corpus: Any,
    qrels: Qrels,
    dims: Sequence[int],
    query_ids: Any = None,
    corpus_ids: Any = None,
    k: int | Sequence[int] = 10,
    verbose: int = 0,
) -> Quality:
    """Return what a search by embeddings finds of the relevant documents, at every dim.

    For every query the k documents nearest by angle are found, exactly, and compared with `qrels`:
    `ndcg@k`, `mrr@k`, `map@k`, `recall@k` and `precision@k`, means over the judged queries. The
    numbers are those of trec_eval, and so of pytrec_eval and BEIR, for the measures `ndcg_cut`,
    `recip_rank` of the first k, `map_cut`, `recall` and `P`:

    - A grade above 0 is relevant. It is its own gain in nDCG, neither squared nor a power of 2.
    - A document without a grade is not relevant.
    - `map@k` divides by all relevant documents, found or not, in the corpus or not. So does
      `recall@k`. (`sentence-transformers` divides `map@k` by at most k, and `map10` of `evaluate`
      by k.)
    - A query without judgments is left out. One with judgments, none above 0, counts as 0.

    They differ in ties alone. Of documents that are equally near, trec_eval puts the id that is
    greater as a string first; here the lesser comes first, as in an index: strings by their
    characters, integers by value.

    The corpus is read once, a block of rows at a time: it may be a memory map, and no matrix of
    queries by documents is made.

    Args:
        queries: Embeddings `(queries, width)`.
        corpus: Embeddings of the documents `(rows, width)`, at least k. A query is compared with
            all of them, with itself too if it is one.
        qrels: Query id to document id to grade, `{"q1": {"d7": 2, "d9": 0}}`; or query id to a set
            of relevant documents, `{"q1": {"d7"}}`.
        dims: Prefix lengths.
        query_ids: One integer or string per query; None means the numbers of the rows.
        corpus_ids: One integer or string per document; None means the numbers of the rows.
        k: How many of the nearest are judged, or several such numbers.
        verbose: 1 shows progress, 0 does not.

    Raises:
        ValueError: If embeddings are no finite tables of at least the widest dim, the corpus has
            fewer than k rows, ids repeat or are not one per row, `qrels` is no such mapping, or
            names no query or no relevant document that is there.

    Warns:
        UserWarning: If some of the relevant documents are not in the corpus.

    Reference:
        trec_eval, of the Text REtrieval Conference; Thakur et al., BEIR, arXiv 2104.08663.

    Examples:
        >>> documents = [[0.0, 1.0], [1.0, 0.0], [0.1, 1.0], [1.0, 0.3]]
        >>> qrels = {"q": {"c": 2, "a": 1}}
        >>> print(score_retrieval([[0.2, 1.0]], documents, qrels, dims=(1, 2), query_ids=["q"],
        ...                       corpus_ids=["a", "b", "c", "d"], k=2))
        dim  ndcg@2   mrr@2   map@2  recall@2  precision@2
          1  0.4796  0.5000  0.2500    0.5000       0.5000
          2  1.0000  1.0000  1.0000    1.0000       1.0000
    """
    ladder = check_dims(dims)
    queries, corpus = check_features(queries, ladder[-1]), check_features(corpus, ladder[-1])
    cuts = _check_cuts(k, len(corpus))
    documents = Ids("corpus_ids", corpus_ids, len(corpus))
    relevance = read_qrels(qrels, Ids("query_ids", query_ids, len(queries)), documents, max(cuts))
    judged = queries[relevance.queries]
    return _judge(judged, corpus, relevance, documents.order, ladder, cuts, verbose)


def _judge(
    queries: Array,
    corpus: Array,
    relevance: Relevance,
    order: Array | None,
    ladder: tuple[int, ...],
    cuts: tuple[int, ...],
    verbose: int,
) -> Quality:
    progress = progress_bar(-(-len(corpus) // BLOCK_ROWS), "block", verbose)
    nearest = nearest_by_dim(corpus, queries, ladder, max(cuts), progress, order=order)
    return Quality({dim: relevance.measures(ids, cuts) for dim, ids in nearest.items()})


def _check_cuts(k: Any, rows: int) -> tuple[int, ...]:
    """The numbers of nearest documents that are judged, ascending."""
    cuts = tuple(k) if isinstance(k, (Sequence, np.ndarray)) and not isinstance(k, str) else (k,)
    if not cuts:
        raise ValueError("k must be a number of documents. Received: k=(). Give for example 10.")
    return tuple(sorted({check_gallery(rows, cut, "corpus") for cut in cuts}))


def evaluate_retrieval(
    model: keras.Model,
    queries: Any,
    corpus: Any,
    qrels: Qrels,
    query_ids: Any = None,
    corpus_ids: Any = None,
    dims: Sequence[int] | None = None,
    k: int | Sequence[int] = 10,
    batch_size: int = 256,
    verbose: int = 1,
    output: str | None = None,
) -> Quality:
    """Return what a search by a model's embeddings finds: `score_retrieval` of inputs.

    The corpus is embedded a part at a time into a temporary file, which is searched and removed:
    rows x width x 4 bytes on the disk of Python's `tempfile` (the variable `TMPDIR` names another),
    and none of it need fit in memory. The corpus of a `MatryoshkaEncoder` of two towers goes
    through the other tower.

    Args:
        model: A model that ends in a `MatryoshkaHead`, or whose output is the embedding.
        queries: Inputs, as `model.predict` takes them; strings of a model with a preprocessor.
        corpus: Inputs: an array of rows, or a dict or tuple of such arrays; or strings, a list of
            them or an array.
        qrels: Query id to document id to grade, or to a set of relevant documents.
        query_ids: One integer or string per query; None means the numbers of the rows.
        corpus_ids: One integer or string per document; None means the numbers of the rows.
        dims: None means those of the head, or of the loss of a `MatryoshkaEncoder`.
        k: How many of the nearest are judged, or several such numbers.
        batch_size: Rows that are embedded at a time.
        verbose: 1 shows progress (of both passes and of the search), 0 does not.
        output: Which output is judged, of a model with several.

    Raises:
        ValueError: As `score_retrieval`. Ids and `qrels` are checked before anything is embedded.

    Warns:
        UserWarning: If some of the relevant documents are not in the corpus.

    Examples:
        >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> rows = np.random.default_rng(0).normal(size=(40, 20))
        >>> quality = evaluate_retrieval(
        ...     model, rows[:10], rows, {i: {i} for i in range(10)}, dims=(4, 16), k=5, verbose=0)
        >>> quality.by_measure()["mrr@5"]  # every query is a document itself
        {4: 1.0, 16: 1.0}
    """
    preprocessor = preprocessor_of(model)
    model = one_output(model, output)
    backbone, head = split(model)
    check_one_vector(model, backbone)
    ladder = dims_of("evaluate_retrieval", model, head, dims)
    queries, query_rows = check_inputs("queries", queries)
    corpus, corpus_rows = check_inputs("corpus", corpus)
    cuts = _check_cuts(k, corpus_rows)
    # Check first: embedding the corpus may take hours.
    documents = Ids("corpus_ids", corpus_ids, corpus_rows)
    relevance = read_qrels(qrels, Ids("query_ids", query_ids, query_rows), documents, max(cuts))
    body = as_model(backbone)
    other = gallery_backbone(model, backbone)
    judged = tokenized(preprocessor, rows_of(queries, relevance.queries))
    features = body.predict(judged, batch_size=batch_size, verbose=verbose)
    features = check_features(features, ladder[-1])
    progress = progress_bar(len(parts_of(corpus_rows, batch_size)), "part", verbose)
    gallery = body if other is backbone else as_model(other)
    with tempfile.TemporaryFile() as file:
        for part in embed_parts(gallery, corpus, corpus_rows, batch_size, progress, preprocessor):
            file.write(check_features(part, ladder[-1]).tobytes())
            width = part.shape[1]
        file.flush()
        rows = np.memmap(file, np.float32, "r", shape=(corpus_rows, width))
        measures = _judge(features, rows, relevance, documents.order, ladder, cuts, verbose)
    return Quality(measures, output)
