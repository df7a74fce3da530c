"""Which FAISS index is the first stage of a funnel, and how hard it looks."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

EFFORTS = ("efSearch", "nprobe")

_SETTING = r"[A-Za-z_]+=[0-9]+(\.[0-9]+)?"
_SETTINGS = re.compile(f"{_SETTING}(,{_SETTING})*")


@dataclass(frozen=True)
class FirstStage:
    """Which FAISS index looks at the whole gallery, and how hard.

    Args:
        factory: What `faiss.index_factory` understands, over the prefixes of the first dim:
            "Flat", "HNSW32", "IVF1024,Flat", "IVF1024,PQ16x4fs", "HNSW32_SQ8", "RaBitQ"; or what
            `faiss.index_binary_factory` does, over their signs: "BFlat", "BHNSW32".
        settings: What FAISS is set to when it searches: "efSearch=64" of a graph, "nprobe=8" of
            inverted lists; several with commas. Empty leaves FAISS's own, which are low.

    Raises:
        ValueError: If the settings are not names with numbers, or search nothing.

    Examples:
        >>> FirstStage("IVF1024,Flat", "nprobe=8").is_binary
        False
    """

    factory: str
    settings: str = ""

    def __post_init__(self) -> None:
        """Check the settings."""
        are_named = not self.settings or _SETTINGS.fullmatch(self.settings)
        if not are_named or any(
            name in EFFORTS and float(value) < 1 for name, value in self._values()
        ):
            raise ValueError(
                "settings must be names with numbers, and look at 1 place at least. "
                f"Received: {self.settings!r}. Write for example 'efSearch=64'."
            )

    def _values(self) -> list[tuple[str, str]]:
        pairs = (setting.partition("=") for setting in filter(None, self.settings.split(",")))
        return [(name, value) for name, _, value in pairs]

    @classmethod
    def usual(cls, factory: str) -> FirstStage:
        """Return one that looks as hard as most galleries need.

        Examples:
            >>> FirstStage.usual("HNSW32").settings, FirstStage.usual("Flat").settings
            ('efSearch=64', '')
        """
        return cls(factory, _settings(factory, 64, 8))

    @classmethod
    def least(cls, factory: str) -> FirstStage:
        """Return one that looks no harder than makes sense: where a planner begins.

        Examples:
            >>> FirstStage.least("IVF1024,Flat").settings
            'nprobe=1'
        """
        return cls(factory, _settings(factory, 16, 1))

    @property
    def is_binary(self) -> bool:
        """Whether it looks at signs alone, one bit per coordinate."""
        return self.factory.startswith("B")


def lists_for(rows: int) -> int:
    """Return how many inverted lists suit a gallery: a power of two near 4 * sqrt(rows).

    Examples:
        >>> lists_for(1_000_000)
        4096
    """
    return int(2 ** round(np.log2(4 * np.sqrt(rows))))


def check_first_stage(given: object) -> FirstStage:
    """Return a first stage, or say that it is none.

    Examples:
        >>> check_first_stage(FirstStage("Flat"))
        FirstStage(factory='Flat', settings='')
    """
    if not isinstance(given, FirstStage):
        raise TypeError(
            f"A first stage is a FirstStage. Received: {given!r}. "
            "Write FirstStage('HNSW32', 'efSearch=64')."
        )
    return given


def _settings(factory: str, graph: int, lists: int) -> str:
    if "IVF" in factory:
        return f"nprobe={lists}"
    return f"efSearch={graph}" if "HNSW" in factory else ""
