"""Losses: any Keras loss at every dim."""

from .matryoshka import MatryoshkaLoss as MatryoshkaLoss
