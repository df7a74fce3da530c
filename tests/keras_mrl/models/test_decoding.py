"""Adaptive decoding: each token at the first dim that is sure enough."""

from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    AdaptiveDecoder,
    MatryoshkaClassifier,
    MatryoshkaHead,
    generate,
    most_likely,
    next_token,
    sampler,
)
from keras_mrl_serving import CascadePolicy, Stage
from keras_mrl_serving.cascade.confidence import max_probability
from tests.helpers.language_models import DIMS, LENGTH, READ, TOKENS, language_model, randomised
from tests.helpers.laws import exactly
from tests.helpers.small_models import as_numpy

pytestmark = pytest.mark.backend

STEPS = 4  # the last of them reads no longer the first token
PROMPT = READ[:, :4]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> Any:
    return randomised(language_model(request.param))


def policy(*thresholds: float, temperature: float = 1.0) -> CascadePolicy:
    stages = [Stage(dim, t, temperature) for dim, t in zip(DIMS, thresholds, strict=False)]
    return CascadePolicy((*stages, Stage(DIMS[-1], None, temperature)))


def decoded(model: Any, chosen: CascadePolicy) -> tuple[np.ndarray, np.ndarray]:
    return generate(AdaptiveDecoder(model, chosen, LENGTH), PROMPT, STEPS, LENGTH)


def greedy(model: Any, index: int) -> np.ndarray:
    """By the model alone, at one dim."""
    text = PROMPT
    for _ in range(STEPS):
        logits = model.predict_on_batch(text[:, -LENGTH:])[:, -1, index]
        text = np.concatenate([text, logits.argmax(axis=1)[:, None].astype("int32")], axis=1)
    return text[:, PROMPT.shape[1] :]


def test_a_threshold_below_every_confidence_asks_the_first_dim_alone(model: Any) -> None:
    ids, dims = decoded(model, policy(0.0, 0.0))
    assert ids.shape == dims.shape == (len(READ), STEPS)
    assert (dims == DIMS[0]).all()
    np.testing.assert_array_equal(ids, greedy(model, 0))


def test_a_threshold_above_every_confidence_is_greedy_at_the_full_dim(model: Any) -> None:
    ids, dims = decoded(model, policy(1.0, 1.0))
    assert (dims == DIMS[-1]).all()
    np.testing.assert_array_equal(ids, greedy(model, 2))


def halving(model: Any, temperature: float = 1.0) -> CascadePolicy:
    """Half of the rows stop at the first dim, half of the others at the second."""
    logits, thresholds = as_numpy(model(READ))[:, -1], []
    for index in range(2):
        confidence = max_probability(logits[:, index], temperature)
        thresholds.append(float(np.median(confidence)))
        logits = logits[confidence < thresholds[-1]]
    return policy(*thresholds, temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_in_between_it_routes_as_the_policy_does(model: Any, temperature: float) -> None:
    chosen = halving(model, temperature)
    classes, stage_of = chosen.route(as_numpy(model(READ))[:, -1])
    ids, dims = AdaptiveDecoder(model, chosen, LENGTH)(READ)
    np.testing.assert_array_equal(ids, classes)
    np.testing.assert_array_equal(dims, np.array(DIMS)[stage_of])
    assert set(dims) == set(DIMS)


def test_rows_do_not_depend_on_their_neighbours(model: Any) -> None:
    ids, dims = decoded(model, halving(model))
    decide = AdaptiveDecoder(model, halving(model), LENGTH)
    for row in (0, 7):
        alone = generate(decide, READ[row : row + 1, : PROMPT.shape[1]], STEPS, LENGTH)
        np.testing.assert_array_equal(alone[0][0], ids[row])
        np.testing.assert_array_equal(alone[1][0], dims[row])


def test_a_decoder_reads_the_last_tokens_of_a_longer_text(model: Any) -> None:
    decide = AdaptiveDecoder(model, policy(0.4, 0.5), context=4)
    longer = np.concatenate([READ, READ], axis=1)
    np.testing.assert_array_equal(decide(longer)[0], decide(READ[:, -4:])[0])


def test_sampling_is_by_probability_and_seeded() -> None:
    logits = np.tile(np.log(np.array([0.1, 0.6, 0.3], "float32")), (20_000, 1))
    shares = np.bincount(sampler(seed=0)(logits), minlength=3) / len(logits)
    np.testing.assert_allclose(shares, [0.1, 0.6, 0.3], atol=0.02)
    np.testing.assert_array_equal(sampler(seed=3)(logits), sampler(seed=3)(logits))
    assert set(sampler(top_k=2, seed=0)(logits)) == {1, 2}
    sharp = np.bincount(sampler(temperature=0.5, seed=0)(logits), minlength=3) / len(logits)
    np.testing.assert_allclose(sharp, np.array([0.01, 0.36, 0.09]) / 0.46, atol=0.02)


def test_what_decides_may_sample(model: Any) -> None:
    texts = [
        generate(
            AdaptiveDecoder(model, policy(0.4, 0.5), LENGTH, sampler(seed=seed)),
            PROMPT,
            STEPS,
            LENGTH,
        )[0]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()
    assert texts[0].max() < TOKENS


def test_most_likely_takes_the_first_of_equals() -> None:
    assert most_likely(np.array([[1, 3, 3]], "float32")).tolist() == [1]


def test_a_decoder_asks_a_model_that_gives_every_position(model: Any) -> None:
    decide = AdaptiveDecoder(next_token(model), policy(0.5, 0.5), LENGTH)
    sentence = (
        "A decoder reads the features of every position, (batch, time, width). "
        "Received: features of shape (12, 8). "
        "Give the model that was trained, not its next_token(...)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        decide(READ)


def test_a_decoder_asks_a_built_model() -> None:
    sentence = (
        "A decoder needs a built language model that ends in a MatryoshkaHead. "
        "Received: MatryoshkaClassifier 'new'. Train it, or call it on a batch."
    )
    body = keras.Sequential([keras.layers.Embedding(TOKENS, 8)])
    new = MatryoshkaClassifier(body, MatryoshkaHead(TOKENS, dims=DIMS), name="new")
    with pytest.raises(ValueError, match=exactly(sentence)):
        AdaptiveDecoder(new, policy(0.5, 0.5), LENGTH)


def test_a_decoder_asks_dims_of_the_head(model: Any) -> None:
    sentence = (
        "dim must be one of the dims of the head. "
        "Received: dim=3 for dims=(2, 4, 8). Choose one of those."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        AdaptiveDecoder(model, CascadePolicy((Stage(3, None),)), LENGTH)


def repeated(tokens: Any) -> Any:
    return tokens[:, -1], tokens[:, -1]


def test_no_steps_add_nothing() -> None:
    ids, dims = generate(repeated, PROMPT, 0, LENGTH)
    assert ids.shape == dims.shape == (len(PROMPT), 0)


@pytest.mark.parametrize("context", [4, 7])
def test_a_decoder_is_given_as_many_tokens_as_it_reads(model: Any, context: int) -> None:
    decide = AdaptiveDecoder(model, policy(0.5, 0.5), LENGTH)
    sentence = (
        "context must be that of the decoder. "
        f"Received: context={context} for a decoder of context=6. Write context=decide.context."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        generate(decide, PROMPT, 3, context)


PROMPTS = (
    "prompts must be token ids (rows, time), at least one in a row. "
    "Received: {}. Give [tokenizer.encode(text).ids]."
)
STEPS_SENTENCE = (
    "steps must be a non-negative integer. Received: steps={}. Give the number of tokens to add."
)
SAMPLER = (
    "temperature must be above 0 and top_k at least 1. "
    "Received: temperature={}, top_k={}. Use most_likely for the best token alone."
)
CONTEXT = (
    "context must be a positive integer. "
    "Received: context={}. Give the number of tokens the model was trained on."
)


@pytest.mark.parametrize(
    ("function", "arguments", "sentence"),
    [
        *(
            (generate, (repeated, prompts, 3, LENGTH), PROMPTS.format(received))
            for prompts, received in (
                ([1, 2], "int64 of shape (2,)"),
                (np.zeros((2, 0), "int32"), "int32 of shape (2, 0)"),
                ([[0.5]], "float64 of shape (1, 1)"),
            )
        ),
        *(
            (generate, (repeated, PROMPT, steps, LENGTH), STEPS_SENTENCE.format(steps))
            for steps in (-1, 2.5)
        ),
        *(
            (sampler, arguments, SAMPLER.format(*arguments))
            for arguments in ((0, 5), (float("nan"), 5), (1.0, 0))
        ),
        *(
            (function, (*arguments, context), CONTEXT.format(context))
            for function, arguments in (
                (generate, (repeated, PROMPT, 3)),
                (AdaptiveDecoder, (None, policy(0.5, 0.5))),
            )
            for context in (0, -4, 2.5)
        ),
    ],
)
def test_bad_arguments_are_refused(function: Any, arguments: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=exactly(sentence)):
        function(*arguments)


@pytest.mark.parametrize("choose", [most_likely, sampler()], ids=["greedy", "sampler"])
def test_no_token_is_chosen_by_nan(choose: Any) -> None:
    logits = np.array([[0, 2, 1], [0, np.nan, 1]], "float32")
    text = (
        "A token is chosen by logits that are numbers. Received: NaN in 1 of 2 rows. "
        "Train the model to a finite loss."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        choose(logits)
