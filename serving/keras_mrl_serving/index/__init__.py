"""Indexes: galleries that a funnel searches. FAISS and Qdrant are imported when they are used."""

from .base import Index as Index
from .exact import ExactIndex as ExactIndex
from .faiss import FaissIndex as FaissIndex
from .first_stage import FirstStage as FirstStage
from .open import open_index as open_index
from .plan import Choice as Choice
from .plan import Plan as Plan
from .planner import plan_funnel as plan_funnel
from .qdrant import QdrantIndex as QdrantIndex
