"""Indexes: galleries that a funnel searches."""

from .exact import ExactIndex as ExactIndex
from .protocol import Index as Index
