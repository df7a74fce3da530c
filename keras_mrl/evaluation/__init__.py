"""Evaluation: what the dims are worth on one's own data, in numbers and pictures."""

from .calibration import expected_calibration_error as expected_calibration_error
from .decoding import learn_decoding_policy as learn_decoding_policy
from .heads import score_head as score_head
from .model import evaluate as evaluate
from .plots import plot_accuracy as plot_accuracy
from .plots import plot_by_cost as plot_by_cost
from .plots import plot_by_dim as plot_by_dim
from .plots import plot_retrieval as plot_retrieval
from .probe import LinearProbe as LinearProbe
from .probe import linear_probe as linear_probe
from .retrieval import mean_average_precision_at_k as mean_average_precision_at_k
from .retrieval import precision_at_k as precision_at_k
from .scores import score_embeddings as score_embeddings
from .tokens import TokenScores as TokenScores
from .tokens import score_tokens as score_tokens
