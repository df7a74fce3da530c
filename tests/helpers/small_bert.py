"""A text backbone of keras-hub, small, on random weights, and its preprocessor."""

from typing import Any

import keras

from tests.helpers.vision_backbones import imported


def bert(
    vocabulary_size: int = 20, num_layers: int = 2, max_sequence_length: int = 6
) -> keras.Model:
    return imported("keras_hub").models.BertBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=num_layers,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        dropout=0.0,
        max_sequence_length=max_sequence_length,
        name="net",
    )


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"pay the bill call mum at noon a b e".split(),
]


def preprocessor(sequence_length: int = 6, words: Any = WORDS) -> Any:
    models = imported("keras_hub").models
    tokenizer = models.BertTokenizer(vocabulary=words, lowercase=True)
    return models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=sequence_length)
