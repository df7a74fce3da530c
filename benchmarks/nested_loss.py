"""What nested cross-entropy costs beside one head: time, memory, error.

    python benchmarks/nested_loss.py [--backend tensorflow|jax|torch] [--classes 20000] ...

Forward and backward pass from the same features, compiled where the backend compiles:

- ff: one head on the full width, as a fixed-feature net has it.
- naive, naive_tied: a loop over the dims with Keras's cross-entropy, a kernel each or one for all.
- chunked, chunked_tied: the same loop over chunks of the batch, whose logits are computed again
  in the backward pass (`keras.remat`).
- fused, fused_tied: `keras_mrl.nested_crossentropy`.
- fit: one step of `MatryoshkaClassifier.fit`, tied, with sample weights and the accuracy per dim,
  in mixed_bfloat16, its backbone one dense layer of the width.

Times are medians of laps in which all ways take turns, in one process. Peaks are of a process per
way: its growth over itself with the inputs loaded, after one run has compiled; on JAX the
compiler's own count of temporary and output bytes. Errors are of gradients, against float64 loops
in NumPy, as shares of the largest entry. Targets: docs/benchmarks/nested_loss.md.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from float64_gradients import float64_gradients

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

WAYS = ("ff", "naive", "naive_tied", "chunked", "chunked_tied", "fused", "fused_tied", "fit")
CHUNKS = 8  # of the batch, for the rematerialised loop


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--laps", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend
    if arguments.peak_of:
        print(json.dumps(_peak(arguments, arguments.peak_of)))
        return
    found: dict[str, Any] = {k: v for k, v in vars(arguments).items() if k != "peak_of"}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found[f"{way}_peak_mib"] = round(json.loads(done.stdout.splitlines()[-1]), 1)
    for way, times in _times(arguments).items():
        found[f"{way}_ms"] = round(1e3 * statistics.median(times), 1)
        print(
            f"{way:>13}: {found[f'{way}_ms']:8.1f} ms (from {1e3 * min(times):.1f} to "
            f"{1e3 * max(times):.1f}), peak {found[f'{way}_peak_mib']:8.1f} MiB",
            flush=True,
        )
    found |= _ratios(found) | _errors(arguments)
    print(json.dumps(found))


def _ratios(found: dict[str, Any]) -> dict[str, float]:
    pairs = {
        "tied_over_naive": ("fused_tied_ms", "naive_tied_ms"),
        "untied_over_naive": ("fused_ms", "naive_ms"),
        "tied_over_chunked": ("fused_tied_ms", "chunked_tied_ms"),
        "tied_over_ff": ("fused_tied_ms", "ff_ms"),
        "tied_peak_over_naive": ("fused_tied_peak_mib", "naive_tied_peak_mib"),
        "untied_peak_over_naive": ("fused_peak_mib", "naive_peak_mib"),
    }
    return {name: round(found[a] / found[b], 3) for name, (a, b) in pairs.items()}


class Problem:
    """Features, kernels and labels of one seed, and every way to a loss and its gradient."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from keras import ops

        from keras_mrl import log_spaced_dims

        self.given = arguments
        self.dims = log_spaced_dims(arguments.width)
        random = np.random.default_rng(arguments.seed)
        self.x = random.normal(size=(arguments.batch, arguments.width)).astype("float32")
        self.y = random.integers(0, arguments.classes, arguments.batch)
        self.untied = [self._kernel(random, dim) for dim in self.dims]
        self.tied = [self._kernel(random, arguments.width)]
        self.labels = ops.convert_to_tensor(self.y, "int32")

    def _kernel(self, random: np.random.Generator, dim: int) -> Any:
        shape = (dim, self.given.classes)
        return (random.normal(size=shape) / np.sqrt(dim)).astype("float32")

    def arguments(self, way: str) -> list[Any]:
        """Features, kernels, biases."""
        from keras import ops

        kernels = self.tied if way == "ff" or way.endswith("_tied") else self.untied
        biases = [np.zeros(self.given.classes, "float32") for _ in kernels]
        return [ops.convert_to_tensor(array) for array in (self.x, *kernels, *biases)]

    def loss(self, way: str) -> Callable[..., Any]:
        """The loss as a function of `arguments`."""
        import keras
        from keras import ops

        from keras_mrl import nested_crossentropy

        tied = way.endswith("_tied")
        count = 1 if tied or way == "ff" else len(self.dims)

        def fused(x: Any, *rest: Any) -> Any:
            return nested_crossentropy(x, rest[:count], rest[count:], self.labels, self.dims).loss

        def entropy(labels: Any, logits: Any) -> Any:
            losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            return ops.sum(losses) / self.given.batch

        def ff(x: Any, kernel: Any, bias: Any) -> Any:
            return entropy(self.labels, ops.matmul(x, kernel) + bias)

        def loop(labels: Any, x: Any, *rest: Any) -> Any:
            total: Any = 0.0
            for index, dim in enumerate(self.dims):
                kernel, bias = rest[0 if tied else index], rest[count + (0 if tied else index)]
                total = total + entropy(labels, ops.matmul(x[:, :dim], kernel[:dim]) + bias)
            return total

        def naive(x: Any, *rest: Any) -> Any:
            return loop(self.labels, x, *rest)

        def chunked(x: Any, *rest: Any) -> Any:
            total: Any = 0.0
            size = -(-self.given.batch // CHUNKS)
            for start in range(0, self.given.batch, size):
                part = slice(start, start + size)
                total = total + keras.remat(loop)(self.labels[part], x[part], *rest)
            return total

        return {"ff": ff, "naive": naive, "chunked": chunked, "fused": fused}[way.split("_")[0]]


def _step(problem: Problem, way: str) -> tuple[Callable[[], Any], Any]:
    """A function that runs one pass and waits for it, and JAX's compiled form."""
    import keras

    if way == "fit":
        return _fit_step(problem), None
    loss, given = problem.loss(way), problem.arguments(way)
    match keras.backend.backend():
        case "jax":
            import jax

            differentiated = jax.value_and_grad(loss, tuple(range(len(given))))
            compiled = jax.jit(differentiated).lower(*given).compile()
            wait: Any = jax.block_until_ready
            return lambda: wait(compiled(*given)), compiled
        case "tensorflow":
            import tensorflow as tf

            @tf.function(jit_compile=True)
            def run(*tensors: Any) -> Any:
                with tf.GradientTape() as tape:
                    tape.watch(tensors)
                    value = loss(*tensors)
                return value, tape.gradient(value, tensors)

            def waited() -> Any:
                value, gradient = run(*given)
                float(value)
                return value, gradient

            return waited, None
    given = [tensor.requires_grad_() for tensor in given]

    def backward() -> Any:
        for tensor in given:
            tensor.grad = None
        value = loss(*given)
        value.backward()
        return value.detach(), [tensor.grad for tensor in given]

    return backward, None


def _fit_step(problem: Problem) -> Callable[[], Any]:
    import keras

    from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, MatryoshkaMetric

    given = problem.given
    keras.config.set_dtype_policy("mixed_bfloat16")
    backbone = keras.Sequential([keras.Input((given.width,)), keras.layers.Dense(given.width)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(given.classes, problem.dims, tied=True))
    keras.config.set_dtype_policy("float32")
    model.compile(
        "sgd",
        MatryoshkaLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
        weighted_metrics=[
            MatryoshkaMetric(keras.metrics.SparseCategoricalAccuracy(name="right"), problem.dims)
        ],
    )
    weights = np.random.default_rng(0).random(given.batch).astype("float32")

    def fit() -> Any:
        return model.fit(
            problem.x, problem.y, sample_weight=weights, batch_size=given.batch, verbose=0
        )

    return fit


def _times(arguments: argparse.Namespace) -> dict[str, list[float]]:
    problem = Problem(arguments)
    steps = {way: _step(problem, way)[0] for way in WAYS}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.laps):
        for way, step in steps.items():
            began = time.perf_counter()
            step()
            times[way].append(time.perf_counter() - began)
    return times


def _peak(arguments: argparse.Namespace, way: str) -> float:
    """MiB."""
    problem = Problem(arguments)
    before = _resident("VmRSS")
    step, compiled = _step(problem, way)
    if compiled is not None:
        memory = compiled.memory_analysis()
        return float(memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
    step()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    step()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _errors(arguments: argparse.Namespace) -> dict[str, float]:
    problem = Problem(arguments)
    worst = {}
    for kind in ("", "_tied"):
        exact = float64_gradients(
            problem.x, problem.y, problem.tied if kind else problem.untied, problem.dims
        )
        for way in ("naive", "fused"):
            gradient = _step(problem, way + kind)[0]()[1]
            worst[way + kind] = max(
                float(np.abs(_array(own) - right).max() / np.abs(right).max())
                for own, right in zip(gradient, exact, strict=True)
            )
    return {
        "grad_error": max(worst["fused"], worst["fused_tied"]),
        "naive_grad_error": max(worst["naive"], worst["naive_tied"]),
        "tied_error_over_naive": round(worst["fused_tied"] / worst["naive_tied"], 3),
        "untied_error_over_naive": round(worst["fused"] / worst["naive"], 3),
    }


def _array(tensor: Any) -> Any:
    from keras import ops

    return ops.convert_to_numpy(tensor)


if __name__ == "__main__":
    main()
