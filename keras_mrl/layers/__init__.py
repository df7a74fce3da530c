"""Layers: the nested head, the prefix of an embedding, the positions of tokens."""

from .head import MatryoshkaHead as MatryoshkaHead
from .positions import LearnedPositions as LearnedPositions
from .truncate import Truncate as Truncate
