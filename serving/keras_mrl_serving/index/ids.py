"""Ids of gallery rows: int64, or strings.

The engines know int64 alone. Strings are held once, sorted, as UTF-8 bytes one after the other, and
the id that an engine sees is the place of a row's string among them. So "ties in order of id" holds
for strings without a line in an engine, and a gallery of strings is opened without reading them
into Python objects.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..inputs import as_array

Ids = npt.NDArray[np.int64]
Names = npt.NDArray[np.object_]

_FEW = 50  # a share of 1/50: so few names are looked up one by one, more by one pass over all


class SortedNames(Sequence[str]):
    """Strings in order, all different, as bytes that may be memory-mapped.

    Args:
        data: Their UTF-8, one after the other, uint8 `(bytes,)`.
        ends: Where each ends, int64 `(names,)`.

    Examples:
        >>> names = SortedNames.of(["wren", "ant"])
        >>> list(names), names.places(["wren", "bee"]).tolist()
        (['ant', 'wren'], [1, -1])
    """

    def __init__(self, data: npt.NDArray[np.uint8], ends: Ids) -> None:
        self.data = data
        self.ends = ends

    @classmethod
    def of(cls, names: Sequence[str]) -> SortedNames:
        """Return strings that all differ, sorted."""
        encoded = [name.encode() for name in sorted(names)]
        data = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(data, np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        start = self.ends[place - 1] if place else 0
        return self.data[start : self.ends[place]].tobytes().decode()

    def take(self, places: Ids) -> Names:
        """Return the strings at places of any shape; "" for -1.

        Examples:
            >>> SortedNames.of(["wren", "ant"]).take(np.array([[1, -1]])).tolist()
            [['wren', '']]
        """
        names = np.empty(places.size, object)
        names[:] = ["" if place < 0 else self[place] for place in places.ravel().tolist()]
        return names.reshape(places.shape)

    def places(self, names: Sequence[str]) -> Ids:
        """Return the place of each string, -1 of one that is not there."""
        if len(names) * _FEW > len(self):
            place_of = {name: place for place, name in enumerate(self)}
            return np.array([place_of.get(name, -1) for name in names], np.int64)
        return np.array([self._place(name) for name in names], np.int64)

    def _place(self, name: str) -> int:
        place = bisect_left(self, name)
        return place if place < len(self) and self[place] == name else -1

    def check(self) -> None:
        """Raise `ValueError` where bytes and ends of an untrusted file are no sorted strings."""
        lengths = np.diff(self.ends, prepend=0)
        if (lengths <= 0).any() or self.ends[-1:].sum() != len(self.data):
            raise ValueError("ends that do not part the bytes into strings")
        before = ""
        for name in self:  # decoding raises UnicodeDecodeError, which is a ValueError
            if name <= before:
                raise ValueError("strings out of order")
            before = name


class RowIds:
    """The ids of a gallery's rows.

    Args:
        numbers: What the engine sees, int64 `(rows,)`, all different: the ids, or where they are
            strings the place of each among `names`.
        names: The strings, sorted; None where ids are int64.

    Examples:
        >>> ids = RowIds.of(["wren", "ant"])
        >>> ids.numbers.tolist(), ids.given(ids.numbers).tolist()
        ([1, 0], ['wren', 'ant'])
        >>> RowIds.of(np.array([7, 2])).numbers.tolist()
        [7, 2]
    """

    def __init__(self, numbers: Ids, names: SortedNames | None = None) -> None:
        self.numbers = numbers
        self.names = names

    @classmethod
    def of(cls, ids: npt.NDArray[Any] | Sequence[str]) -> RowIds:
        """Return the ids that `check_ids` returned."""
        if not is_text(np.asarray(ids)):
            return cls(np.asarray(ids))
        names = np.asarray(ids, object).tolist()
        order = sorted(range(len(names)), key=names.__getitem__)
        numbers = np.empty(len(names), np.int64)
        numbers[order] = np.arange(len(names))
        return cls(numbers, SortedNames.of(names))

    def __len__(self) -> int:
        return len(self.numbers)

    def given(self, numbers: Ids) -> npt.NDArray[Any]:
        """Return ids as the caller gave them; -1 stays -1, or is an empty string."""
        return numbers if self.names is None else self.names.take(numbers)

    def numbers_of(self, ids: npt.NDArray[Any]) -> Ids:
        """Return what the engine calls ids that `check_some_ids` returned; -1 for unknown strings.

        Raises:
            ValueError: If they are strings and those of the rows are not, or the other way round.
        """
        if ids.size and is_text(ids) != (self.names is not None):
            received, expected = ("strings", "int64") if is_text(ids) else ("int64", "strings")
            raise ValueError(
                "Ids must be of the kind that the index was built with. "
                f"Received: {received} for an index whose ids are {expected}. "
                f"Give {expected}."
            )
        if self.names is None or not ids.size:
            return ids.astype(np.int64)
        return self.names.places(ids.tolist())


def is_text(ids: npt.NDArray[Any]) -> bool:
    """Return whether ids are strings.

    Examples:
        >>> is_text(np.array(["ant"])), is_text(np.array([3]))
        (True, False)
    """
    return ids.dtype.kind in "UTO"


def check_ids(ids: npt.ArrayLike | None, rows: int) -> npt.NDArray[Any]:
    """Return one id per gallery row; None numbers the rows from 0.

    Returns:
        int64 `(rows,)`, or strings, an object array `(rows,)`.

    Raises:
        ValueError: If they are not one int64 >= 0 or one string per row, or two are the same.

    Examples:
        >>> check_ids(None, 3).tolist()
        [0, 1, 2]
        >>> check_ids(["ant", "wren"], 2).tolist()
        ['ant', 'wren']
    """
    if ids is None:
        return np.arange(rows, dtype=np.int64)
    checked = _as_ids("ids", ids)
    if checked.shape != (rows,) or not _are_ids(checked):
        raise ValueError(
            "ids must be one int64 >= 0, or one string that is not empty, per gallery row. "
            f"Received: {_described(checked)} ids of shape {checked.shape} for {rows} rows. "
            "Give one per row; an index built without any numbers its rows from 0."
        )
    repeated = rows - len(set(checked.tolist()) if is_text(checked) else np.unique(checked))
    if repeated:
        raise ValueError(
            "ids must differ from row to row. "
            f"Received: {repeated} that repeat another. Give every row its own."
        )
    return checked if is_text(checked) else checked.astype(np.int64)


def check_among(among: npt.ArrayLike, name: str = "among") -> npt.NDArray[Any]:
    """Return the ids of a filter.

    Args:
        among: The ids, `(n,)`.
        name: What the caller calls them, for the error.

    Raises:
        ValueError: If they are not int64 >= 0, or strings, in one dimension.

    Examples:
        >>> check_among([7, 2, 7]).tolist()
        [7, 2, 7]
    """
    rule = f"{name} must be int64 ids >= 0, or strings, in one dimension."
    all_rows = ", or leave it out for all" if name == "among" else ""
    return check_some_ids(among, name, rule, f"Give the ids that may be returned{all_rows}.")


def check_some_ids(ids: npt.ArrayLike, name: str, rule: str, remedy: str) -> npt.NDArray[Any]:
    """Return ids in one dimension: int64, or strings as objects.

    Raises:
        ValueError: If they are something else; it says the rule and the remedy.

    Examples:
        >>> check_some_ids([7, 2, 7], "ids", "", "").tolist()
        [7, 2, 7]
    """
    checked = _as_ids(name, ids)
    if checked.ndim != 1 or not (_are_ids(checked) or not checked.size):
        received = f"{_described(checked)} of shape {checked.shape}"
        raise ValueError(f"{rule} Received: {received}. {remedy}")
    return checked if is_text(checked) and checked.size else checked.astype(np.int64)


def _as_ids(name: str, ids: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return ids as an array, in which NumPy has not made strings of numbers."""
    is_list = isinstance(ids, list | tuple) and any(isinstance(value, str) for value in ids)
    array = as_array(name, ids, is_text=is_list)
    return array.astype(object) if array.dtype.kind in "UT" else array


def _are_ids(values: npt.NDArray[Any]) -> bool:
    if values.dtype.kind == "O":
        return values.ndim == 1 and all(map(is_name, values.tolist()))
    return bool(
        values.dtype.kind in "iu"
        and not (values < 0).any()
        and not (values > np.iinfo(np.int64).max).any()
    )


def is_name(value: object) -> bool:
    """Return whether a value is a string that is not empty and that UTF-8 can write.

    Examples:
        >>> is_name("ant"), is_name("")
        (True, False)
    """
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _described(values: npt.NDArray[Any]) -> str:
    kinds = {type(value).__name__ for value in values.ravel().tolist()}
    if values.dtype.kind != "O" or "str" not in kinds:
        return str(values.dtype)
    return " and ".join(sorted(kinds))
