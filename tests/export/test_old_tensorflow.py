"""What is exported here loads and answers alike in the older TensorFlows that people serve with.

Each version is installed into an environment of its own, which is thrown away. It needs a
registry, a minute and 1.6 GB of disk: `make soak` runs it.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl import next_token
from keras_mrl_export import export_saved_model
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from tests.helpers import export_models as models
from tests.helpers import old_tensorflow, text_models
from tests.helpers.export_images import DECODER, EXACT, encoded, model_of_images
from tests.helpers.export_models import (
    DIMS,
    Arrays,
    assert_equal_rows,
    halving_policy,
    outputs,
    warmup_records,
    written_signatures,
)
from tests.helpers.language_models import LENGTH, TOKENS, language_model

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        not os.environ.get("KERAS_MRL_SOAK"), reason="installs TensorFlow; `make soak` runs it"
    ),
]
ROWS = 5


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Arrays]]:
    """Each exported version with inputs for every signature: those of its warm-up records."""
    folder = tmp_path_factory.mktemp("exported")
    more: dict[str, Any] = {"warmup_batch_sizes": (ROWS,)}
    images, classifier = models.images(), models.untied()
    gallery = outputs(classifier.backbone, images)
    index = ExactIndex.build(gallery, FunnelSchedule(DIMS, (20, 10), 4), metric="cosine")
    policy = halving_policy(outputs(classifier, images))
    files = [encoded(pixels) for pixels in (*EXACT, EXACT[0][::-1])]
    words = next_token(language_model(tied=True, dims=(2, 8)))
    texts = np.arange(3 * LENGTH, dtype=np.int32).reshape(3, LENGTH) % TOKENS

    def of_texts(name: str, kind: str, **settings: Any) -> Path:
        model, sample = text_models.encoder(kind), [*text_models.TEXTS]
        own = text_models.wordpiece(**settings) if settings else text_models.preprocessor(kind)
        return export_saved_model(model, folder / name, sample, preprocessor=own, **more)

    paths = [
        *(of_texts(kind, kind) for kind in text_models.KINDS),
        export_saved_model(
            classifier, folder / "all", images[:16], policy, models.NAMES, index=index, **more
        ),
        export_saved_model(models.of_tokens(), folder / "tokens", models.tokens(), **more),
        export_saved_model(words, folder / "words", texts, **more),
        export_saved_model(model_of_images(), folder / "bytes", files, decoder=DECODER, **more),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow_text", None)
        paths.append(of_texts("without tensorflow-text", "wordpiece", strip_accents=True))
    return {path: dict(warmup_records(path)) for path in paths}


@contextmanager
def installed(version: str) -> Iterator[Path]:
    """The Python of an environment with this TensorFlow, and tensorflow-text of its version."""
    small = sys.platform == "linux" and platform.machine() == "x86_64"
    package = "tensorflow-cpu" if small else "tensorflow"
    with tempfile.TemporaryDirectory(prefix="keras-mrl-old-tensorflow-") as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", f"{package}=={version}"]
        subprocess.run(install, check=True)
        # By its own needs it brings a second TensorFlow beside tensorflow-cpu.
        text = f"tensorflow-text=={version.rpartition('.')[0]}.*"
        subprocess.run([*install[:-1], "--no-deps", text], check=True)
        yield python


@pytest.mark.parametrize("version", ["2.16.2", "2.20.0"])
def test_it_answers_as_the_present_tensorflow(
    version: str, versions: dict[Path, dict[str, Arrays]], tmp_path: Path
) -> None:
    if version < "2.20" and sys.version_info >= (3, 13):
        pytest.skip("there is no such TensorFlow for this Python")
    questions = {
        str(path): {
            name: {key: old_tensorflow.to_json(value) for key, value in inputs.items()}
            for name, inputs in signatures.items()
        }
        for path, signatures in versions.items()
    }
    files = [str(tmp_path / name) for name in ("questions.json", "answers.json")]
    Path(files[0]).write_text(json.dumps(questions))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with installed(version) as python:
        done = subprocess.run(
            [str(python), old_tensorflow.__file__, *files],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    old = json.loads(Path(files[1]).read_text())
    assert old["tensorflow"] == version
    for path, signatures in versions.items():
        with SavedModelSession(path) as session:
            assert set(signatures) == written_signatures(session)
            for name, inputs in signatures.items():
                expected = session.run(name, inputs)
                answer = old["answers"][str(path)][name]
                assert set(answer) == set(expected)
                for key, value in expected.items():
                    assert_equal_rows(old_tensorflow.from_json(answer[key]), value)
