"""Build an index of a gallery's embeddings, and look at one that is there.

An index is a folder. It answers by a funnel: a short prefix of every row finds a shortlist, and
wider prefixes narrow that down. `keras-mrl search` asks it.

  keras-mrl index build --embeddings E.npy --out birds.index --target-recall 0.98
  keras-mrl index show birds.index
"""

from __future__ import annotations

from types import ModuleType

from .indexing import build, show

COMMANDS: dict[str, ModuleType] = {"build": build, "show": show}
