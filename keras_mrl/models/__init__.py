"""Models: a backbone and a nested head as one, encoders, language models, and `cut`."""

from .classifier import MatryoshkaClassifier as MatryoshkaClassifier
from .costs import Costs as Costs
from .costs import Work as Work
from .costs import measure_costs as measure_costs
from .costs import suggest_exits as suggest_exits
from .cut import cut as cut
from .cut import embedder as embedder
from .cut import freeze_before as freeze_before
from .cut import split as split
from .decoding import AdaptiveDecoder as AdaptiveDecoder
from .decoding import generate as generate
from .decoding import most_likely as most_likely
from .decoding import sampler as sampler
from .encoder import MatryoshkaEncoder as MatryoshkaEncoder
from .language import causal_transformer as causal_transformer
from .language import funnel_top_k as funnel_top_k
from .language import next_token as next_token
from .segments import Segment as Segment
from .segments import Segments as Segments
from .segments import segment as segment
