"""The one table from gRPC status to the errors of this package."""

from collections.abc import Callable

import grpc
import pytest

from keras_mrl_serving import _rpc, errors
from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving._rpc import leaf_of, translate

# Every code there is; texts decide only between the leaves of NOT_FOUND and FAILED_PRECONDITION.
TABLE = {
    "CANCELLED": errors.ServerError,
    "UNKNOWN": errors.ServerError,
    "INVALID_ARGUMENT": errors.InvalidInputError,
    "DEADLINE_EXCEEDED": errors.DeadlineError,
    "NOT_FOUND": errors.ModelNotFoundError,
    "ALREADY_EXISTS": errors.ServerError,
    "PERMISSION_DENIED": errors.ServerError,
    "UNAUTHENTICATED": errors.ServerError,
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


def test_every_code_has_its_class() -> None:
    assert {code.name: leaf_of(code, "") for code in grpc.StatusCode} == TABLE


@pytest.mark.parametrize("details", [LATEST, SPECIFIC, SIGNATURE])
def test_texts_decide_for_two_codes_only(details: str) -> None:
    decided = {
        ("NOT_FOUND", SPECIFIC): errors.VersionNotFoundError,
        ("FAILED_PRECONDITION", SIGNATURE): errors.SignatureNotFoundError,
    }
    for code in grpc.StatusCode:
        expected = decided.get((code.name, details), TABLE[code.name])
        assert leaf_of(code, details) is expected


def test_every_class_of_the_table_has_its_rule_and_its_remedy() -> None:
    leaves = {*TABLE.values(), errors.VersionNotFoundError, errors.SignatureNotFoundError}
    assert set(_rpc._RULES) == set(_rpc._REMEDIES) == leaves


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


@pytest.fixture
def spec() -> wire.ModelSpec:
    return wire.ModelSpec(name="m", signature_name="embed_8")


def test_an_error_says_the_rule_what_was_received_and_what_to_do(spec: wire.ModelSpec) -> None:
    spec.version.value = 7
    error = translate(Failure(grpc.StatusCode.NOT_FOUND, SPECIFIC), "host:8500", spec, 2.50)
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
            "keras_mrl_export.export_saved_model with this signature.",
        ),
        (
            "INVALID_ARGUMENT",
            "Missing ModelSpec",
            "The server must accept the inputs. Received: INVALID_ARGUMENT {}: Missing ModelSpec. "
            "Send what the model's inputs ask for: Client.describe().inputs.",
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
def test_each_class_has_a_text(
    code: str, details: str | None, text: str, spec: wire.ModelSpec
) -> None:
    error = translate(Failure(grpc.StatusCode[code], details), "host:8500", spec, 10.0)
    asked = "from host:8500 for model 'm', signature 'embed_8', timeout 10 s"
    assert str(error) == text.format(asked)
    assert error.version is None
    assert not isinstance(error, grpc.RpcError)


def test_an_error_without_a_status_is_unknown(spec: wire.ModelSpec) -> None:
    error = translate(grpc.RpcError("broken"), "host:8500", spec, 1.0)
    assert type(error) is errors.ServerError
    assert str(error) == (
        "The server must answer without an error. Received: UNKNOWN from host:8500 for model 'm', "
        "signature 'embed_8', timeout 1 s: broken. See the server's log."
    )


@pytest.mark.parametrize(("asked", "given"), [(0.5, 0.5), (1e9, 1e9), (1e10, 1e9), (1e300, 1e9)])
def test_a_timeout_past_what_grpc_can_count_is_a_long_one(asked: float, given: float) -> None:
    """gRPC counts deadlines in nanoseconds since 1970: a later one than 2262 is over at once."""
    seen = []

    class Channel:
        def unary_unary(self, *_: object, **__: object) -> Callable[..., wire.PredictResponse]:
            def call(_: wire.PredictRequest, timeout: float) -> wire.PredictResponse:
                seen.append(timeout)
                return wire.PredictResponse()

            return call

    _rpc.predict_stub(Channel())(wire.PredictRequest(), asked)  # type: ignore[arg-type]
    assert seen == [given]
