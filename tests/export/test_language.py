"""A language model, exported: tokens answer with the next one, and a text is written by asking."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import AdaptiveDecoder, MatryoshkaLoss, generate, next_token
from keras_mrl_export import export_saved_model
from keras_mrl_serving import CascadePolicy, Client
from keras_mrl_serving.cascade.policy import Stage
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from keras_mrl_serving.server import DevServer
from tests.helpers.language_models import LENGTH, TOKENS, WIDTH, language_model

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
# Mostly counted upwards: some tokens are easy to foretell, some are not.
STEPS = RANDOM.choice([1, 1, 1, 5], size=(96, LENGTH + 1))
TEXT = (np.cumsum(STEPS, axis=1) % TOKENS).astype("int32")
PROMPTS = TEXT[:5, :3]
DIMS = (2, 8)  # a signature of each kind per dim takes its time to trace


@dataclass(frozen=True)
class Served:
    """A trained model, its policy, and where its view of the next token was published."""

    model: Any
    policy: CascadePolicy
    path: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    keras.utils.set_random_seed(0)
    model = language_model(tied=True, dims=DIMS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), MatryoshkaLoss(loss))
    model.fit(TEXT[:, :-1], TEXT[:, 1:], epochs=12, batch_size=48, verbose=0)
    policy = half_and_half(model)
    view = next_token(model)
    path = export_saved_model(view, tmp_path_factory.mktemp("lm"), TEXT[:8, :LENGTH], policy)
    return Served(model, policy, path)


def half_and_half(model: Any) -> CascadePolicy:
    """About half the tokens of the text are decided at the first dim, none of them narrowly."""
    logits = model.predict(TEXT[:, :-1], verbose=0)[:, :, 0]
    logits = logits - logits.max(axis=-1, keepdims=True)
    surest = np.sort((1 / np.exp(logits).sum(axis=-1)).ravel())
    middle = surest[len(surest) // 4 : 3 * len(surest) // 4]
    widest = int(np.argmax(np.diff(middle)))
    threshold = float(middle[widest : widest + 2].mean())
    stages = (Stage(DIMS[0], threshold), Stage(DIMS[1], None))
    return CascadePolicy(stages)


def test_its_input_is_tokens_of_any_length(served: Served) -> None:
    manifest = Manifest.from_json((served.path / MANIFEST_FILE).read_text())
    assert manifest.inputs == {"tokens": {"dtype": "int32", "shape": [None, None]}}
    assert (manifest.kind, manifest.num_classes, manifest.dims) == ("classifier", TOKENS, DIMS)
    assert (manifest.tied, manifest.width) == (True, WIDTH)


def test_a_text_written_through_the_client_is_the_one_written_here(served: Served) -> None:
    local = AdaptiveDecoder(served.model, served.policy, LENGTH)
    ids, dims = generate(local, PROMPTS, 12, LENGTH)
    with DevServer(served.path.parent) as target, Client(target) as client:

        def ask(tokens: Any) -> tuple[Any, Any]:
            answer = client.classify_adaptive(tokens)
            return answer.class_ids[:, 0], answer.dim

        remote_ids, remote_dims = generate(ask, PROMPTS, 12, LENGTH)
    np.testing.assert_array_equal(remote_ids, ids)
    np.testing.assert_array_equal(remote_dims, dims)
    assert len(np.unique(dims)) > 1
    assert len(np.unique(ids)) > 3


def test_two_hundred_tokens_and_what_they_cost(served: Served) -> None:
    """As the full dim alone would write them, at how many dims a token."""
    with DevServer(served.path.parent) as target, Client(target) as client:

        def at_full_width(tokens: Any) -> tuple[Any, Any]:
            answer = client.classify(tokens, dim=DIMS[-1])
            return answer.class_ids[:, 0], np.full(len(tokens), DIMS[-1])

        def adaptively(tokens: Any) -> tuple[Any, Any]:
            answer = client.classify_adaptive(tokens)
            return answer.class_ids[:, 0], answer.dim

        full, _ = generate(at_full_width, PROMPTS[:1], 200, LENGTH)
        written, dims = generate(adaptively, PROMPTS[:1], 200, LENGTH)
        # Token by token, given the same text: one early difference would change all that follows.
        text = np.concatenate([PROMPTS[0], written[0]]).astype("int32")
        known = range(LENGTH, len(text))
        windows = np.stack([text[end - LENGTH : end] for end in known])
        again = client.classify(windows, dim=DIMS[-1]).class_ids[:, 0]
    assert written.shape == full.shape == (1, 200)
    agreement = np.mean(again == text[LENGTH:])
    print(f"agreement with the full dim {agreement:.3f}, expected dim {dims.mean():.2f}")
    assert agreement > 0.7
    assert DIMS[0] < dims.mean() < DIMS[-1]
