"""Losses: any Keras loss at every dim, on logits and on embeddings; contrastive ones."""

from .contrastive import ContrastiveLoss as ContrastiveLoss
from .crossentropy import NestedCrossentropy as NestedCrossentropy
from .crossentropy import nested_crossentropy as nested_crossentropy
from .embedding import MatryoshkaEmbeddingLoss as MatryoshkaEmbeddingLoss
from .matryoshka import MatryoshkaLoss as MatryoshkaLoss
from .supervised import SupervisedContrastiveLoss as SupervisedContrastiveLoss
from .weights import first_boosted as first_boosted
