"""Every signature is run once by the server before it answers anyone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.warmup import WARMUP_FILE, write_warmup
from keras_mrl_serving import Client
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.server import DevServer
from tests.helpers.export_models import (
    Exported,
    X,
    dense,
    warmup_records,
    warmup_sizes,
    written_signatures,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_saved_model(dense(), tmp_path_factory.mktemp("small"), X)


def test_one_record_of_one_row_per_signature(encoder: Exported) -> None:
    expected = {name: [1] for name in written_signatures(encoder.session)}
    assert warmup_sizes(encoder.path) == expected


def test_records_hold_real_rows(encoder: Exported) -> None:
    inputs = dict(warmup_records(encoder.path))["features"]
    np.testing.assert_array_equal(inputs["inputs"], encoder.rows[""][:1])


def test_batch_sizes_are_the_users_to_choose(tmp_path: Path) -> None:
    for sizes in ((1, 5), ()):
        path = export_saved_model(
            dense(), tmp_path, X, signatures=["embed_8"], warmup_batch_sizes=sizes
        )
        if sizes:
            expected = ("embed_8", "serving_default", "describe")
            assert warmup_sizes(path) == {name: [1, 5] for name in expected}
        else:
            assert not (path / WARMUP_FILE).exists()


def test_a_server_takes_them(small: Path) -> None:
    with DevServer(small.parent, model_name="m") as target, Client(target, "m") as client:
        assert client.embed(X[:3], dim=8).shape == (3, 8)


def refusal(version: Path, inputs: Any, batch_sizes: Any) -> str:
    with SavedModelSession(version) as session, pytest.raises(ExportError) as caught:
        write_warmup(version, session, "m", inputs, batch_sizes)
    return str(caught.value)


def test_more_than_a_server_takes(small: Path) -> None:
    before = (small / WARMUP_FILE).read_bytes()
    inputs = {name: {"x": X} for name in ("embed_8", "features", "serving_default")}
    assert refusal(small, inputs, range(1, 400)) == (
        "A server takes no more than 1000 warm-up records. "
        "Received: 3 signatures at 399 batch sizes. "
        "Give fewer warmup_batch_sizes, or fewer signatures."
    )
    assert (small / WARMUP_FILE).read_bytes() == before


def test_a_record_that_fails_keeps_the_version_back(tmp_path: Path) -> None:
    path = export_saved_model(dense(), tmp_path, X, warmup_batch_sizes=())
    text = refusal(path, {"embed_8": {"x": X[:, :3]}}, (1,))
    assert text.startswith(
        "Every warm-up record must run, or no server loads the version. Received: embed_8 fails: "
    )
    assert text.endswith("Give a sample of rows that the model can take.")
