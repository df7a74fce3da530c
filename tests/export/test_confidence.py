"""A version whose cascade stops by another measure than the largest probability."""

from pathlib import Path

import numpy as np
import pytest

from keras_mrl_serving.cascade.confidence import confidence_of, midway
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from tests.helpers.export_models import DIMS, TEMPERATURES, Exported, assert_equal_rows, exported

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("measure", ["margin", "entropy"])
def test_every_class_signature_tells_it(untied: Exported, tmp_path: Path, measure: str) -> None:
    logits = untied.logits
    stages = []
    for index, dim in enumerate(DIMS[:-1]):
        sure = np.sort(confidence_of(measure, logits[:, index], TEMPERATURES[dim]))
        stages.append(Stage(dim, midway(sure, len(sure) // 2), TEMPERATURES[dim]))
    policy = CascadePolicy((*stages, Stage(DIMS[-1], None)), measure)
    with exported(untied.model, untied.backbone, untied.rows, tmp_path / "m", policy) as version:
        assert version.manifest.cascade == policy.to_json()
        everything = slice(0, None)
        for index, stage in enumerate(policy.stages):
            prefix = {"features": untied.features[:, : stage.dim]}
            head = version.session.run(f"head_{stage.dim}", prefix)
            expected = confidence_of(measure, head["logits"], stage.temperature)
            np.testing.assert_allclose(head["confidence"], expected, rtol=2e-5, atol=2e-6)
            # The model's own logits, on another backend, may be off by the contract's tolerance.
            answer = version.ask(f"classify_{stage.dim}", everything)
            off = 2e-5 * np.abs(logits[:, index]).max(axis=-1) / stage.temperature
            expected = confidence_of(measure, logits[:, index], stage.temperature)
            assert (np.abs(answer["confidence"] - expected) <= np.maximum(off, 2e-6)).all()
        answer = version.ask("classify_adaptive", everything)
        class_ids, stage_of = policy.route(logits)
        assert_equal_rows(answer["dim"], np.array(DIMS)[stage_of])
        assert_equal_rows(answer["class_ids"][:, 0], class_ids)
        assert len(set(answer["dim"].tolist())) == len(DIMS)
