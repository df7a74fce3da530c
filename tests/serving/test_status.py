"""The one table from gRPC status to the errors of this package."""

import grpc
import numpy as np
import pytest

from keras_mrl_serving import errors
from keras_mrl_serving._transport import error_class, translate_error
from keras_mrl_serving.calls import AskStatus, Call, Envelope
from keras_mrl_serving.options import Options

# Every code there is; texts decide only between the leaves of NOT_FOUND and FAILED_PRECONDITION.
TABLE = {
    "CANCELLED": errors.ServerError,
    "UNKNOWN": errors.ServerError,
    "INVALID_ARGUMENT": errors.InvalidInputError,
    "DEADLINE_EXCEEDED": errors.DeadlineError,
    "NOT_FOUND": errors.ModelNotFoundError,
    "ALREADY_EXISTS": errors.ServerError,
    "PERMISSION_DENIED": errors.AccessDeniedError,
    "UNAUTHENTICATED": errors.AccessDeniedError,
    "RESOURCE_EXHAUSTED": errors.ServerError,
    "FAILED_PRECONDITION": errors.ServerError,
    "ABORTED": errors.ServerError,
    "UNIMPLEMENTED": errors.ServerError,
    "INTERNAL": errors.ServerError,
    "UNAVAILABLE": errors.ServerUnavailableError,
    "DATA_LOSS": errors.ServerError,
    "OUT_OF_RANGE": errors.ServerError,
    "OK": errors.ServerError,  # an error all the same
}
LATEST = "Servable not found for request: Latest(m)"
SPECIFIC = "Servable not found for request: Specific(m, 7)"
SIGNATURE = 'Serving signature key "embed_8" not found.'


TOO_LARGE = "CLIENT: Received message larger than max (1048640 vs. 1048576)"


def test_every_code_has_its_class() -> None:
    assert {code.name: error_class(code, "") for code in grpc.StatusCode} == TABLE


@pytest.mark.parametrize("details", [LATEST, SPECIFIC, SIGNATURE, TOO_LARGE])
def test_texts_decide_for_three_codes_only(details: str) -> None:
    decided = {
        ("NOT_FOUND", SPECIFIC): errors.VersionNotFoundError,
        ("FAILED_PRECONDITION", SIGNATURE): errors.SignatureNotFoundError,
        ("RESOURCE_EXHAUSTED", TOO_LARGE): errors.MessageTooLargeError,
    }
    for code in grpc.StatusCode:
        expected = decided.get((code.name, details), TABLE[code.name])
        assert error_class(code, details) is expected


def test_every_class_of_the_table_has_its_rule_and_its_remedy() -> None:
    by_text = {
        *(errors.VersionNotFoundError, errors.SignatureNotFoundError),
        *(errors.MessageTooLargeError, errors.VersionChangedError),
    }
    assert set(errors._RULES_AND_REMEDIES) == {*TABLE.values(), *by_text}


class Failure(grpc.RpcError):
    """What grpc raises, to the extent that it is looked at."""

    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        super().__init__("as printed")
        self._said = code, details

    def code(self) -> grpc.StatusCode:
        return self._said[0]

    def details(self) -> str | None:
        return self._said[1]


grpc.Call.register(Failure)


def sent(version: int | None = None, timeout_s: float = 10.0) -> Envelope:
    call = Call("embed_8", {"x": np.zeros((1, 2))})
    return Envelope("m", version, call, timeout_s / 2, timeout_s)


def test_an_error_says_the_rule_what_was_received_and_what_to_do() -> None:
    failure = Failure(grpc.StatusCode.NOT_FOUND, SPECIFIC)
    error = translate_error(failure, sent(7, 2.50), "host:8500", Options(), 0.1)
    assert type(error) is errors.VersionNotFoundError
    assert str(error) == (
        "The server must have the version. Received: NOT_FOUND from host:8500 for model 'm' "
        f"version 7, signature 'embed_8', timeout 2.5 s: {SPECIFIC}. "
        "Ask without a version for the newest one."
    )
    assert vars(error) == {
        "target": "host:8500",
        "model": "m",
        "version": 7,
        "signature": "embed_8",
        "timeout_s": 2.5,
        "attempts": None,
    }


@pytest.mark.parametrize(
    ("code", "details", "text"),
    [
        (
            "UNAVAILABLE",
            "Connection refused",
            "A TensorFlow Serving server must answer at the target. Received: UNAVAILABLE {}: "
            "Connection refused. Start one with `keras-mrl serve --model_base_path PATH --port "
            "PORT`, or correct the target.",
        ),
        (
            "DEADLINE_EXCEEDED",
            "Deadline Exceeded",
            "An answer must come within the timeout. Received: DEADLINE_EXCEEDED {}: Deadline "
            "Exceeded. Send fewer rows at once, or raise Options(timeout_s=...).",
        ),
        (
            "NOT_FOUND",
            LATEST,
            f"The server must have the model. Received: NOT_FOUND {{}}: {LATEST}. Give the name "
            "the server was started with, Client(target, model=NAME), and see in its log whether "
            "a version loaded.",
        ),
        (
            "FAILED_PRECONDITION",
            SIGNATURE,
            "The model must have the signature. Received: FAILED_PRECONDITION {}: Serving "
            'signature key "embed_8" not found. Ask a model exported by '
            "keras_mrl_export.export_saved_model with this signature; any other by Client.predict, "
            "after a look at Client.signatures().",
        ),
        (
            "INVALID_ARGUMENT",
            "Missing ModelSpec",
            "The server must accept the inputs. Received: INVALID_ARGUMENT {}: Missing ModelSpec. "
            "Send what the model's inputs ask for: Client.describe().inputs.",
        ),
        (
            "INVALID_ARGUMENT",
            "Task size 33 is larger than maximum input batch size 32",
            "The server must accept the inputs. Received: INVALID_ARGUMENT {}: Task size 33 is "
            "larger than maximum input batch size 32. Set Options(max_batch_size=32).",
        ),
        (
            "UNAUTHENTICATED",
            "no token",
            "The server must let the caller in. Received: UNAUTHENTICATED {}: no token. Give what "
            "it asks for: Options(metadata={{'authorization': ...}}), or a client certificate, "
            "Options(tls=Tls(private_key=..., certificate_chain=...)).",
        ),
        (
            "RESOURCE_EXHAUSTED",
            TOO_LARGE,
            f"A message must be no larger than both ends take. Received: RESOURCE_EXHAUSTED {{}}: "
            f"{TOO_LARGE}. Send fewer rows at once, Options(max_batch_size=...), or raise the "
            "limit that is named.",
        ),
        (
            "INTERNAL",
            None,
            "The server must answer without an error. Received: INTERNAL {}: as printed. "
            "See the server's log.",
        ),
        (
            "INTERNAL",
            "",
            "The server must answer without an error. Received: INTERNAL {}: as printed. "
            "See the server's log.",
        ),
    ],
)
def test_each_class_has_a_text(code: str, details: str | None, text: str) -> None:
    failure = Failure(grpc.StatusCode[code], details)
    error = translate_error(failure, sent(), "host:8500", Options(), 0.1)
    asked = "from host:8500 for model 'm', signature 'embed_8', timeout 10 s"
    assert str(error) == text.format(asked)
    assert error.version is None
    assert not isinstance(error, grpc.RpcError)


def test_an_error_without_a_status_is_unknown() -> None:
    asked = Envelope("m", None, AskStatus(), 1.0, 1.0)
    error = translate_error(grpc.RpcError("broken"), asked, "host:8500", Options(), 0.1)
    assert type(error) is errors.ServerError
    assert error.signature is None
    assert str(error) == (
        "The server must answer without an error. Received: UNKNOWN from host:8500 for model 'm', "
        "timeout 1 s: broken. See the server's log."
    )


@pytest.mark.parametrize(
    ("options", "took_s", "attempts"),
    [
        (Options(), 1.5, 5),  # 0.1 + 0.2 + 0.4 + 0.8
        (Options(), 1.21, 5),  # each wait may be a fifth shorter
        (Options(), 1.19, None),
        (Options(max_attempts=1), 0.0, 1),
        (Options(max_attempts=3, first_backoff_s=1.0, max_backoff_s=1.5), 1.9, None),
        (Options(max_attempts=3, first_backoff_s=1.0, max_backoff_s=1.5), 2.0, 3),
    ],
)
def test_attempts_are_known_where_there_was_time_for_all(
    options: Options, took_s: float, attempts: int | None
) -> None:
    failure = Failure(grpc.StatusCode.UNAVAILABLE, "busy")
    error = translate_error(failure, sent(), "host:8500", options, took_s)
    assert error.attempts == attempts
    assert (f"after {attempts} attempts from" in str(error)) == ((attempts or 0) > 1)
    other = Failure(grpc.StatusCode.INTERNAL, "busy")
    assert translate_error(other, sent(), "host:8500", options, took_s).attempts is None


@pytest.mark.parametrize(("asked", "given"), [(0.5, 0.5), (1e9, 1e9), (1e10, 1e9), (1e300, 1e9)])
def test_a_timeout_past_what_grpc_can_count_is_a_long_one(asked: float, given: float) -> None:
    """gRPC counts deadlines in nanoseconds since 1970: a later one than 2262 is over at once."""
    assert asked, given
