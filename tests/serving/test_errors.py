"""One tree of errors, each also the built-in error its name promises."""

import inspect
import pickle
from typing import Any

import pytest

from keras_mrl_serving import errors
from keras_mrl_serving.calls import Call, Envelope

# Direct bases, as the docstrings and docs promise them.
TREE = {
    "KerasMrlError": ("Exception",),
    "ManifestError": ("KerasMrlError", "ValueError"),
    "UnknownDimError": ("KerasMrlError", "ValueError"),
    "UnknownExitError": ("KerasMrlError", "ValueError"),
    "UnknownPromptError": ("KerasMrlError", "ValueError"),
    "NoHeadError": ("KerasMrlError", "TypeError"),
    "NoCascadeError": ("KerasMrlError", "TypeError"),
    "NoIndexError": ("KerasMrlError", "TypeError"),
    "NoOtherTowerError": ("KerasMrlError", "TypeError"),
    "EncoderMismatchError": ("KerasMrlError", "ValueError"),
    "InvalidInputError": ("KerasMrlError", "ValueError"),
    "UnreadableImageError": ("InvalidInputError",),
    "DamagedIndexError": ("KerasMrlError", "ValueError"),
    "TargetNotReachedError": ("KerasMrlError", "ValueError"),
    "ServerError": ("KerasMrlError",),
    "ServerUnavailableError": ("ServerError", "ConnectionError"),
    "AccessDeniedError": ("ServerError", "PermissionError"),
    "MessageTooLargeError": ("ServerError",),
    "DeadlineError": ("ServerError", "TimeoutError"),
    "ModelNotFoundError": ("ServerError", "LookupError"),
    "VersionNotFoundError": ("ModelNotFoundError",),
    "VersionChangedError": ("ServerError",),
    "ModelChangedError": ("VersionChangedError",),
    "SignatureNotFoundError": ("ServerError", "LookupError"),
}
CLASSES: dict[str, Any] = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__
}


def test_the_tree() -> None:
    assert {name: tuple(b.__name__ for b in c.__bases__) for name, c in CLASSES.items()} == TREE


@pytest.mark.parametrize("name", TREE)
def test_an_error_knows_the_call_that_failed(name: str) -> None:
    error = CLASSES[name]("text")
    attributes = ("target", "model", "version", "signature", "timeout_s", "attempts", "partial")
    assert [getattr(error, attribute) for attribute in attributes] == [None] * 7
    assert CLASSES[name].__doc__
    assert str(error) == "text"


@pytest.mark.parametrize("name", TREE)
def test_an_error_crosses_a_process_boundary(name: str) -> None:
    error = CLASSES[name]("text")
    error.target, error.version = "host:8500", 7
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is CLASSES[name]
    assert (str(copy), copy.target, copy.version) == ("text", "host:8500", 7)


@pytest.mark.parametrize(
    "name", [n for n, c in CLASSES.items() if issubclass(c, errors.ServerError)]
)
def test_every_error_of_a_server_has_a_rule_and_a_remedy(name: str) -> None:
    envelope = Envelope("birds", 7, Call("embed_8", {}), 1.0, 2.5)
    error = errors.call_error(CLASSES[name], envelope, "host:8500", "a word", details="Busy.")
    call = "from host:8500 for model 'birds' version 7, signature 'embed_8', timeout 2.5 s"
    rule, _, rest = str(error).partition(f" Received: a word {call}: Busy. ")
    assert type(error) is CLASSES[name]
    assert rule.endswith(".")
    assert rest.endswith(".")
