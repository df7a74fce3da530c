"""Losses: any Keras loss at every dim."""

from .matryoshka import MatryoshkaLoss as MatryoshkaLoss
from .weights import first_boosted as first_boosted
