from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mrl import ContrastiveLoss, MatryoshkaEncoder
from keras_mrl_export import export_saved_model
from keras_mrl_serving import truncate
from keras_mrl_serving._session import SavedModelSession

pytestmark = pytest.mark.backend

X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)


def test_an_encoder_is_exported_as_its_tower(tmp_path: Path) -> None:
    tower = keras.Sequential([keras.Input((5,), name="x"), keras.layers.Dense(4)])
    encoder = MatryoshkaEncoder(tower, initial_temperature=0.1)
    encoder.compile("adam", ContrastiveLoss(dims=(2, 4)), run_eagerly=True)
    encoder.fit((X, 2 * X), verbose=0)
    exported = export_saved_model(encoder, tmp_path, X, dims=(2, 4))
    with SavedModelSession(exported) as session:
        (embedded,) = session.run("embed_2", {"x": X}).values()
    expected = truncate(encoder.predict(X, verbose=0), 2)
    np.testing.assert_allclose(embedded, expected, rtol=0, atol=1e-5)
