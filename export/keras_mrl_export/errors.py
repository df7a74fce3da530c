"""What can go wrong when a model is exported."""

from __future__ import annotations


class ExportError(Exception):
    """The model could not be written as a SavedModel that equals it; nothing was published."""
