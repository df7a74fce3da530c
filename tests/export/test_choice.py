"""Which signatures are written: all of the model's, or those that were asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_export import export_saved_model
from keras_mrl_export.arguments import check_policy_is_used, chosen_signatures
from keras_mrl_serving import Client, FunnelSchedule, NoCascadeError
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.server import DevServer
from tests.helpers import export_models as models
from tests.helpers.export_models import DIMS, Exported, only_tensorflow

pytestmark = pytest.mark.backend

POLICY = CascadePolicy((Stage(2, 0.5), Stage(4, None)))
INDEX = ExactIndex.build(np.eye(8, 4, dtype=np.float32), FunnelSchedule((2, 4), (3,), 1))


def chosen(asked: Any, policy: Any = POLICY, index: Any = None) -> tuple[str, ...]:
    return chosen_signatures(asked, (2, 4), True, policy, index)


def test_all_unless_some_are_asked_for() -> None:
    assert chosen(None) == (
        *("embed_2", "embed_4", "classify_2", "classify_4", "features", "head_2", "head_4"),
        "classify_adaptive",
    )
    assert chosen(None, index=INDEX)[-4:] == ("retrieve", "search", "search_2", "search_4")
    assert chosen_signatures(None, (8,), False, None, None) == ("embed_8", "features")


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (["embed"], ("embed_2", "embed_4")),
        ("embed", ("embed_2", "embed_4")),
        (["head_4", "embed_2", "embed_2"], ("embed_2", "head_4")),
        (["classify"], ("classify_2", "classify_4")),
        (["classify_adaptive"], ("classify_adaptive",)),
        (["describe", "serving_default"], ()),
        ([], ()),
    ],
)
def test_names_and_families(asked: Any, names: tuple[str, ...]) -> None:
    assert chosen(asked) == names


def test_search_is_the_funnel_and_its_family() -> None:
    assert chosen(["search"], index=INDEX) == ("search", "search_2", "search_4")


def test_what_the_model_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="signatures must be of those") as caught:
        chosen_signatures(["embed", "classify", "embed_3"], (2, 4), False, None, None)
    assert str(caught.value) == (
        "signatures must be of those the model can have: embed_2, embed_4, features. "
        "Received: 'classify', 'embed_3'. Give those names, or a family of them: \"embed\"."
    )


def test_a_policy_that_no_signature_uses_is_refused() -> None:
    warm = CascadePolicy((Stage(2, 0.5, 3.0), Stage(4, None)))
    refused = [
        (POLICY, ["embed", "classify", "head"]),
        (warm, ["embed", "classify_4", "features"]),
    ]
    for policy, signatures in refused:
        with pytest.raises(ValueError, match="policy") as caught:
            check_policy_is_used(policy, chosen(signatures, policy), (2, 4))
        assert str(caught.value) == (
            "policy is what classify_adaptive decides by, and its temperatures are those of "
            "classify_<m>. Received: a policy, and signatures that use neither. "
            "Add classify_adaptive to signatures, or leave policy out."
        )
    default = CascadePolicy((Stage(2, 0.5), Stage(4, None, 3.0)))
    used = [(warm, ["head_2"]), (warm, ["classify"]), (POLICY, ["classify_adaptive"])]
    for policy, signatures in [*used, (default, ["embed"])]:
        check_policy_is_used(policy, chosen(signatures, policy), (2, 4))
    check_policy_is_used(POLICY, chosen(None), (2, 4))
    check_policy_is_used(None, chosen(["embed"], None), (2, 4))


@only_tensorflow
def test_without_its_signature_a_policy_is_temperatures_alone(
    untied: Exported, tmp_path: Path
) -> None:
    sample = models.given(untied.rows, slice(0, 4))
    path = export_saved_model(
        untied.model, tmp_path, sample, untied.policy, signatures=["classify_2", "features"]
    )
    with DevServer(tmp_path) as target, Client(target) as client:
        assert client.describe().cascade is None
        with pytest.raises(NoCascadeError, match="exported without one"):
            client.classify_adaptive(untied.rows[""][:4])
    with SavedModelSession(path) as session:
        np.testing.assert_allclose(
            session.run("classify_2", untied.inputs(slice(0, 4)))["confidence"],
            untied.ask("classify_2", slice(0, 4))["confidence"],
            rtol=1e-5,
        )
    with pytest.raises(ValueError, match="signatures that use neither"):
        export_saved_model(
            untied.model, tmp_path, sample, POLICY, dims=(2, 4), signatures=["classify_2"]
        )


@only_tensorflow
def test_nothing_else_is_written(untied: Exported, tmp_path: Path) -> None:
    sample = models.given(untied.rows, slice(0, 4))
    path = export_saved_model(
        untied.model, tmp_path, sample, untied.policy, signatures=["classify_adaptive", "embed_4"]
    )
    with SavedModelSession(path) as session:
        assert session.signatures.keys() - {"__saved_model_init_op"} == {
            *("classify_adaptive", "embed_4", "serving_default", "describe")
        }
        default = session.run("serving_default", untied.inputs(slice(0, 4)))
        np.testing.assert_allclose(
            default["confidence"],
            untied.ask(f"classify_{DIMS[-1]}", slice(0, 4))["confidence"],
            rtol=1e-5,
        )
