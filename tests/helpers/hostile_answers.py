"""Answers that no honest server gives, served by a real gRPC server in a process of its own.

A client names a case in the header `case`: "random 17" or "made 17". The server answers the calls
of that case rightly, but for one, whose bytes are damaged. Case 17 is always the same bytes.
"""

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving._wire import METADATA, METHODS, PREDICT, STATUS, to_proto
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.funnel import FunnelSchedule
from tests.helpers.hostile_peers import mutated

ROOT = Path(__file__).parents[2]
ROWS = np.ones((2, 4), np.float32)
POLICY = CascadePolicy((Stage(2, 0.5), Stage(4, None)))
NUM_CLASSES, TOP_K, K = 5, 3, 2
MANIFEST = Manifest(  # of a model that every method of a client can ask
    name="hostile",
    kind="index",
    fingerprint="5e1f",
    dims=(2, 4),
    width=4,
    inputs={"x": {"dtype": "float32", "shape": [None, 4]}},
    made_with={},
    num_classes=NUM_CLASSES,
    top_k=TOP_K,
    labels=True,
    exits=({"name": "early", "multiply_adds": 2}, {"name": "last", "multiply_adds": 8}),
    exit_cascade=CascadePolicy((Stage(2, 0.5, exit="early"), Stage(4, None))).to_json(),
    funnel=FunnelSchedule(dims=(2, 4), shortlists=(3,), k=K).to_json(),
    size=5,
)
MEGABYTE = 2**20

# Each method of a client, the call that a case damages, and the outputs of that call.
CLASSES = ("class_ids", "probabilities", "confidence", "labels")
ASKS: dict[str, tuple[Callable[[Any], Any], str, tuple[str, ...]]] = {
    "describe": (lambda c: c.describe(), "describe", ("manifest",)),
    "embed": (lambda c: c.embed(ROWS, 4), "embed_4", ("embedding",)),
    "classify": (lambda c: c.classify(ROWS, 2), "classify_2", CLASSES),
    "adaptive": (
        lambda c: c.classify_adaptive(ROWS),
        "classify_adaptive",
        (*CLASSES, "dim", "exit"),
    ),
    "audited": (
        lambda c: c.classify_adaptive(ROWS, audit_rate=1.0),
        "classify_4",
        ("class_ids",),
    ),
    "exit": (lambda c: c.classify(ROWS, 2, exit="early"), "classify_early_2", CLASSES),
    "embed_exit": (lambda c: c.embed(ROWS, 4, exit="early"), "embed_early_4", ("embedding",)),
    "features": (lambda c: c.classify_adaptive(ROWS, POLICY), "features", ("features",)),
    "head_2": (lambda c: c.classify_adaptive(ROWS, POLICY), "head_2", ("class_ids", "logits")),
    "head_4": (lambda c: c.classify_adaptive(ROWS, POLICY), "head_4", ("labels", "logits")),
    "search": (lambda c: c.search(ROWS), "search", ("ids", "scores")),
    "search_2": (lambda c: c.search(ROWS[:, :2], 2), "search_2", ("ids", "scores")),
    "retrieve": (lambda c: c.retrieve(ROWS), "retrieve", ("ids", "scores")),
    "predict": (lambda c: c.predict(ROWS), "serving_default", ("y", "text", "flags")),
    "one_output": (lambda c: c.predict(ROWS, outputs=["y"]), "serving_default", ("y",)),
    "signatures": (lambda c: c.signatures(), METADATA, ()),
    "status": (lambda c: c.status(), STATUS, ()),
}


@dataclass(frozen=True)
class Case:
    """One damaged answer.

    Args:
        ask: The method that a client should call, one of `ASKS`.
        damage: Makes the bytes from those of the right answer.
        name: What is wrong, for a failing test.
    """

    ask: str
    damage: Callable[[bytes], bytes]
    name: str

    @property
    def damaged_call(self) -> str:
        return ASKS[self.ask][1]


def right_outputs(signature: str, rows: int) -> dict[str, Any]:
    """Return the outputs of a signature by name."""
    kind, _, dim = signature.rpartition("_")
    logits = np.tile(np.array([3, 2, 1, 0, -1], np.float32), (rows, 1))
    if kind == "head" and rows > 1:
        logits[1:] = 0  # the second row is decided by the wider head
    classes = {
        "class_ids": np.tile(np.arange(TOP_K), (rows, 1)),
        "probabilities": np.tile(np.array([0.7, 0.2, 0.1], np.float32), (rows, 1)),
        "confidence": np.full(rows, 0.7, np.float32),
        "labels": np.tile(np.array([b"lynx", b"ibex", b"otter"], object), (rows, 1)),
    }
    if signature == "describe":
        return {"manifest": np.array([MANIFEST.to_json().encode()] * rows, object)}
    if signature == "classify_adaptive":
        first = np.arange(rows, dtype=np.int32) % 2  # every other row leaves early
        return {**classes, "dim": 2 + 2 * first, "exit": first}
    if signature == "features":
        return {"features": np.ones((rows, 4), np.float32)}
    if signature == "serving_default":
        text, flags = np.full((rows, 1), b"text", object), np.ones((rows, 3), bool)
        return {"y": np.ones((rows, 3), np.float32), "text": text, "flags": flags}
    if kind.startswith("embed"):
        return {"embedding": np.ones((rows, int(dim)), np.float32)}
    if signature.startswith(("search", "retrieve")):
        scores = np.tile(np.linspace(1, 0, K, dtype=np.float32), (rows, 1))
        return {"ids": np.tile(np.arange(K), (rows, 1)), "scores": scores}
    return {**classes, "logits": logits} if kind == "head" else classes


def right_answer(call: str, rows: int = 2) -> bytes:
    """Return the right answer to a method, or to a signature of Predict."""
    if call == STATUS:
        status = wire.GetModelStatusResponse()
        status.model_version_status.add(version=1, state="AVAILABLE")
        return status.SerializeToString()
    if call == METADATA:
        return metadata(_signatures().SerializeToString())
    response = wire.PredictResponse()
    response.model_spec.version.value = 1
    for name, array in right_outputs(call, rows).items():
        response.outputs[name].CopyFrom(to_proto(array))
    return response.SerializeToString()


def metadata(packed: bytes) -> bytes:
    response = wire.GetModelMetadataResponse()
    response.model_spec.version.value = 1
    response.metadata["signature_def"].value = packed
    return response.SerializeToString()


def _signatures() -> wire.SignatureDefMap:
    signatures = wire.SignatureDefMap()
    signature = signatures.signature_def["serving_default"]
    for name, dtype, sizes in (
        ("x", "DT_FLOAT", (-1, 4)),
        ("y", "DT_FLOAT", (-1, 3)),
        ("text", "DT_STRING", (-1, -1)),
        ("flags", "DT_BOOL", None),
    ):
        infos = signature.inputs if name == "x" else signature.outputs
        infos[name].dtype = getattr(wire, dtype)
        infos[name].tensor_shape.unknown_rank = sizes is None
        for size in sizes or ():
            infos[name].tensor_shape.dim.add(size=size)
    return signatures


# Damage by chance.


def random_case(number: int) -> Case:
    """Return a case that differs from the right answer by chance."""
    rng = random.Random(number)
    ask = rng.choice(sorted(ASKS))
    _, call, outputs = ASKS[ask]
    if outputs and rng.random() < 0.5:
        return Case(ask, lambda right: _twisted(rng, right), f"twisted {call}")
    return Case(ask, lambda right: mutated(rng, right, (2, 10, 100_000)), f"mutated {call}")


def _twisted(rng: random.Random, right: bytes) -> bytes:
    """An answer that still parses, one of whose tensors has two kinds of damage."""
    response = wire.PredictResponse.FromString(right)
    name = rng.choice(sorted(response.outputs))
    for _ in range(2):
        _, damage = rng.choice(TENSORS)
        damage(response.outputs[name])
    return response.SerializeToString()


# Damage by hand: of one tensor.

SIZES = (0, 1, 3, 1000, 2**22, 2**28, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**63))
Damage = Callable[[wire.TensorProto], object]


def _reshape(tensor: wire.TensorProto, sizes: tuple[int, ...]) -> None:
    del tensor.tensor_shape.dim[:]
    for size in sizes:
        tensor.tensor_shape.dim.add(size=size)


def _shapes() -> Iterator[tuple[int, ...]]:
    for size in SIZES:
        yield from ((size,), (2, size), (size, 3), (2, size, size))
    yield from ((), (0,), (2**62, 0), (1,) * 33, (1,) * 300, (0,) * 70_000, (2,) * 62)


def _set(tensor: wire.TensorProto, field: str, values: Any) -> None:
    """Give a tensor other values: in one field, instead of all that it has."""
    keep = tensor.dtype, tuple(dim.size for dim in tensor.tensor_shape.dim)
    tensor.Clear()
    tensor.dtype = keep[0]
    _reshape(tensor, keep[1])
    if isinstance(values, bytes):
        setattr(tensor, field, values)
    else:
        getattr(tensor, field).extend(values)


def _tensors() -> Iterator[tuple[str, Damage]]:
    for sizes in _shapes():
        name = f"shape {sizes!s:.60}"
        yield name, partial(_reshape, sizes=sizes)
        yield f"{name}, one value", partial(_one, sizes=sizes)
    yield "unknown rank", lambda t: setattr(t.tensor_shape, "unknown_rank", True)
    for dtype in (*range(34), 101, 999, -5, 2**31 - 1):
        yield f"dtype {dtype}", partial(_retype, dtype=dtype)
    contents = {n: bytes(n) for n in (1, 3, 23, 4096, MEGABYTE)} | {
        "endless varint": b"\xff" * 100_000,
        "long varint": b"\x80" * 100_000,
        "long length": b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" * 6,
        "negative lengths": (b"\xff" * 9 + b"\x01") * 6,
    }
    for key, content in contents.items():
        yield f"content of {key}", partial(_set, field="tensor_content", values=content)
    numbers: tuple[list[float], ...]
    numbers = [float("nan")], [float("inf")], [-float("inf")], [1e38] * 6, [], [1.0], [1.0] * 9999
    for floats in numbers:
        yield (
            f"floats {floats[:1]} x {len(floats)}",
            partial(_set, field="float_val", values=floats),
        )
        yield f"doubles {floats[:1]}", partial(_doubles, values=floats)
    for integer in (-1, 2, 3, 5, 99, 2**31 - 1, 2**32 + 2, 2**63 - 1, -(2**63)):
        yield f"integers {integer}", partial(_set, field="int64_val", values=[integer])
        yield f"narrow integers {integer}", partial(_set, field="int_val", values=[integer % 2**31])
    texts: tuple[list[bytes], ...]
    texts = [], [b""], [b"\xff\xfe"], [b"a" * 9999] * 6, [b"\x1b]0;x\x07\0"], [b""] * 99999
    for strings in texts:
        yield f"strings {strings[:1]!r:.20}", partial(_set, field="string_val", values=strings)
    for text in manifests():
        yield f"text {text[:40]!r}", partial(_set, field="string_val", values=[text])


def _one(tensor: wire.TensorProto, sizes: tuple[int, ...]) -> None:
    """Give a tensor another shape, and one value."""
    _reshape(tensor, sizes)
    if tensor.dtype == wire.DT_STRING:
        _set(tensor, "string_val", [b"a"])
    else:
        _set(tensor, "float_val" if tensor.dtype == wire.DT_FLOAT else "int64_val", [1])


def _doubles(tensor: wire.TensorProto, values: list[float]) -> None:
    tensor.dtype = wire.DT_DOUBLE
    _set(tensor, "double_val", [value * 1e200 for value in values])


def _retype(tensor: wire.TensorProto, dtype: Any) -> None:
    tensor.dtype = dtype


def manifests() -> Iterator[bytes]:
    """Yield texts that are no manifest, or one that promises too much."""
    whole = json.loads(MANIFEST.to_json())
    huge = {"dims": [2, 2**40], "width": 2**40, "top_k": 2**31, "num_classes": 2**62}
    for key, value in [*huge.items(), ("top_k", 0), ("num_classes", -1), ("labels", 5)]:
        yield json.dumps({**whole, key: value}).encode()
    yield json.dumps({**whole, **huge, "funnel": {**whole["funnel"], "k": 2**62}}).encode()
    yield json.dumps({**whole, "inputs": {"x": {"dtype": "float32", "shape": [2**40]}}}).encode()
    yield json.dumps({**whole, "name": "\ud800"}).encode()
    yield json.dumps({**whole, "extra": "x" * 300_000}).encode()
    yield json.dumps({**whole, "extra": {str(n): n for n in range(9999)}}).encode()
    yield json.dumps(whole).replace('"width"', '"dims": [8], "width"').encode()
    half = 2**17
    yield from (b"[" * half, b"[" * half + b"]" * half, b'{"a":' * 9999, b"[" + b"[]," * half)
    yield from (b'{"schema": ' + b"9" * 10**6 + b"}", b'{"schema": 1e999}', b"NaN", b"", b"\xff")


TENSORS = list(_tensors())


# Damage by hand: of a whole message.


def _field(number: int, value: bytes) -> bytes:
    size, length = len(value), b""
    while size > 0x7F:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


def _more(piece: bytes) -> Callable[[bytes], bytes]:
    return lambda right: right + piece


def _instead(data: bytes) -> Callable[[bytes], bytes]:
    return lambda _: data


def _twice(right: bytes) -> bytes:
    return right * 2


def _cut(right: bytes, end: int) -> bytes:
    return right[:end]


def _messages(outputs: tuple[str, ...]) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "nothing", _instead(b"")
    yield "noise", _instead(random.Random(0).randbytes(9999))
    for end in (1, 2, 5, 9, 20, 40):
        yield f"cut at {end}", partial(_cut, end=end)
        yield f"cut by {end}", partial(_cut, end=-end)
    yield "twice", _twice
    entries = b"\x0a\x00", b"\x12\x00", b"\x0a\x04\x0a\x00\x12\x00"
    for piece in (*entries, b"\x0b", b"\x0c", b"\x80", b"\xff"):
        for count in (1, 100_000):
            yield f"{piece!r} x {count} more", _more(piece * count)
            yield f"{piece!r} x {count}", _instead(piece * count)
    yield "deep groups", _more(b"\x7b" * 5000 + b"\x7c" * 5000)
    yield "unknown field", _more(_field(15, bytes(MEGABYTE)))
    for output in outputs:
        name = _field(1, output.encode())
        dims = _field(2, _field(2, b"\x12\x00" * (MEGABYTE // 4)))
        merges = _field(2, b"\x12\x02\x12\x00" * (MEGABYTE // 8))
        empties = _field(2, b"\x08\x07" + b"\x42\x00" * (MEGABYTE // 4))
        for kind, value in (("dims", dims), ("merges", merges), ("empty strings", empties)):
            yield f"{kind} in {output}", _more(_field(1, name + value))
        yield f"{output} without a value", _more(_field(1, name))
    for bad in (b"\xff\xfe", b"a" * 5000, b"\x1b[2J", b"a\0b"):
        yield f"name {bad[:4]!r}", _more(_field(1, _field(1, bad)))
        yield f"only name {bad[:4]!r}", _instead(_field(1, _field(1, bad)))
    many = b"".join(_field(1, _field(1, b"%d" % n)) for n in range(50_000))
    yield "50,000 outputs", _more(many)
    for version in (0, -1, 2**63 - 1):
        spec = wire.ModelSpec(name="x" * 9999)
        spec.version.value = version
        packed = _field(2, spec.SerializeToString())
        yield f"version {version}", _more(packed)


def _statuses() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield from _messages(())
    for number in (1, 7, 99, 2**31 - 1):
        status = wire.ModelVersionStatus(version=-5, state=number)  # type: ignore[arg-type]
        yield f"state {number}", _instead(_field(1, status.SerializeToString()))
    text = _field(1, _field(3, _field(2, b"\xff\xfe")))
    yield "error that is no text", _instead(text)
    yield "a long error", _instead(_field(1, _field(3, _field(2, b"a" * MEGABYTE))))


def _metadata() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield from _messages(())
    for name, damage in _messages(()):
        packed = damage(_signatures().SerializeToString())
        yield f"signatures: {name}", _instead(metadata(packed))
    for sizes in (*_shapes(), (-1,) * 5000):
        signatures = _signatures()
        shape = signatures.signature_def["serving_default"].outputs["y"].tensor_shape
        for size in sizes[:5000]:
            shape.dim.add(size=size)
        yield f"shape {sizes[:4]}", _instead(metadata(signatures.SerializeToString()))
    future: tuple[Any, ...] = (33, 34, 101, -5)
    for dtype in future:
        signatures = _signatures()
        signatures.signature_def["serving_default"].outputs["y"].dtype = dtype
        yield f"dtype {dtype}", _instead(metadata(signatures.SerializeToString()))
    names = wire.SignatureDefMap()
    for number in range(40_000):
        _ = names.signature_def[str(number)]
    yield "40,000 signatures", _instead(metadata(names.SerializeToString()))


@cache
def made_cases() -> tuple[Case, ...]:
    """Return every case that was made by hand."""
    cases = []
    for ask, (_, call, outputs) in ASKS.items():
        if call in (STATUS, METADATA):
            whole = _statuses() if call == STATUS else _metadata()
        else:
            whole = _messages(outputs)
        cases += [Case(ask, damage, f"{call}: {name}") for name, damage in whole]
        for output in outputs:
            for name, damage in TENSORS:
                cases.append(Case(ask, _damage(output, damage), f"{call}: {output}: {name}"))
    return tuple(cases)


def _damage(output: str, damage: Damage) -> Callable[[bytes], bytes]:
    def damaged(right: bytes) -> bytes:
        response = wire.PredictResponse.FromString(right)
        damage(response.outputs[output])
        return response.SerializeToString()

    return damaged


def case_of(name: str) -> Case:
    """Return the case that a header names."""
    kind, _, number = name.partition(" ")
    return random_case(int(number)) if kind == "random" else made_cases()[int(number)]


class HostileServer:
    """The server, in a process of its own, so that its memory is not the client's."""

    def __enter__(self) -> "HostileServer":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.hostile_answers"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.target = f"127.0.0.1:{self._process.stdout.readline().strip()}"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class _Handler(grpc.GenericRpcHandler):
    def service(self, details: Any) -> Any:
        request_class, _ = METHODS[details.method]
        name = dict(details.invocation_metadata).get("case", "")

        def answer(data: bytes, _: grpc.ServicerContext) -> bytes:
            request, call, rows = request_class.FromString(data), details.method, 1
            if call == PREDICT:
                call = request.model_spec.signature_name
                tensor = next(iter(request.inputs.values()))
                rows = tensor.tensor_shape.dim[0].size
            right = right_answer(call, rows)
            case = case_of(name) if name else None
            return case.damage(right) if case and case.damaged_call == call else right

        return grpc.unary_unary_rpc_method_handler(answer)


def main() -> None:
    made_cases()
    server = grpc.server(
        ThreadPoolExecutor(4),
        handlers=[_Handler()],
        options=(("grpc.max_send_message_length", -1),),
    )
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
