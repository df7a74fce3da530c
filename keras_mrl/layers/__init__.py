"""Layers: the nested head, and the prefix of an embedding."""

from .head import MatryoshkaHead as MatryoshkaHead
from .truncate import Truncate as Truncate
