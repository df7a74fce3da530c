"""Values and gradients of a function, compiled where the backend compiles."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops


def as_numpy(tensors: Any) -> Any:
    return keras.tree.map_structure(lambda t: np.asarray(ops.convert_to_numpy(t)), tensors)


def value(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the function's value, as NumPy: one program, not one per operation."""
    tensors = keras.tree.map_structure(
        lambda array: None if array is None else ops.convert_to_tensor(array), list(arguments)
    )
    match keras.backend.backend():
        case "jax":
            import jax

            function = jax.jit(function)
        case "tensorflow":
            import tensorflow as tf

            function = tf.function(function)
    return as_numpy(function(*tensors))


def value_and_gradient(
    function: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[Any, list[Any]]:
    """Return the function's value, and the gradient of its sum by every argument, as NumPy."""
    tensors = [ops.convert_to_tensor(argument) for argument in arguments]
    match keras.backend.backend():
        case "jax":
            import jax

            def total_and_value(*arguments: Any) -> Any:
                value = function(*arguments)
                return ops.sum(value), value

            indices = tuple(range(len(tensors)))
            differentiated = jax.value_and_grad(total_and_value, indices, has_aux=True)
            (_, value), gradients = jax.jit(differentiated)(*tensors)
        case "tensorflow":
            import tensorflow as tf

            @tf.function(jit_compile=True)
            def differentiate(*arguments: Any) -> Any:
                with tf.GradientTape() as tape:
                    tape.watch(arguments)
                    value = function(*arguments)
                return value, tape.gradient(value, arguments)

            value, gradients = differentiate(*tensors)
        case _:
            tensors = [tensor.clone().requires_grad_() for tensor in tensors]
            value = function(*tensors)
            value.sum().backward()
            gradients = [tensor.grad for tensor in tensors]
    return as_numpy(value), [as_numpy(gradient) for gradient in gradients]
