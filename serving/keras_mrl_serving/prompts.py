"""Prompts: the texts that a client puts before each text, and those that a gallery was made with.

Models of texts are often trained with one prompt before what is searched for, and another before
what is found. The graph does not put them there, so that a text can also be embedded as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt

from .contract import Manifest
from .errors import EncoderMismatchError

Prompt = str | None | EllipsisType  # a name, none, or the one of queries where there is one

QUERY = "query"
OF_GALLERIES = ("passage", "document")  # the names of prompts before what is found


def text_of(prompt: Prompt, manifest: Manifest) -> str:
    """Return the text of a prompt of a model, "" for none.

    Args:
        prompt: Its name; None for none; `...` for the prompt `query`, where the model has it.
        manifest: Of the model, or of one of its towers.

    Raises:
        UnknownPromptError: If the model has no prompt of this name.

    Examples:
        >>> manifest = Manifest(name="birds", kind="encoder", fingerprint="5e1f", dims=(8,),
        ...     width=8, inputs={"text": {"dtype": "string", "shape": [None]}}, made_with={},
        ...     preprocessor={"prompts": {"query": "query: "}})
        >>> text_of("query", manifest), text_of(..., manifest), text_of(None, manifest)
        ('query: ', 'query: ', '')
    """
    if isinstance(prompt, EllipsisType):
        return manifest.prompts.get(QUERY, "")
    return manifest.check_prompt(prompt)


def put_before(prompt: str, texts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return texts, str or bytes, with a prompt before each.

    Examples:
        >>> put_before("query: ", np.array(["owls", b"jays"], object))
        array(['query: owls', b'query: jays'], dtype=object)
    """
    if not prompt:
        return texts
    prompted = np.empty(texts.shape, object)
    for place, text in enumerate(texts.ravel().tolist()):
        prompted.flat[place] = (prompt if isinstance(text, str) else prompt.encode()) + text
    return prompted


def check_gallery_prompt(prompt: str | None, prompts: Mapping[str, str]) -> None:
    """Raise unless a gallery was embedded with a prompt that its encoder has for galleries.

    Args:
        prompt: The prompt of the gallery, as text; None without one.
        prompts: Those of the model that embeds the queries, by name.

    Raises:
        EncoderMismatchError: If the model does not have the prompt, or the gallery has none where
            the model has one for galleries.

    Examples:
        >>> check_gallery_prompt("passage: ", {"query": "query: ", "passage": "passage: "})
        >>> check_gallery_prompt(None, {})
    """
    if (prompt or "") in ("", *prompts.values()):
        expected = [name for name in OF_GALLERIES if prompts.get(name)]
        if prompt or not expected or "" in prompts.values():
            return
        raise EncoderMismatchError(
            "The gallery of a model with a prompt for galleries is embedded with that prompt. "
            f"Received: an index whose gallery had none, for a model with the prompt "
            f"{expected[0]!r}, {prompts[expected[0]]!r}. {_again(expected[0])}"
        )
    names = ", ".join(f"{name} {text!r}" for name, text in prompts.items()) or "none"
    remedy = _again(
        next((name for name in OF_GALLERIES if name in prompts), next(iter(prompts), ""))
    )
    raise EncoderMismatchError(
        "The gallery of an index is embedded with a prompt that the model of its queries has. "
        f"Received: an index whose gallery had {prompt!r}, for a model with the prompts: {names}. "
        + remedy
    )


def _again(name: str) -> str:
    if not name:
        return "Embed the gallery without a prompt, and build the index without one."
    return (
        f"Embed the gallery with prompt={name!r}, and build the index with "
        f"prompt=manifest.prompts[{name!r}]."
    )
