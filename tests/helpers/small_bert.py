"""A text backbone of keras-hub, small, on random weights."""

import keras

from tests.helpers.vision_backbones import imported


def bert() -> keras.Model:
    return imported("keras_hub").models.BertBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        dropout=0.0,
        max_sequence_length=6,
        name="net",
    )
