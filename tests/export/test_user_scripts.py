"""A model trained in a script of the user's own exports from it, and the script runs once."""

import os
from concurrent.futures import Future

import keras
import pytest

from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from tests.helpers.user_scripts import SCRIPTS, Ran

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_exports_parts_of_its_own_and_runs_once(
    scripts: dict[str, Future[Ran]], name: str
) -> None:
    ran = scripts[name].result()
    assert ran.status == 0, ran.err
    version = ran.base_path / "1"
    on_tensorflow = keras.backend.backend() == "tensorflow"
    # Importing the export imports TensorFlow only where Keras runs on it.
    assert ran.out.splitlines() == [str(on_tensorflow), "training", str(version)]
    assert ran.notes.read_text() == "once\n"
    assert os.listdir(ran.base_path) == ["1"]
    manifest = Manifest.from_json((version / MANIFEST_FILE).read_bytes())
    assert manifest.made_with["trained_on"] == keras.backend.backend()
    with SavedModelSession(version) as session:
        assert "classify_8" in session.signatures
