"""Callbacks that watch an entry of one dim find their mode before the first epoch."""

from typing import Any

import keras
import pytest

from keras_mrl import ContrastiveLoss, MatryoshkaEncoder, MatryoshkaMetric, Perplexity
from keras_mrl.callbacks import AcrossDims, NeighborMetrics
from tests.helpers.laws import exactly
from tests.helpers.small_models import DIMS, X, Y, accuracy, backbone, classifier

pytestmark = pytest.mark.backend

MODES = {
    "val_accuracy_2": "max",
    "perplexity_8": "min",
    "val_perplexity_mean": "min",
    "val_accuracy_worst": "max",
    "val_1nn_4": "max",
    "val_map10_8": "max",
}


def test_callbacks_of_keras_take_the_mode_of_what_they_watch() -> None:
    model = classifier(metrics=[accuracy(), MatryoshkaMetric(Perplexity(), DIMS)])
    stopping = [keras.callbacks.EarlyStopping(monitor=entry) for entry in MODES]
    own = keras.callbacks.ReduceLROnPlateau(monitor="val_accuracy_4", mode="min")
    writers = [
        NeighborMetrics((X, Y), (X, Y)),
        AcrossDims("accuracy"),
        AcrossDims("perplexity", lower_is_better=True),
    ]
    callbacks = [*writers, *stopping, own]
    model.fit(X, Y, validation_data=(X, Y), epochs=2, verbose=0, callbacks=callbacks)
    assert {callback.monitor: callback.mode for callback in stopping} == MODES
    assert own.mode == "min"  # what the caller says stays


def test_recall_of_an_encoder_rises() -> None:
    encoder = MatryoshkaEncoder(backbone())
    encoder.compile("sgd", ContrastiveLoss(DIMS))
    stop = keras.callbacks.EarlyStopping(monitor="recall_4")
    encoder.fit(x=(X, X), epochs=2, verbose=0, callbacks=[stop])
    assert stop.best is not None
    assert bool(stop.monitor_op(2, 1))


class Undirected(keras.metrics.SparseCategoricalAccuracy):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        del self._direction


def test_a_metric_that_does_not_say_is_asked_for_at_once() -> None:
    model = classifier(metrics=[MatryoshkaMetric(Undirected(name="own"), DIMS)])
    text = (
        "A callback must know whether more of what it watches is better. "
        "Received: EarlyStopping(monitor='val_own_4'), whose metric does not say. "
        "Write EarlyStopping(monitor='val_own_4', mode='max'), or mode='min'."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        model.fit(X, Y, callbacks=[keras.callbacks.EarlyStopping("val_own_4")], verbose=0)
