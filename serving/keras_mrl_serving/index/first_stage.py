"""Which FAISS index looks at the whole gallery first, and how hard: `FirstStage` names it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import manifest_errors
from ..funnel import FunnelSchedule
from ..projection import Projection

EFFORTS = ("efSearch", "nprobe")

_SETTING = r"[A-Za-z_]+=[0-9]+(\.[0-9]+)?"
_SETTINGS = re.compile(f"{_SETTING}(,{_SETTING})*")
_HOLDS_ROWS = re.compile("Flat|HNSW[0-9]+(,Flat)?")


@dataclass(frozen=True)
class FirstStage:
    """Which FAISS index looks at the whole gallery, and how hard.

    Args:
        factory: What `faiss.index_factory` understands, over the prefixes of the first dim:
            "Flat", "HNSW32", "IVF1024,Flat", "IVF1024,PQ16x4fs", "HNSW32_SQ8", "RaBitQ"; or what
            `faiss.index_binary_factory` does, over their signs: "BFlat", "BHNSW32".
            "Projected96,HNSW32_SQ8" looks at the first 96 coordinates of `projection`.
        settings: FAISS's settings while it searches: "efSearch=64" of a graph, "nprobe=8" of
            inverted lists; several with commas. Empty leaves FAISS's own, which are low.
        projection: What a factory that begins with "Projected" looks at. It is needed to build,
            and saved inside the FAISS index.

    Raises:
        ValueError: If the settings are not names with numbers, or search nothing.

    Examples:
        >>> FirstStage("IVF1024,Flat", "nprobe=8").is_binary
        False
    """

    factory: str
    settings: str = ""
    projection: Projection | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        are_named = not self.settings or _SETTINGS.fullmatch(self.settings)
        if not are_named or any(
            name in EFFORTS and float(value) < 1 for name, value in settings_of(self.settings)
        ):
            raise ValueError(
                "settings must be names with numbers, and look at 1 place at least. "
                f"Received: {self.settings!r}. Write for example 'efSearch=64'."
            )

    @classmethod
    def usual(cls, factory: str) -> FirstStage:
        """Return a first stage that looks as hard as most galleries need.

        Examples:
            >>> FirstStage.usual("HNSW32").settings, FirstStage.usual("Flat").settings
            ('efSearch=64', '')
        """
        return cls(factory, _effort_setting(factory, graph=64, lists=8))

    @classmethod
    def least(cls, factory: str) -> FirstStage:
        """Return a first stage that looks no harder than makes sense: where a planner begins.

        Examples:
            >>> FirstStage.least("IVF1024,Flat").settings
            'nprobe=1'
        """
        return cls(factory, _effort_setting(factory, graph=16, lists=1))

    @classmethod
    def from_json(cls, saved: Any) -> FirstStage:
        """Read what was saved with an index.

        Raises:
            ManifestError: If `saved` is something else.

        Examples:
            >>> FirstStage.from_json({"factory": "HNSW32", "settings": "efSearch=64"}).settings
            'efSearch=64'
        """
        rule = "A first stage has a factory and settings, texts of one line."
        with manifest_errors(rule, saved, "wrote it"):
            factory, settings = saved["factory"], saved["settings"]
            if not (isinstance(factory, str) and isinstance(settings, str)):
                raise TypeError("they are no texts")
            if not factory.isprintable():
                raise ValueError("its factory does not print")
            return cls(factory, settings)

    def holds_rows(self, schedule: FunnelSchedule) -> bool:
        """Return whether it holds the rows of a schedule's only dim as they are, to be read there.

        Examples:
            >>> FirstStage("HNSW32").holds_rows(FunnelSchedule((64,), (), 10))
            True
        """
        return len(schedule.dims) == 1 and _HOLDS_ROWS.fullmatch(self.factory) is not None

    @property
    def is_binary(self) -> bool:
        """Whether it looks at signs alone, one bit per coordinate."""
        return self.factory.startswith("B")


def _effort_setting(factory: str, graph: int, lists: int) -> str:
    if "IVF" in factory:
        return f"nprobe={lists}"
    return f"efSearch={graph}" if "HNSW" in factory else ""


def settings_of(settings: str) -> list[tuple[str, str]]:
    """Return the names and values of settings.

    Examples:
        >>> settings_of("nprobe=8,k_factor=4")
        [('nprobe', '8'), ('k_factor', '4')]
    """
    pairs = (setting.partition("=") for setting in filter(None, settings.split(",")))
    return [(name, value) for name, _, value in pairs]


def check_first_stage(first_stage: object) -> FirstStage:
    """Return `first_stage` if it is a `FirstStage`.

    Raises:
        TypeError: If it is not.

    Examples:
        >>> check_first_stage(FirstStage("Flat"))
        FirstStage(factory='Flat', settings='')
    """
    if not isinstance(first_stage, FirstStage):
        raise TypeError(
            f"A first stage is a FirstStage. Received: {first_stage!r}. "
            "Write FirstStage('HNSW32', 'efSearch=64')."
        )
    return first_stage


def lists_for(rows: int) -> int:
    """Return how many inverted lists suit a gallery: a power of two near 4 * sqrt(rows).

    Examples:
        >>> lists_for(1_000_000)
        4096
    """
    return int(2 ** round(np.log2(4 * np.sqrt(rows))))


def import_faiss() -> Any:
    """Return the module `faiss`.

    Raises:
        ImportError: If FAISS is not installed.

    Examples:
        >>> import_faiss().__name__
        'faiss'
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "FaissIndex needs FAISS. "
            f"Received: {error}. Install it: pip install 'keras-mrl[faiss]'."
        ) from error
    return faiss
