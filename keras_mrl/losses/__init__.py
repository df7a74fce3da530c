"""Losses: any Keras loss at every dim, on logits or on embeddings, and contrastive losses."""

from .crossentropy import NestedCrossentropy as NestedCrossentropy
from .crossentropy import nested_crossentropy as nested_crossentropy
from .embedding import ContrastiveLoss as ContrastiveLoss
from .embedding import MatryoshkaEmbeddingLoss as MatryoshkaEmbeddingLoss
from .embedding import SupervisedContrastiveLoss as SupervisedContrastiveLoss
from .matryoshka import MatryoshkaLoss as MatryoshkaLoss
from .targets import Teacher as Teacher
from .weights import first_boosted as first_boosted
