"""In-batch negatives: memory and time of the plain loss and the flat one, and what training gives.

    python benchmarks/contrastive.py [--backend tensorflow|jax|torch] [--batch 8192] [--width 512]
    python benchmarks/contrastive.py --train [--data FOLDER] [--epochs 20] [--rows 12000]

The first form measures one forward and backward pass over pairs at dims 8, 16, ... up to the
width, every way in a process of its own, compiled where the backend compiles: the naive loop (per
dim: cut, scale, multiply, Keras's cross-entropy), `ContrastiveLoss`, and
`ContrastiveLoss(chunk_size=...)`. A peak is the growth of the process over its state with the
inputs loaded; on JAX the compiler's own count of temporary and output bytes is given as well. Where
other work runs beside it, trust `cpu_ms`, with OMP_NUM_THREADS=1.

The second form trains a `MatryoshkaEncoder` on two views of each image, another of the same size
at full width only, and says how often, at each dim, the nearest of all second views of the test
images is the image's own: for both, and for the principal components of the latter. Images are
scikit-learn's digits, or those of `--data`: CIFAR-100 as `benchmarks/cifar_embeddings.py` reads it.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

WAYS = ("naive", "plain", "flat")
TEMPERATURE = 0.05
REPEATS = 3


def main() -> None:
    """Measure or train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--data", type=Path, help="folder of the zips of CIFAR-100")
    parser.add_argument("--rows", type=int, default=12_000, help="images to read")
    parser.add_argument("--epochs", type=int, default=20, help="of training, each encoder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend
    if arguments.train:
        from contrastive_training import train

        print(json.dumps(train(arguments)))
    elif arguments.way is not None:
        print(json.dumps(_measure(arguments)))
    else:
        print(json.dumps(_compare(arguments)))


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("backend", "batch", "width", "chunk_size", "symmetric")
    }
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"ended by {done.returncode}"]
            print(f"{way}: not measured ({said[0]})")
            continue
        measured = json.loads(done.stdout.splitlines()[-1])
        print(f"{way}: {measured}")
        found |= {f"{way}_{name}": value for name, value in measured.items()}
    for name in ("peak_mib", "ms", "cpu_ms"):
        if f"plain_{name}" in found and f"flat_{name}" in found:
            found[f"flat_over_plain_{name}"] = round(
                found[f"flat_{name}"] / found[f"plain_{name}"], 3
            )
    return found


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    import keras
    from keras import ops

    from keras_mrl import ContrastiveLoss, log_spaced_dims

    random = np.random.default_rng(arguments.seed)
    pairs = random.normal(size=(arguments.batch, 2, arguments.width)).astype("float32")
    pairs[:, 1] += pairs[:, 0]
    dims = log_spaced_dims(arguments.width)
    chunk_size = arguments.chunk_size if arguments.way == "flat" else None
    ours = ContrastiveLoss(
        dims, temperature=TEMPERATURE, symmetric=arguments.symmetric, chunk_size=chunk_size
    )

    def naive(rows: Any) -> Any:
        own = ops.arange(arguments.batch)
        total: Any = 0.0
        for dim in dims:
            unit = ops.normalize(rows[:, :, :dim], axis=-1)
            logits = ops.matmul(unit[:, 0], ops.transpose(unit[:, 1])) / TEMPERATURE
            ways = (logits, ops.transpose(logits)) if arguments.symmetric else (logits,)
            for given in ways:
                losses = keras.losses.sparse_categorical_crossentropy(own, given, from_logits=True)
                total = total + ops.mean(losses) / len(ways)
        return total

    def loss(rows: Any) -> Any:
        return naive(rows) if arguments.way == "naive" else ops.mean(ours.call(None, rows))

    step, extra = _step(loss, pairs)
    gc.collect()
    before = _peak_mib()
    laps = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter(), time.process_time()
        value = step()
        laps.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    elapsed, computed = 1e3 * np.median(laps[1:], axis=0)  # the first lap compiles
    return {
        "ms": round(float(elapsed), 1),
        "cpu_ms": round(float(computed), 1),
        "peak_mib": round(_peak_mib() - before, 1),
        "loss": round(value, 5),
        **extra,
    }


def _step(loss: Any, pairs: Any) -> tuple[Any, dict[str, float]]:
    """One forward and backward pass that waits for its result, and what the compiler knows."""
    import keras

    name = keras.backend.backend()
    if name == "jax":
        import jax

        given = jax.numpy.asarray(pairs)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(given).compile()
        known: Any = compiled.memory_analysis()
        size = known.temp_size_in_bytes + known.output_size_in_bytes
        return (
            lambda: float(compiled(given)[0]),
            {"compiled_peak_mib": round(size / 2**20, 1)},
        )
    if name == "torch":
        import torch

        leaf = torch.tensor(pairs, requires_grad=True)

        def torch_step() -> float:
            leaf.grad = None
            value = loss(leaf)
            value.backward()
            return float(value.detach())

        return torch_step, {}
    import tensorflow as tf

    rows = tf.constant(pairs)

    @tf.function(jit_compile=True)  # as `fit` does where it can
    def tensorflow_step(rows: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(rows)
            value = loss(rows)
        return value, tape.gradient(value, rows)

    return lambda: float(tensorflow_step(rows)[0]), {}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
