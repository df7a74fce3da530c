"""The whole road once: the steps of the demo, in order."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mrl.evaluation import plot_accuracy, plot_retrieval
from keras_mrl_export import export_saved_model
from keras_mrl_serving import CascadePolicy

from .ask import ask
from .data import NAMES, Part, load, with_shifts
from .report import show, summarise
from .server import serving
from .train import DIMS, train

MODEL = "digits"


def walk(out: Path, backend: str, epochs: int, seed: int) -> dict[str, Any]:
    """Train, calibrate, export, serve and ask; write everything to `out`; return the report."""
    out.mkdir(parents=True, exist_ok=True)
    base_path = out / "models" / MODEL
    training, holdout, test = load(seed)
    sizes = ", ".join(str(len(part.labels)) for part in (training, holdout, test))
    with _step(f"Train on handwritten digits with {backend} (train, holdout, test: {sizes})"):
        model = train(training, epochs, seed)
    with _step("Calibrate: learn on the holdout when a small dim is sure enough"):
        logits = model.predict(holdout.images, verbose=0)
        policy = _calibrate(model, holdout)
        _show_policy(policy)
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
        print(f"  {version}")
    with _step("Serve it in a process of its own, and ask over gRPC"):
        with serving(base_path, MODEL, out / "server.log") as client:
            answers = ask(client, training, test)
        answers |= {"holdout_logits": logits, "holdout_labels": holdout.labels}
        report = {**summarise(answers), "backend": backend, "seed": seed, "epochs": epochs}
        show(report)
    _write(out, answers, report)
    _show_artefacts(out, version)
    return report


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"  ({time.monotonic() - start:.1f} s)", flush=True)


def _calibrate(model: keras.Model, holdout: Part) -> CascadePolicy:
    """A cascade that begins at the first dim within a fifth of a point of the full one.

    The paper's procedure compares a dim with the next one only; begun far below the full dim's
    accuracy, the cascade would inherit the losses of every step between them. The holdout is
    shown moved by a pixel, too: 449 images alone hold a handful of mistakes to learn from.
    """
    seen = with_shifts(holdout)
    logits, labels = model.predict(seen.images, verbose=0), seen.labels
    accuracy = (logits.argmax(axis=-1) == labels[:, None]).mean(axis=0)
    first = int(np.argmax(accuracy >= accuracy[-1] - 0.002))
    policy = CascadePolicy.learn(logits[:, first:], labels, DIMS[first:])
    # What the manifest tells of the holdout is counted on its images alone, not on the copies.
    own = model.predict(holdout.images, verbose=0)[:, first:]
    return replace(policy, holdout=policy.evaluate(own, holdout.labels))


def _show_policy(policy: CascadePolicy) -> None:
    for stage in policy.stages:
        rule = "takes the rest" if stage.threshold is None else f"if above {stage.threshold:.4f}"
        print(f"  stop at dim {stage.dim:>3} {rule}")


def _write(out: Path, answers: dict[str, Any], report: dict[str, Any]) -> None:
    np.savez_compressed(out / "predictions.npz", **answers)
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


def _show_artefacts(out: Path, version: Path) -> None:
    print(
        f"\nEverything is in {out}: the SavedModel ({version.relative_to(out.absolute())}), "
        "report.json, predictions.npz, accuracy.png, retrieval.png.\n"
        "Go on with:\n"
        f"  keras-mrl serve --model_name {MODEL} --model_base_path {out / 'models' / MODEL} "
        "--port 8500\n"
        "and, while it runs, in Python:\n"
        "  from keras_mrl_serving import Client\n"
        f"  client = Client('localhost:8500', model='{MODEL}')\n"
        "  print(client.describe().dims)"
    )
