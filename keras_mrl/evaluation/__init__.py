"""Evaluation: what the dims are worth on one's own data, in numbers and pictures."""

from .plots import plot_accuracy as plot_accuracy
from .plots import plot_retrieval as plot_retrieval
from .retrieval import mean_average_precision_at_k as mean_average_precision_at_k
from .retrieval import precision_at_k as precision_at_k
