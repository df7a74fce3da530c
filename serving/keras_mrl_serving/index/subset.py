"""The rows of a filter as a FAISS index of their own, which compares them one after the other.

The fewer rows a filter leaves, the longer a graph walks past the others, and the more must be
asked of codes of 4 bits, among which FAISS cannot choose. An index of those rows alone costs less.
It answers by their numbers in the gallery, so that a funnel goes on from it to the same wider
stages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Ids

Codes = npt.NDArray[np.uint8]  # `(rows, code size)`

_BLOCK = 32  # rows whose codes of 4 bits FAISS writes side by side
_ROW_IN_BLOCK = (0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)  # of its 16 bytes, low bits


def row_codes(faiss: Any, first: Any) -> Codes | None:
    """Return the codes of all rows of a graph, a view, or of an index of 4-bit codes, a copy.

    None of other kinds.

    Examples:
        >>> import faiss
        >>> first = faiss.index_factory(4, "HNSW8")
        >>> first.add(np.eye(4, dtype=np.float32))
        >>> row_codes(faiss, first).shape
        (4, 16)
    """
    _, index = behind_transforms(faiss, first)
    if isinstance(index, faiss.IndexPQFastScan):
        return _unpacked(faiss, index) if index.bbs == _BLOCK else None
    storage = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else None
    if not isinstance(storage, faiss.IndexFlatCodes) or not storage.ntotal:
        return None
    size = storage.ntotal * storage.code_size
    codes = faiss.rev_swig_ptr(storage.codes.data(), size)
    return np.asarray(codes.reshape(storage.ntotal, storage.code_size))


def _unpacked(faiss: Any, index: Any) -> Codes:
    """Return codes of 4 bits row by row, which FAISS holds in blocks."""
    blocks = faiss.vector_to_array(index.codes).reshape(-1, index.M2 // 2, 2, 16)
    blocks = blocks.transpose(0, 3, 1, 2)  # block, byte, pair of parts of a vector, part
    parts = np.empty((len(blocks), 2, *blocks.shape[1:]), np.uint8)
    parts[:, 0, _ROW_IN_BLOCK] = blocks & 15
    parts[:, 1, _ROW_IN_BLOCK] = blocks >> 4
    parts = parts.reshape(-1, *blocks.shape[2:])[: index.ntotal]
    codes: Codes = parts[:, :, 0] | parts[:, :, 1] << 4
    return codes


def subset_index(faiss: Any, first: Any, codes: Codes, rows: Ids) -> Any:
    """Return an index of some rows of a first stage.

    Args:
        faiss: The module.
        first: The first stage, whose transforms are used and not copied.
        codes: Its `row_codes`.
        rows: Numbers of the rows.

    Returns:
        A FAISS index, or None where the first stage holds its codes in a way that is not known.

    Examples:
        >>> import faiss
        >>> first = faiss.index_factory(4, "HNSW8")
        >>> first.add(np.eye(4, dtype=np.float32))
        >>> part = subset_index(faiss, first, row_codes(faiss, first), np.array([1, 3]))
        >>> part.search(np.eye(4, dtype=np.float32)[3:], 2)[1].tolist()
        [[3, 1]]
    """
    transforms, kind = behind_transforms(faiss, first)
    if isinstance(kind, faiss.IndexHNSW):
        kind = faiss.downcast_index(kind.storage)
    part = _with_codes(faiss, kind, codes[rows])
    if part is None:
        return None
    part.ntotal = 0  # FAISS maps the numbers of an empty index alone
    index = faiss.IndexIDMap(part)
    part.ntotal = len(rows)
    index.ntotal = first.ntotal  # above the numbers that it answers with
    faiss.copy_array_to_vector(rows, index.id_map)
    for transform in reversed(transforms):
        index = faiss.IndexPreTransform(transform, index)
    faiss.add_to_referenced_objects(index, first)  # or its transforms are freed with it
    return index


def behind_transforms(faiss: Any, first: Any) -> tuple[list[Any], Any]:
    """Return the transforms of a first stage's vectors, and the index behind them.

    Examples:
        >>> import faiss
        >>> transforms, index = behind_transforms(faiss, faiss.index_factory(4, "PCA2,HNSW8"))
        >>> len(transforms), type(index).__name__
        (1, 'IndexHNSWFlat')
    """
    transforms, index = [], faiss.downcast_index(first)
    while isinstance(index, faiss.IndexPreTransform):
        transforms += [index.chain.at(number) for number in range(index.chain.size())]
        index = faiss.downcast_index(index.index)
    return transforms, index


def _with_codes(faiss: Any, kind: Any, codes: Codes) -> Any:
    """Return an index that was trained like another, over other codes."""
    if type(kind) in (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2):
        index = faiss.IndexFlat(kind.d, kind.metric_type)
    elif type(kind) is faiss.IndexScalarQuantizer:
        index = faiss.IndexScalarQuantizer(kind.d, kind.sq.qtype, kind.metric_type)
        index.sq = kind.sq
    elif type(kind) is faiss.IndexPQFastScan:
        index = faiss.IndexPQ(kind.d, kind.pq.M, kind.pq.nbits, kind.metric_type)
        index.pq = kind.pq
    else:
        return None
    index.is_trained = True
    faiss.copy_array_to_vector(np.ascontiguousarray(codes).ravel(), index.codes)
    index.ntotal = len(codes)
    if type(kind) is not faiss.IndexPQFastScan:
        return index
    packed = faiss.IndexPQFastScan(index)
    packed.orig_codes = None  # which go with `index`
    return packed
