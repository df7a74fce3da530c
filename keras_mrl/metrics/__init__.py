"""Metrics: any Keras metric at every dim."""

from .matryoshka import MatryoshkaMetric as MatryoshkaMetric
from .perplexity import Perplexity as Perplexity
