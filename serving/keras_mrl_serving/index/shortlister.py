"""What makes the first shortlist: a FAISS index over the prefixes of the first dim, or their signs.

`FirstStage` says which FAISS index it is.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DamagedIndexError
from ..funnel import FunnelSchedule
from .base import Ids, Progress, Vectors, lowest_ids_first, rounding
from .facts import IndexFacts
from .filters import Filter
from .first_stage import EFFORTS, FirstStage, import_faiss, settings_of
from .projected import check_components, projected_index, projected_parts
from .refined import RefinedIndex, has_copies
from .subset import Codes, behind_transforms, row_codes, subset_index

_ROWS_ADDED_AT_ONCE = 50_000
_NEIGHBORS_SEEN = 32  # comparisons of a graph for each row that it keeps while it searches
_ROWS_PER_CENTROID = 64  # that FAISS learns a centroid from; its own 256 take four times as long


class Shortlister:
    """A FAISS index over the prefixes of the first dim.

    Args:
        index: The FAISS index, trained and filled.
        spec: The first stage it was made as.

    Examples:
        >>> rows = np.eye(4, dtype=np.float32)
        >>> first = Shortlister.build(rows, FirstStage("Flat", ""), "dot", lambda done, rows: None)
        >>> first.search(rows[2:3], 1).tolist()
        [[2]]
    """

    def __init__(self, index: Any, spec: FirstStage) -> None:
        self.index = index
        self.spec = spec
        self.dim = int(index.d)
        self._is_coarse = "x4fs" in spec.factory  # rows of many kinds look equally near to it
        self.set(spec.settings)

    @classmethod
    def build(
        cls, prefixes: Vectors, spec: FirstStage, metric: str, progress: Progress
    ) -> Shortlister:
        """Return a trained and filled FAISS index.

        Args:
            prefixes: `(rows, dim)`, as the metric compares them.
            spec: Which index.
            metric: "cosine", "dot" or "l2".
            progress: Called with the rows added and all rows.

        Raises:
            ValueError: If FAISS does not make such an index.
        """
        faiss = import_faiss()
        rows, dim = prefixes.shape
        vectors = _signs(prefixes) if spec.is_binary else prefixes
        with _build_errors(spec, prefixes, metric):
            if spec.is_binary:
                index = faiss.index_binary_factory(dim, spec.factory)
            else:
                index = _empty_index(faiss, dim, spec, metric)
                lists = faiss.try_extract_index_ivf(index)
                if lists is not None:
                    lists.cp.max_points_per_centroid = _ROWS_PER_CENTROID
            index.train(vectors)
        shortlister = cls(index, spec)
        for start in range(0, rows, _ROWS_ADDED_AT_ONCE):
            stop = min(start + _ROWS_ADDED_AT_ONCE, rows)
            with _build_errors(spec, prefixes, metric):
                index.add(vectors[start:stop])
            progress(stop, rows)
        return shortlister

    def set(self, settings: str) -> None:
        """Change FAISS's settings while it searches.

        Raises:
            ValueError: If the index has no such setting.
        """
        faiss = import_faiss()
        try:
            if self.spec.is_binary:
                _set_binary(faiss.downcast_IndexBinary(self.index), settings)
            elif settings:
                faiss.ParameterSpace().set_index_parameters(self.index, settings)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                "settings must be those the first stage has: 'efSearch=64' of a graph, 'nprobe=8' "
                f"of inverted lists, none of flat ones. Received: {settings!r} for "
                f"{self.spec.factory!r} ({_reason(error)}). Leave them out: settings=''."
            ) from error

    def search(
        self, prefixes: Vectors, size: int, only: Filter | None = None, ids: Ids | None = None
    ) -> Ids:
        """Return the `size` gallery rows that look nearest to each prefix, in no promised order.

        Of rows that FAISS meets and that look equally near, those of lowest id are returned; where
        it looks coarsely, any of them.

        Args:
            prefixes: `(batch, dim)`, as the metric compares them.
            size: Number of rows on each shortlist; fewer than there are.
            only: The only rows that may be returned.
            ids: Ids of all rows; None takes the row numbers.

        Shapes:
            Returns int64 `(batch, size)`, -1 where fewer were found.
        """
        faiss = import_faiss()
        index, parameters = self.index, None
        if only is not None:
            alone = self.alone(only, size)
            if alone is None and not self.can_choose:
                return self._sifted(faiss, prefixes, size, only)
            index = self.index if alone is None else alone
            parameters = None if alone is not None else self.selecting(only, size)
        if self.spec.is_binary:
            shortlists: Ids = self.index.search(_signs(prefixes), size, params=parameters)[1]
            return shortlists
        if self._is_coarse:
            return self._ask(faiss, prefixes, size, parameters, index)[1]

        def ask(some: slice, count: int) -> tuple[Vectors, Ids]:
            most = min(count, self.index.ntotal)
            return self._ask(faiss, prefixes[some], most, parameters, index)

        scores, rows = self._ask(faiss, prefixes, size + 1, parameters, index)
        slack = 0.0
        if len(prefixes) > 1 and self._longest:  # by a matrix product
            lengths = np.sqrt(np.einsum("qd,qd->q", prefixes, prefixes))
            metric = "l2" if self.index.metric_type == faiss.METRIC_L2 else "dot"
            slack = float(rounding(metric, self.dim, lengths.max(), self._longest))
        return lowest_ids_first(scores, rows, ids, slack, ask)

    def selecting(self, only: Filter, size: int) -> Any:
        """Return FAISS's parameters that leave the other rows out, made once for a filter.

        A graph walks over the rows that it leaves out: to see as many of those that count, it
        looks harder by as much as they are fewer.

        Args:
            only: The rows that may be returned, of an index that `can_choose`.
            size: Number of rows on each shortlist.
        """
        parameters = only.prepared.get(("select", size))
        if parameters is None:
            faiss = import_faiss()
            if "selector" not in only.prepared:
                bits = np.packbits(only.mask, bitorder="little")
                only.prepared.setdefault("selector", faiss.IDSelectorBitmap(bits))
            selector = only.prepared["selector"]
            parameters = _selecting(faiss, self.index, selector, size, only.share)
            only.prepared[("select", size)] = parameters
        return parameters

    def alone(self, only: Filter, size: int) -> Any:
        """Return an index of a filter's rows, made once, where to compare them all is least work.

        None where a graph leads to them sooner, and of kinds of index that take others out as they
        compare.

        Args:
            only: The rows that may be returned.
            size: Number of rows on each shortlist.
        """
        if self._codes is None:
            return None
        if not self._is_coarse:
            # In comparisons: one in turn is a quarter of one that a graph leads to.
            _, graph = behind_transforms(import_faiss(), self.index)
            walk = max(graph.hnsw.efSearch, size) * _NEIGHBORS_SEEN / only.share
            if len(only) / 4 >= walk:
                return None
        if "alone" not in only.prepared:
            index = subset_index(import_faiss(), self.index, self._codes, only.rows)
            only.prepared.setdefault("alone", index)
        return only.prepared["alone"]

    @cached_property
    def _codes(self) -> Codes | None:
        """Codes of all rows, where those of a filter may be taken out."""
        return None if self.spec.is_binary else row_codes(import_faiss(), self.index)

    def _sifted(self, faiss: Any, prefixes: Vectors, size: int, only: Filter) -> Ids:
        """Ask a kind of index that cannot leave rows out for more, and sift them."""
        rows = np.full((len(prefixes), size), -1, np.int64)
        is_open, count = np.ones(len(prefixes), bool), int(1.5 * size / only.share) + 32
        while is_open.any():
            count = min(count, self.index.ntotal)
            some = np.ascontiguousarray(prefixes[is_open])
            if self.spec.is_binary:
                seen = self.index.search(_signs(some), count)[1]
            else:
                seen = self._ask(faiss, some, count, None)[1]
            passes = only.mask[seen] & (seen >= 0)
            best = np.argsort(~passes, axis=1, kind="stable")[:, :size]
            rows[is_open] = np.where(
                np.take_along_axis(passes, best, 1), np.take_along_axis(seen, best, 1), -1
            )
            if count == self.index.ntotal:
                break
            is_open[is_open] = passes.sum(axis=1) < size
            count *= 4
        return rows

    def refined(
        self,
        schedule: FunnelSchedule,
        stages: Mapping[int, Vectors],
        metric: str,
        only: Filter | None = None,
    ) -> RefinedIndex | None:
        """Return a whole funnel as one FAISS index.

        None unless this is a graph over its own rows or codes of 4 bits: of the rows at the edge of
        a shortlist that look equal, others let the lowest ids pass.

        Args:
            schedule: The funnel, whose first dim is that of this first stage.
            stages: Rows by dim, as the metric compares them.
            metric: "cosine", "dot" or "l2".
            only: The only rows that it returns, more than are on a shortlist.
        """
        if not self._answers_in_one_call:
            return None
        index, parameters = self.index, None
        if only is not None:
            size = (*schedule.shortlists, schedule.k)[0]
            alone = self.alone(only, size)
            if alone is not None:
                index = alone
            elif self.can_choose:
                parameters = self.selecting(only, size)
            else:
                return None
        facts = (schedule, stages, metric, self._copied, parameters)
        return RefinedIndex(import_faiss(), index, *facts)

    @cached_property
    def _answers_in_one_call(self) -> bool:
        if self.spec.is_binary or self._is_coarse:
            return self._is_coarse
        return self._codes is not None

    @cached_property
    def _copied(self) -> npt.NDArray[np.bool_] | None:
        """Which rows of a graph look like another; None if none does."""
        codes = None if self._is_coarse else self._codes
        copied = None if codes is None else has_copies(codes)
        return None if copied is None or not copied.any() else copied

    def _ask(
        self, faiss: Any, prefixes: Vectors, count: int, parameters: Any, index: Any = None
    ) -> tuple[Vectors, Ids]:
        # Not by FAISS's Python wrapper, whose checks of one query take half as long as reranking.
        rows = np.empty((len(prefixes), count), np.int64)
        scores = np.empty((len(prefixes), count), np.float32)
        x, values, row_numbers = map(faiss.swig_ptr, (prefixes, scores, rows))
        searched = self.index if index is None else index
        searched.search_c(len(prefixes), x, count, values, row_numbers, parameters)
        return scores, rows

    @cached_property
    def _longest(self) -> float:
        """Length of the longest row of flat storage, which FAISS multiplies as a matrix; else 0."""
        faiss = import_faiss()
        index = faiss.downcast_index(self.index)
        if not isinstance(index, faiss.IndexFlat) or not index.ntotal:
            return 0.0
        rows = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * self.dim)
        rows = rows.reshape(-1, self.dim)
        return float(np.sqrt(np.einsum("rd,rd->r", rows, rows).max()))

    @property
    def rows(self) -> Vectors:
        """The rows of flat storage, a view: of a first stage that holds them as they are."""
        faiss = import_faiss()
        index = faiss.downcast_index(self.index)
        storage = (
            faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
        )
        if not isinstance(storage, faiss.IndexFlat):
            raise ValueError(
                "Rows are read from a first stage that holds them. "
                f"Received: {self.spec.factory!r}. Give the rows of the last dim, too."
            )
        view = faiss.rev_swig_ptr(storage.get_xb(), storage.ntotal * self.dim)
        return np.asarray(view.reshape(-1, self.dim))

    @cached_property
    def can_choose(self) -> bool:
        """Whether FAISS can leave rows out of this kind of index; tried with one query."""
        faiss = import_faiss()
        query = np.zeros((1, self.dim), np.float32)
        vectors = _signs(query) if self.spec.is_binary else query
        try:
            selector = faiss.IDSelectorBatch(np.zeros(1, np.int64))
            self.index.search(vectors, 1, params=_selecting(faiss, self.index, selector, 1, 1.0))
        except (RuntimeError, TypeError, AssertionError):
            return False
        return True

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the FAISS index to a file.

        Raises:
            OSError: If it cannot be written there.
        """
        faiss = import_faiss()
        write = faiss.write_index_binary if self.spec.is_binary else faiss.write_index
        try:
            write(self.index, os.fspath(path))
        except RuntimeError as error:
            raise OSError(
                "A first stage must be written whole. "
                f"Received: {os.fspath(path)!r} ({_reason(error)}). "
                "Make room on the disk, or choose another folder."
            ) from error

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], spec: FirstStage, rows: int, facts: IndexFacts
    ) -> Shortlister:
        """Return what `write` wrote.

        Args:
            path: The file.
            spec: The first stage it was made as.
            rows: Rows of the gallery.
            facts: Of the gallery: its first dim and its metric are those of the first stage.

        Raises:
            DamagedIndexError: If FAISS does not read it, or it is of another gallery.
        """
        faiss = import_faiss()
        read = faiss.read_index_binary if spec.is_binary else faiss.read_index
        dim = facts.schedule.dims[0]
        try:
            with _bounded_by(_most_bytes(os.stat(path).st_size, spec)):
                index = read(os.fspath(path))
            received = (index.ntotal, index.d, index.metric_type == faiss.METRIC_L2)
            expected = (rows, dim, facts.metric == "l2" or spec.is_binary)
            if received != expected or not (_are_rows(index, rows) and _has_all_codes(index)):
                raise ValueError("it is of another gallery")
            shortlister = cls(index, spec)
            shortlister.search(np.zeros((1, dim), np.float32), 1)  # or the first query would fail
            return shortlister
        except (RuntimeError, MemoryError, ValueError) as error:
            raise DamagedIndexError(
                "A first stage is read as FAISS wrote it. "
                f"Received: {os.fspath(path)!r} ({_reason(error)}). "
                "Copy it again from where it is whole, or build the index anew."
            ) from error


_LIMITS = threading.Lock()  # of FAISS's limits, which are the process's


_TABLE_BYTES = 2**31  # FAISS makes no longer table of products


def _most_bytes(size: int, spec: FirstStage) -> int:
    """Return how long a vector may be that FAISS makes when it reads a file of `size` bytes.

    Of lists with product quantizers it makes a table that is in no file: of each coordinate of a
    list's centroid, which is four bytes of the file, as many numbers as a code has values.
    """
    codes = re.search(r"IVF.*,PQ[0-9]+(?:x([0-9]+))?", spec.factory)
    if codes is None:
        return size
    return max(size, min(size * 2 ** min(int(codes[1] or 8), 8), _TABLE_BYTES))


@contextmanager
def _bounded_by(size: int) -> Iterator[None]:
    """Let FAISS take no more memory for a vector than so many bytes, whatever its file says."""
    faiss = import_faiss()
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):  # before FAISS 1.14
        yield
        return
    with _LIMITS:
        bytes_before = faiss.get_deserialization_vector_byte_limit()
        loops_before = faiss.get_deserialization_loop_limit()
        faiss.set_deserialization_vector_byte_limit(size + 1)
        faiss.set_deserialization_loop_limit(size + 1)
        try:
            yield
        finally:
            faiss.set_deserialization_vector_byte_limit(bytes_before)
            faiss.set_deserialization_loop_limit(loops_before)


def _are_rows(index: Any, rows: int) -> bool:
    """Return whether inverted lists name rows of the gallery alone, and each of them once.

    FAISS reads the rows of a shortlist from wherever their numbers lead in memory.
    """
    faiss = import_faiss()
    owner = index if isinstance(index, faiss.IndexBinaryIVF) else None
    if isinstance(index, faiss.Index):
        owner = faiss.try_extract_index_ivf(index)
    if owner is None:
        return True
    lists, seen = owner.invlists, np.zeros(rows, bool)
    for number in range(lists.nlist):
        size = lists.list_size(number)
        if size:
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
            if ids.min() < 0 or ids.max() >= rows:
                return False
            seen[ids] = True
    return bool(seen.all())


def _has_all_codes(index: Any) -> bool:
    """Return whether the codes of all rows are there, each as long as the header says.

    FAISS itself does not compare the lengths of RaBitQ, and would read behind the codes.
    """
    faiss = import_faiss()
    if isinstance(index, faiss.Index):
        own = faiss.downcast_index(index)
        if isinstance(own, faiss.IndexFlatCodes):
            has_center = not hasattr(own, "center") or own.center.size() == own.d
            return bool(has_center and own.codes.size() == own.ntotal * own.code_size)
    return True


def _empty_index(faiss: Any, dim: int, spec: FirstStage, metric: str) -> Any:
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    parts = projected_parts(spec.factory)
    if parts is None:
        return faiss.index_factory(dim, spec.factory, kind)
    number, factory = parts
    components = check_components(spec.projection, spec.factory, dim, number)
    inner = faiss.index_factory(number, factory, kind)
    return projected_index(faiss, inner, components, is_scaled=metric == "cosine")


@contextmanager
def _build_errors(spec: FirstStage, prefixes: Vectors, metric: str) -> Iterator[None]:
    """Raise what FAISS raises as a `ValueError` that names the first stage and the gallery."""
    rows, dim = prefixes.shape
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            "The first stage must be an index FAISS can make of the gallery's prefixes. "
            f"Received: {spec.factory!r} for {rows} rows of dim {dim} and metric {metric!r} "
            f"({_reason(error)}). Take for example FirstStage('HNSW32')."
        ) from error


def _selecting(faiss: Any, index: Any, selector: Any, size: int, share: float) -> Any:
    """Return search parameters that select rows and otherwise repeat the index's settings."""
    kind = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
    if isinstance(kind, faiss.IndexPreTransform):
        inner = _selecting(faiss, kind.index, selector, size, share)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(kind, faiss.IndexHNSW):
        effort = math.ceil(max(kind.hnsw.efSearch, size) / share)
        return faiss.SearchParametersHNSW(sel=selector, efSearch=effort)
    if isinstance(kind, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=kind.nprobe)
    return faiss.SearchParameters(sel=selector)


def _set_binary(index: Any, settings: str) -> None:
    for name, value in settings_of(settings):
        owner = index.hnsw if name == "efSearch" else index
        if name not in EFFORTS or not hasattr(owner, name):
            raise AttributeError(f"no {name}")
        setattr(owner, name, int(value))


def _signs(prefixes: Vectors) -> Any:
    return np.packbits(prefixes > 0, axis=1)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[-200:] or type(error).__name__
