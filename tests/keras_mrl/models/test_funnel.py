"""The best classes by a funnel through the dims of a head."""

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaHead, funnel_top_k
from keras_mrl_serving import ExactIndex, FunnelSchedule
from tests.helpers.laws import exactly
from tests.helpers.small_models import as_numpy

pytestmark = pytest.mark.backend

CLASSES, WIDTH, DIMS = 300, 16, (4, 8, 16)
FEATURES = np.random.default_rng(0).normal(size=(9, WIDTH)).astype("float32")
HEADS = {
    "untied": lambda: MatryoshkaHead(CLASSES, DIMS),
    "tied": lambda: MatryoshkaHead(CLASSES, DIMS, tied=True),
    "without bias": lambda: MatryoshkaHead(CLASSES, DIMS, tied=True, use_bias=False),
}


def made(kind: str) -> MatryoshkaHead:
    head = HEADS[kind]()
    head.build((None, WIDTH))
    random = np.random.default_rng(1)
    head.set_weights([random.normal(size=w.shape) for w in head.weights])
    return head


def funnel(head: MatryoshkaHead, schedule: FunnelSchedule) -> tuple[np.ndarray, np.ndarray]:
    ids, scores = funnel_top_k(head, keras.ops.convert_to_tensor(FEATURES), schedule)
    return as_numpy(ids), as_numpy(scores)


@pytest.mark.parametrize("kind", HEADS)
def test_with_every_class_on_the_shortlist_it_is_exact(kind: str) -> None:
    head = made(kind)
    ids, scores = funnel(head, FunnelSchedule((4, 16), (CLASSES,), k=5))
    logits = as_numpy(head(FEATURES))[:, -1]
    expected = np.argsort(-logits, axis=1)[:, :5]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(logits, expected, 1), rtol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_each_stage_picks_from_the_one_before_it_by_its_own_logits(kind: str) -> None:
    head = made(kind)
    logits = as_numpy(head(FEATURES))
    ids, scores = funnel(head, FunnelSchedule((4, 8, 16), (40, 12), k=3))
    for row in range(len(FEATURES)):
        known = np.argsort(-logits[row, 0])[:40]
        known = known[np.argsort(-logits[row, 1, known])[:12]]
        known = known[np.argsort(-logits[row, 2, known])[:3]]
        np.testing.assert_array_equal(ids[row], known)
        np.testing.assert_allclose(scores[row], logits[row, 2, known], rtol=1e-4, atol=1e-4)


def test_one_stage_is_top_k_of_its_dim() -> None:
    head = made("untied")
    ids, _ = funnel(head, FunnelSchedule((8,), (), k=4))
    np.testing.assert_array_equal(ids, np.argsort(-as_numpy(head(FEATURES))[:, 1])[:, :4])


def test_a_tied_head_is_a_gallery_of_its_classes() -> None:
    """The same funnel over the transposed kernel, as an index counts it."""
    head = made("without bias")
    schedule = FunnelSchedule((4, 8, 16), (40, 12), k=3)
    index = ExactIndex.build(as_numpy(head.weights_at(16)[0]).T, schedule, metric="dot")
    np.testing.assert_array_equal(funnel(head, schedule)[0], index.search(FEATURES).ids)


def test_a_shortlist_of_more_classes_than_there_are_is_refused() -> None:
    sentence = (
        "A shortlist must not hold more classes than there are. "
        "Received: 301 of 300 classes. Shorten it to at most 300."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        funnel(made("tied"), FunnelSchedule((4, 16), (301,), k=3))


def test_only_dims_of_the_head_make_stages() -> None:
    sentence = (
        "dim must be one of the dims of the head. "
        "Received: dim=6 for dims=(4, 8, 16). Choose one of those."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        funnel(made("tied"), FunnelSchedule((6, 16), (30,), k=3))
