"""A function's value and gradient, on whatever backend runs."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops


def value_and_gradient(
    function: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """Return the value and the gradient by every argument, as NumPy; compiled where it can be."""
    tensors = [ops.convert_to_tensor(argument) for argument in arguments]
    match keras.backend.backend():
        case "jax":
            import jax

            every = tuple(range(len(tensors)))
            value, gradient = jax.jit(jax.value_and_grad(function, every))(*tensors)
        case "tensorflow":
            import tensorflow as tf

            @tf.function(jit_compile=True)
            def differentiated(*given: Any) -> Any:
                with tf.GradientTape() as tape:
                    tape.watch(given)
                    value = function(*given)
                return value, tape.gradient(value, given)

            value, gradient = differentiated(*tensors)
        case _:
            tensors = [tensor.clone().requires_grad_() for tensor in tensors]
            value = function(*tensors)
            value.backward()
            gradient = [tensor.grad for tensor in tensors]
    return np.asarray(ops.convert_to_numpy(value)), [ops.convert_to_numpy(g) for g in gradient]
