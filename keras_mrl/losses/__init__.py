"""Losses: any Keras loss at every dim, on logits and on embeddings; contrastive ones."""

from .contrastive import ContrastiveLoss as ContrastiveLoss
from .embedding import MatryoshkaEmbeddingLoss as MatryoshkaEmbeddingLoss
from .matryoshka import MatryoshkaLoss as MatryoshkaLoss
from .supervised import SupervisedContrastiveLoss as SupervisedContrastiveLoss
from .weights import first_boosted as first_boosted
