"""Train, calibrate, export, serve and ask, on handwritten digits.

Trains a Matryoshka model with two exits on scikit-learn's 1,797 handwritten digits, moved and
noisy, by model.fit. Searches a cascade over the exits on a holdout, exports the model for
TensorFlow Serving, serves it in a process of its own, and asks that server over gRPC: every test
image at every exit and dim, then adaptively, and a funnel over the training images. Takes about a
minute; everything it made stays in --out.

  keras-mrl demo
  keras-mrl demo --backend jax --out demo-jax
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from .demo_report import (
    LAPS,
    REQUEST_LAPS,
    REQUEST_SIZES,
    K,
    funnel_over,
    make_report,
    print_report,
    write_report,
)
from .digits import (
    DIMS,
    EXITS,
    HOLDOUT_VIEWS,
    LAST,
    NAMES,
    TEST_VIEWS,
    TRAINING_VIEWS,
    Part,
    calibrate,
    load_parts,
    train,
    views,
)
from .output import print_json, print_line, print_lines, print_paragraph
from .shared import (
    DONE,
    MISUSED,
    Option,
    RefusalError,
    command,
    count_option,
    json_option,
    needing,
    refusing,
)

if TYPE_CHECKING:
    from keras_mrl.models.costs import Costs
    from keras_mrl_serving import CascadePolicy, Client, FunnelSchedule

_BACKENDS = ("tensorflow", "jax", "torch")
_NEEDS = ("sklearn", "matplotlib", "keras", "keras_mrl.evaluation", "keras_mrl_export")

MODEL = "digits"

# What a cascade compares with its thresholds, by the name that a policy has for it.
_CONFIDENCES = {
    "max_probability": "the probability of its best class",
    "margin": "the lead of its best class, in probability,",
    "entropy": "the negative entropy of its classes",
}

_START_S = 120.0
_SHOWN_LINES = 10


@command(
    __doc__,
    Option(
        "--backend",
        type=click.Choice(_BACKENDS),
        help="backend that trains; the exported model is the same (KERAS_BACKEND, else tensorflow)",
    ),
    Option(
        "--out", default="keras-mrl-demo", metavar="DIR", help="folder to write (keras-mrl-demo)"
    ),
    count_option("--epochs", "N", "passes over the data (7)", usual=7, remedy="Try 7."),
    count_option(
        "--seed",
        "N",
        "seed of the split, the noise and the training (0)",
        usual=0,
        least=0,
        most=2**32 - 1,
    ),
    json_option("print the report as one JSON object, the last line"),
)
def demo(arguments: SimpleNamespace) -> int:
    """Run every step once, from training to the server's answers."""
    backend = arguments.backend or os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend not in _BACKENDS:
        raise RefusalError(
            f"KERAS_BACKEND must be one of {', '.join(_BACKENDS)} for the demo. "
            f"Received: {backend}. Give --backend.",
            MISUSED,
        )
    out = Path(arguments.out)
    with refusing(rule="--out must be a folder that can be written.", remedy="Name another."):
        out.mkdir(parents=True, exist_ok=True)
    # All three are read when Keras is first imported.
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The net is too small to share: on a busy machine PyTorch's threads wait for each other, and
    # an epoch takes ten times as long with two as with one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    needs = f"{backend},export,server,evaluate"
    with _native_logs(out / "demo.log"):
        with needing(needs, "The demo trains, exports, serves and draws."):
            for name in _NEEDS:
                import_module(name)
        report = _run(out, backend, arguments.epochs, arguments.seed)
    if arguments.json:
        print_json(**report)
    return DONE


@contextmanager
def _native_logs(file: Path) -> Iterator[None]:
    """Send stderr into a file: TensorFlow greets there, whatever TF_CPP_MIN_LOG_LEVEL says."""
    sys.stderr.flush()
    screen = os.dup(2)
    with file.open("wb") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(screen, 2)
        os.close(screen)


def _run(out: Path, backend: str, epochs: int, seed: int) -> dict[str, Any]:
    """Train, calibrate, export, serve and ask; write everything to `out`; return the report."""
    from keras_mrl_export import export_saved_model

    base_path = out / "models" / MODEL
    training, holdout, test = load_parts(seed)
    judged = views(holdout, HOLDOUT_VIEWS, seed + 1)
    asked = views(test, TEST_VIEWS, seed + 2)
    with _step(f"Train on handwritten digits, with {backend}"):
        print_paragraph(
            f"{len(training.labels)} images train, {len(holdout.labels)} calibrate, "
            f"{len(test.labels)} test; all are moved by up to a pixel and noisy. The model answers "
            "at one of three exits: glance (a tiny net beside it), block1 (after its first "
            "convolution) and last (the whole model). Each exit reads its first 2, 4, 8, 16, 32 or "
            "all 64 features: the dims."
        )
        model = train(views(training, TRAINING_VIEWS, seed), epochs, seed, MODEL)
    with _step("Calibrate: how sure must an early exit be? Other images than those decide it"):
        logits = model.all_exits().predict(judged.images, verbose=0)
        policy, costs = calibrate(model, logits, judged)
        _print_policy(policy)
    with _step("Export a SavedModel for TensorFlow Serving, and compare its answers with Keras's"):
        right = logits[LAST].argmax(axis=-1) == judged.labels[:, None]
        version = export_saved_model(
            model,
            base_path,
            judged.images[:32],
            policy=policy,
            labels=NAMES,
            quality={dim: {"top1": float(right[:, i].mean())} for i, dim in enumerate(DIMS)},
            weights=(1.0,) * len(DIMS),
            name=MODEL,
            signatures=[
                "embed",
                "classify",
                "classify_adaptive",
                *map("classify_{}".format, EXITS),
            ],
        )
        print_line(f"  {version}")
    with _step("Serve it in a process of its own, and ask over gRPC"):
        with _served(base_path, MODEL, out / "server.log") as client:
            answers = _ask(client, training, asked)
        answers |= _costs(policy, costs)
        answers |= {"holdout_logits": logits[LAST], "holdout_labels": judged.labels}
        report = {**make_report(answers), "backend": backend, "seed": seed, "epochs": epochs}
        print_report(report)
    write_report(out, answers, report)
    print_lines(
        f"\nEverything is in {out}: the SavedModel ({version.relative_to(out.absolute())}), "
        "report.json, predictions.npz, two figures (accuracy.png, retrieval.png), and logs.\n"
        "Go on with:\n"
        f"  keras-mrl serve --model_name {MODEL} --model_base_path {base_path} --port 8500\n"
        "and, while it runs, in Python:\n"
        "  from keras_mrl_serving import Client\n"
        f"  client = Client('localhost:8500', model='{MODEL}')\n"
        "  print(client.describe().dims)"
    )
    return report


@contextmanager
def _step(title: str) -> Iterator[None]:
    print_lines(f"\n== {title}")
    start = time.monotonic()
    yield
    print_lines(f"  ({time.monotonic() - start:.1f} s)")


def _costs(policy: CascadePolicy, costs: Costs) -> dict[str, npt.NDArray[Any]]:
    """Return the multiply-adds of each fixed choice, and of the stages of a cascade."""
    fixed = [[costs.of([(name, dim)])[0] for dim in DIMS] for name in (*EXITS, LAST)]
    return {
        "fixed_costs": np.array(fixed),
        "stage_exits": np.array([name or LAST for name, _ in policy.keys]),
        "stage_dims": np.array(policy.dims),
        "stage_costs": np.array(costs.of(policy.keys)),
    }


def _print_policy(policy: CascadePolicy) -> None:
    sure = _CONFIDENCES[policy.confidence]
    for stage in policy.stages:
        rule = (
            "the rest"
            if stage.threshold is None
            else f"where {sure} is above {stage.threshold:.3f}"
        )
        print_lines(f"  {stage.exit or LAST:>6} answers {rule}")


# The server, which is given the published folder and nothing else.


@contextmanager
def _served(base_path: Path, name: str, log: Path) -> Iterator[Client]:
    """Run `keras-mrl serve` over `base_path`, give a client of it, and end it afterwards.

    Raises:
        RuntimeError: If it ends, or does not answer, before it serves; with the end of its log.
    """
    from keras_mrl_serving import Client

    port = _free_port()
    words = [sys.executable, "-m", "keras_mrl_cli", "serve", f"--model_name={name}"]
    words += [f"--model_base_path={base_path.absolute()}", f"--port={port}"]
    environment = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, cwd=base_path, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        with Client(f"127.0.0.1:{port}", model=name) as client:
            _wait(client, process, log)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    # The real server takes no port 0, so a free one is chosen here.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    from keras_mrl_serving import KerasMrlError

    deadline = time.monotonic() + _START_S
    while True:
        try:
            client.describe()
            return
        except KerasMrlError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])
                raise RuntimeError(
                    f"The server must answer within {_START_S:g} s of its start. "
                    f"Received: {error} Its log ends:\n{tail}\nMend what it names and run again."
                ) from error
        time.sleep(0.2)


# The questions, and the report of the answers.


def _ask(client: Client, gallery: Part, test: Part) -> dict[str, npt.NDArray[Any]]:
    """Classify and retrieve over gRPC; return every answer as arrays for predictions.npz."""
    from keras_mrl_serving import ExactIndex, FunnelSchedule

    manifest = client.describe()
    dims, exits = manifest.dims, manifest.exit_names
    asks = {
        (exit_, dim): partial(client.classify, test.images, dim, exit=exit_)
        for exit_ in exits
        for dim in dims
    }
    fixed = np.stack([ask().class_ids[:, 0] for ask in asks.values()], axis=1)
    adaptive = client.classify_adaptive(test.images)
    *fixed_ms, adaptive_ms = _milliseconds(
        [*asks.values(), partial(client.classify_adaptive, test.images)], LAPS
    )
    by_size = {
        size: _milliseconds(
            [
                partial(client.classify_adaptive, test.images[:size]),
                partial(client.classify, test.images[:size], dims[-1]),
            ],
            REQUEST_LAPS,
        )
        for size in REQUEST_SIZES
    }
    embeddings = client.embed(gallery.images, dims[-1])

    def neighbors(schedule: FunnelSchedule) -> npt.NDArray[np.int64]:
        index = ExactIndex.build(embeddings, schedule)
        return np.asarray(client.retrieve(test.images, index).ids, np.int64)

    funnel = funnel_over(len(embeddings))
    exhaustive = [neighbors(FunnelSchedule((dim,), (), K)) for dim in dims]
    return {
        "dims": np.array(dims),
        "exits": np.array(exits),
        "test_labels": test.labels,
        "gallery_labels": gallery.labels,
        "fixed_class_ids": fixed.reshape(len(fixed), len(exits), len(dims)),
        "fixed_milliseconds": np.reshape(fixed_ms, (len(exits), len(dims))),
        "adaptive_class_ids": adaptive.class_ids[:, 0],
        "adaptive_dims": adaptive.dim,
        "adaptive_exits": np.array(adaptive.exit, dtype=str),
        "adaptive_milliseconds": np.array(adaptive_ms),
        "request_sizes": np.array([*by_size, len(test.images)]),
        "request_milliseconds": np.array([*by_size.values(), [adaptive_ms, fixed_ms[-1]]]),
        "neighbors_by_dim": np.stack(exhaustive, axis=1),
        "funnel_neighbors": neighbors(funnel),
        "funnel_dims": np.array(funnel.dims),
        "funnel_shortlist": np.array(funnel.shortlists[0]),
    }


def _milliseconds(asks: Sequence[Callable[[], object]], laps: int) -> list[float]:
    """Return the milliseconds of the fastest of a few laps of each, all in turn."""
    taken: list[list[float]] = [[] for _ in asks]
    for _ in range(laps):
        for ask, own in zip(asks, taken, strict=True):
            start = time.perf_counter()
            ask()
            own.append(1000 * (time.perf_counter() - start))
    return [min(own) for own in taken]
