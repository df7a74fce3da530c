"""Train, calibrate, export, serve and ask, on handwritten digits.

Trains a Matryoshka model on scikit-learn's 1,797 handwritten digits with model.fit, learns a
cascade on a holdout, exports the model for TensorFlow Serving, serves it in a process of its own,
and asks that server over gRPC: adaptive classification of the test images, and a funnel over the
training images. Takes a minute or two; everything it made stays in --out.

  keras-mrl demo
  keras-mrl demo --backend jax --out demo-jax
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt

from .output import print_json, print_line, print_lines
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
    from keras_mrl_serving import CascadePolicy, Client, FunnelSchedule

_BACKENDS = ("tensorflow", "jax", "torch")
_NEEDS = ("sklearn", "matplotlib", "keras", "keras_mrl.evaluation", "keras_mrl_export")

MODEL = "digits"
DIMS = (2, 4, 8, 16, 32, 64)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
K = 10
# The first stage looks at every row with 8 dims and passes 4.5% of them on to all 64.
FUNNEL_DIMS, SHORTLIST_SHARE = (8, 64), 0.045

_START_S = 120.0
_SHOWN_LINES = 10

Arrays = Mapping[str, npt.NDArray[Any]]


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
    count_option("--epochs", "N", "passes over the data (10)", usual=10, remedy="Try 10."),
    count_option(
        "--seed", "N", "seed of the split and the training (0)", usual=0, least=0, most=2**32 - 1
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
    with needing(needs, "The demo trains, exports, serves and draws."):
        for name in _NEEDS:
            import_module(name)
    report = _run(out, backend, arguments.epochs, arguments.seed)
    if arguments.json:
        print_json(**report)
    return DONE


def _run(out: Path, backend: str, epochs: int, seed: int) -> dict[str, Any]:
    """Train, calibrate, export, serve and ask; write everything to `out`; return the report."""
    from keras_mrl_export import export_saved_model

    base_path = out / "models" / MODEL
    training, holdout, test = load_parts(seed)
    sizes = ", ".join(str(len(part.labels)) for part in (training, holdout, test))
    with _step(f"Train on handwritten digits with {backend} (train, holdout, test: {sizes})"):
        model = _train(training, epochs, seed)
    with _step("Calibrate: learn on the holdout when a small dim is sure enough"):
        logits = model.predict(holdout.images, verbose=0)
        policy = _calibrate(model, holdout)
        _print_policy(policy)
    with _step("Export: a SavedModel with a signature per dim, compared with the model"):
        right = logits.argmax(axis=-1) == holdout.labels[:, None]
        version = export_saved_model(
            model,
            base_path,
            holdout.images[:32],
            policy=policy,
            labels=NAMES,
            quality={dim: {"top1": float(right[:, i].mean())} for i, dim in enumerate(DIMS)},
            weights=(1.0,) * len(DIMS),
            name=MODEL,
        )
        print_line(f"  {version}")
    with _step("Serve it in a process of its own, and ask over gRPC"):
        with _served(base_path, MODEL, out / "server.log") as client:
            answers = _ask(client, training, test)
        answers |= {"holdout_logits": logits, "holdout_labels": holdout.labels}
        report = {**_report(answers), "backend": backend, "seed": seed, "epochs": epochs}
        _print_report(report)
    _write(out, answers, report)
    print_lines(
        f"\nEverything is in {out}: the SavedModel ({version.relative_to(out.absolute())}), "
        "report.json, predictions.npz, accuracy.png, retrieval.png.\n"
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


# Data.


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the images.

    Args:
        images: float32 `(rows, 8, 8, 1)` in 0..1.
        labels: int64 `(rows,)`, 0..9.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def load_parts(seed: int) -> tuple[Part, Part, Part]:
    """Return the training half, the holdout and the test quarter, with equal shares of classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]

    def halves(part: Part) -> tuple[Part, Part]:
        first, second, first_labels, second_labels = train_test_split(
            part.images, part.labels, test_size=0.5, random_state=seed, stratify=part.labels
        )
        return Part(first, first_labels), Part(second, second_labels)

    training, rest = halves(Part(images, digits.target.astype(np.int64)))
    return training, *halves(rest)


def with_shifts(part: Part) -> Part:
    """Return the images and their copies moved by one pixel to each of the four sides."""
    images = [part.images]
    for axis in (1, 2):
        empty = np.zeros_like(np.take(part.images, [0], axis))
        images.append(np.concatenate([np.delete(part.images, 0, axis), empty], axis))
        images.append(np.concatenate([empty, np.delete(part.images, -1, axis)], axis))
    return Part(np.concatenate(images), np.tile(part.labels, len(images)))


# Training, on images and their shifted copies.


def _train(part: Part, epochs: int, seed: int) -> Any:
    """Return the trained Keras model; prints a line per epoch."""
    import keras

    from keras_mrl import MatryoshkaClassifier, MatryoshkaHead

    keras.utils.set_random_seed(seed)
    shifted = with_shifts(part)
    model = MatryoshkaClassifier(_backbone(), MatryoshkaHead(len(NAMES), dims=DIMS), name=MODEL)
    steps = epochs * -(-len(shifted.labels) // 32)
    model.compile(
        optimizer=keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )

    def print_epoch(epoch: int, logs: Mapping[str, float]) -> None:
        by_dim = "  ".join(f"{dim}: {100 * logs[f'accuracy_{dim}']:5.1f}" for dim in DIMS)
        progress = f"epoch {epoch + 1:3d}/{epochs}  loss {logs['loss']:7.3f}"
        print_lines(f"  {progress}  accuracy at dim {by_dim}")

    model.fit(
        shifted.images,
        shifted.labels,
        batch_size=32,
        epochs=epochs,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=print_epoch)],
    )
    return model


def _backbone() -> Any:
    import keras
    from keras import layers

    convolutions: list[Any] = []
    for filters, strides in ((32, 1), (64, 2), (64, 1)):
        convolutions += [
            layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
        ]
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            *convolutions,
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(DIMS[-1]),
        ],
        name="backbone",
    )


def _calibrate(model: Any, holdout: Part) -> CascadePolicy:
    """Return a cascade that begins at the first dim within a fifth of a point of the full one.

    The paper's procedure compares a dim with the next one only; begun far below the full dim's
    accuracy, the cascade would inherit the losses of every step between them. The holdout is
    shifted, too: its 449 images alone hold a handful of mistakes to learn from.
    """
    from keras_mrl_serving import CascadePolicy

    shifted = with_shifts(holdout)
    logits = model.predict(shifted.images, verbose=0)  # (rows, dims, classes)
    accuracy = (logits.argmax(axis=-1) == shifted.labels[:, None]).mean(axis=0)
    first = int(np.argmax(accuracy >= accuracy[-1] - 0.002))
    policy = CascadePolicy.learn(logits[:, first:], shifted.labels, DIMS[first:])
    # The manifest's report of the holdout counts its images alone, not the copies.
    own_logits = model.predict(holdout.images, verbose=0)[:, first:]
    return replace(policy, holdout=policy.evaluate(own_logits, holdout.labels))


def _print_policy(policy: CascadePolicy) -> None:
    for stage in policy.stages:
        rule = "takes the rest" if stage.threshold is None else f"if above {stage.threshold:.4f}"
        print_lines(f"  stop at dim {stage.dim:>3} {rule}")


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


def _funnel(gallery_size: int) -> FunnelSchedule:
    from keras_mrl_serving import FunnelSchedule

    return FunnelSchedule(FUNNEL_DIMS, (max(K, int(SHORTLIST_SHARE * gallery_size)),), K)


def _ask(client: Client, gallery: Part, test: Part) -> dict[str, npt.NDArray[Any]]:
    """Classify and retrieve over gRPC; return every answer as arrays for predictions.npz."""
    from keras_mrl_serving import CascadePolicy, ExactIndex, FunnelSchedule

    manifest = client.describe()
    dims = manifest.dims
    class_ids_by_dim = [client.classify(test.images, dim).class_ids[:, 0] for dim in dims]
    adaptive = client.classify_adaptive(test.images)
    embeddings = client.embed(gallery.images, dims[-1])

    def neighbors(schedule: FunnelSchedule) -> npt.NDArray[np.int64]:
        return client.retrieve(test.images, ExactIndex.build(embeddings, schedule)).ids

    funnel = _funnel(len(embeddings))
    exhaustive = [neighbors(FunnelSchedule((dim,), (), K)) for dim in dims]
    return {
        "dims": np.array(dims),
        "stage_dims": np.array(CascadePolicy.from_json(manifest.cascade or {}).dims),
        "test_labels": test.labels,
        "gallery_labels": gallery.labels,
        "class_ids_by_dim": np.stack(class_ids_by_dim, axis=1),
        "adaptive_class_ids": adaptive.class_ids[:, 0],
        "adaptive_dims": adaptive.dim,
        "neighbors_by_dim": np.stack(exhaustive, axis=1),
        "funnel_neighbors": neighbors(funnel),
        "funnel_dims": np.array(funnel.dims),
        "funnel_shortlist": np.array(funnel.shortlists[0]),
    }


def _report(answers: Arrays) -> dict[str, Any]:
    """Return fractions for accuracies and mAP, multiply-adds per query for costs."""
    from keras_mrl.evaluation import mean_average_precision_at_k, precision_at_k

    dims = [int(dim) for dim in answers["dims"]]
    labels = answers["test_labels"]
    accuracy = (answers["class_ids_by_dim"] == labels[:, None]).mean(axis=0)
    # The fixed dim is chosen as a policy is: on the holdout, the narrowest among the best.
    holdout = answers["holdout_logits"].argmax(axis=-1) == answers["holdout_labels"][:, None]
    best_fixed = int(np.argmax(holdout.mean(axis=0)))
    stopped = answers["adaptive_dims"]
    stages = answers["stage_dims"].tolist()
    cumulative = dict(zip(stages, np.cumsum(stages).tolist(), strict=True))
    hits = answers["gallery_labels"][answers["neighbors_by_dim"]] == labels[:, None, None]
    funnel_hits = answers["gallery_labels"][answers["funnel_neighbors"]] == labels[:, None]
    rows = len(answers["gallery_labels"])
    funnel = _funnel(rows)
    map10 = [mean_average_precision_at_k(hits[:, i]) for i in range(len(dims))]
    return {
        "accuracy_by_dim": _by_dim(dims, accuracy),
        "full_accuracy": float(accuracy[-1]),
        "best_fixed_dim": dims[best_fixed],
        "best_fixed_accuracy": float(accuracy[best_fixed]),
        "adaptive_accuracy": float((answers["adaptive_class_ids"] == labels).mean()),
        "expected_dim": float(stopped.mean()),
        "cumulative_dim": float(np.mean([cumulative[int(dim)] for dim in stopped])),
        "stopped_by_dim": {str(dim): int((stopped == dim).sum()) for dim in dims},
        "p10_by_dim": _by_dim(dims, [precision_at_k(hits[:, i]) for i in range(len(dims))]),
        "map10_by_dim": _by_dim(dims, map10),
        "p10_funnel": precision_at_k(funnel_hits),
        "map10_exact": map10[-1],
        "map10_funnel": mean_average_precision_at_k(funnel_hits),
        "madds_by_dim": {str(dim): rows * dim for dim in dims},
        "exact_madds": rows * dims[-1],
        "funnel_madds": funnel.madds(rows),
        "funnel": funnel.to_json(),
        "gallery_size": rows,
        "test_size": len(labels),
    }


def _by_dim(dims: list[int], values: Any) -> dict[str, float]:
    return {str(dim): float(value) for dim, value in zip(dims, values, strict=True)}


def _print_report(report: Mapping[str, Any]) -> None:
    print_lines(
        f"  {'dim':>6}  {'accuracy':>8}  {'stopped':>7}  {'p10':>6}  {'map10':>6}  {'madds':>8}"
    )
    for dim, accuracy in report["accuracy_by_dim"].items():
        print_lines(
            f"  {dim:>6}  {100 * accuracy:7.2f}%  {report['stopped_by_dim'][dim]:>7}"
            f"  {100 * report['p10_by_dim'][dim]:6.2f}  {100 * report['map10_by_dim'][dim]:6.2f}"
            f"  {report['madds_by_dim'][dim]:>8,}"
        )
    print_lines(
        f"  adaptive classification: {100 * report['adaptive_accuracy']:.2f}% at "
        f"{report['expected_dim']:.1f} dims on average ({report['cumulative_dim']:.1f} counting "
        f"every head asked), against {100 * report['full_accuracy']:.2f}% at the full dim and "
        f"{100 * report['best_fixed_accuracy']:.2f}% at the best fixed dim, "
        f"{report['best_fixed_dim']}"
    )
    share = report["funnel_madds"] / report["exact_madds"]
    first = report["funnel"]["shortlists"][0] / report["gallery_size"]
    print_lines(
        f"  funnel {' -> '.join(map(str, report['funnel']['dims']))} with a shortlist of "
        f"{100 * first:.1f}%: map10 {100 * report['map10_funnel']:.2f} against "
        f"{100 * report['map10_exact']:.2f} exhaustive, p10 {100 * report['p10_funnel']:.2f}, at "
        f"{report['funnel_madds']:,} multiply-adds per query against {report['exact_madds']:,} "
        f"({share:.2f}x)"
    )


def _write(out: Path, answers: Arrays, report: Mapping[str, Any]) -> None:
    from keras_mrl.evaluation import plot_accuracy, plot_retrieval

    np.savez_compressed(out / "predictions.npz", allow_pickle=False, **answers)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    plot_accuracy(
        {int(dim): value for dim, value in report["accuracy_by_dim"].items()},
        (report["expected_dim"], report["adaptive_accuracy"]),
        out / "accuracy.png",
    )
    plot_retrieval(
        {int(d): (report["madds_by_dim"][d], m) for d, m in report["map10_by_dim"].items()},
        (report["funnel_madds"], report["map10_funnel"]),
        out / "retrieval.png",
    )
