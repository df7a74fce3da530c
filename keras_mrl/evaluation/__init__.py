"""Evaluation: the quality of every dim on one's own data, in numbers and figures."""

from .evaluate import evaluate as evaluate
from .evaluate import expected_calibration_error as expected_calibration_error
from .evaluate import score_embeddings as score_embeddings
from .evaluate import score_head as score_head
from .multilabel import score_multilabel as score_multilabel
from .neighbors import mean_average_precision_at_k as mean_average_precision_at_k
from .neighbors import precision_at_k as precision_at_k
from .plots import plot_accuracy as plot_accuracy
from .plots import plot_by_cost as plot_by_cost
from .plots import plot_by_dim as plot_by_dim
from .plots import plot_cascade as plot_cascade
from .plots import plot_retrieval as plot_retrieval
from .probe import LinearProbe as LinearProbe
from .probe import linear_probe as linear_probe
from .projection import ProjectionReport as ProjectionReport
from .projection import score_projection as score_projection
from .quality import Quality as Quality
from .regression import score_regression as score_regression
from .retrieval import evaluate_retrieval as evaluate_retrieval
from .retrieval import score_retrieval as score_retrieval
from .similarity import evaluate_similarity as evaluate_similarity
from .similarity import score_similarity as score_similarity
from .tokens import TokenScores as TokenScores
from .tokens import learn_decoding_policy as learn_decoding_policy
from .tokens import score_tokens as score_tokens
