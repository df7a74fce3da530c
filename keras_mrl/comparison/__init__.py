"""Comparison of Matryoshka with its alternatives on one's own images: train, judge, report."""

from .compare import compare as compare
from .data import ComparisonError as ComparisonError
from .plan import Plan as Plan
