"""TRAIN: Matryoshka representations in Keras 3, on TensorFlow, JAX and PyTorch.

Importing this package registers its layers with Keras, so that saved models load again.
"""

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    raise ImportError(
        "keras_mrl needs Keras and one of its backends. "
        f"Received: {error}. "
        "Install one: pip install 'keras-mrl[tensorflow]' (or [jax], [torch]). "
        "The client alone, keras_mrl_serving, needs none."
    ) from error

from keras_mrl_serving.version import __version__ as __version__

from . import baselines as baselines
from ._dims import log_spaced_dims as log_spaced_dims
from .adapt import MatryoshkaAdaptor as MatryoshkaAdaptor
from .align import align_exits as align_exits
from .callbacks import AcrossDims as AcrossDims
from .callbacks import CorpusRecall as CorpusRecall
from .callbacks import NeighborMetrics as NeighborMetrics
from .layers import LearnedPositions as LearnedPositions
from .layers import MatryoshkaHead as MatryoshkaHead
from .layers import Truncate as Truncate
from .losses import ContrastiveLoss as ContrastiveLoss
from .losses import MatryoshkaEmbeddingLoss as MatryoshkaEmbeddingLoss
from .losses import MatryoshkaLoss as MatryoshkaLoss
from .losses import NestedCrossentropy as NestedCrossentropy
from .losses import SupervisedContrastiveLoss as SupervisedContrastiveLoss
from .losses import Teacher as Teacher
from .losses import first_boosted as first_boosted
from .losses import nested_crossentropy as nested_crossentropy
from .metrics import MatryoshkaMetric as MatryoshkaMetric
from .metrics import Perplexity as Perplexity
from .models import AdaptiveDecoder as AdaptiveDecoder
from .models import MatryoshkaClassifier as MatryoshkaClassifier
from .models import MatryoshkaEncoder as MatryoshkaEncoder
from .models import causal_transformer as causal_transformer
from .models import cut as cut
from .models import embedder as embedder
from .models import freeze_before as freeze_before
from .models import funnel_top_k as funnel_top_k
from .models import generate as generate
from .models import measure_costs as measure_costs
from .models import most_likely as most_likely
from .models import next_token as next_token
from .models import sampler as sampler
from .models import segment as segment
from .models import split as split
from .models import suggest_exits as suggest_exits
from .text import TextEncoder as TextEncoder
