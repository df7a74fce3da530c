"""Small SavedModels, one for each kind of input that the command line sends, and two of heads.

Every model's features are three numbers; its logits are they by 50, at dim 1 the first only. A row
of "tags" may have several classes. The values of "prices" are two sums of them, one the negative.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_mrl_serving import CascadePolicy, Manifest, contract
from keras_mrl_serving.cascade.policy import Stage

LABELS = ["red", "grün", "blue"]
POLICY = CascadePolicy((Stage(1, 0.9), Stage(3, None)))
SPECS: dict[str, dict[str, dict[str, Any]]] = {
    "pixels": {"image": {"dtype": "float32", "shape": [None, 8, 6, 3]}},
    "gray": {"image": {"dtype": "uint8", "shape": [None, None, None, 1]}},
    "bytes": {"image": {"dtype": "string", "shape": [None]}},
    "rows": {"x": {"dtype": "float32", "shape": [None, 3]}},
    "pair": {
        "a": {"dtype": "float32", "shape": [None, 2]},
        "b": {"dtype": "float32", "shape": [None, 1]},
    },
    "tags": {"x": {"dtype": "float32", "shape": [None, 3]}},
    "prices": {"x": {"dtype": "float32", "shape": [None, 3]}},
}
HEAD: dict[str, Any] = {
    "kind": "classifier",
    "activation": "softmax",
    "num_classes": 3,
    "top_k": 2,
    "labels": True,
}
MORE: dict[str, dict[str, Any]] = {
    "pixels": {**HEAD, "cascade": POLICY.to_json()},
    "gray": {"kind": "encoder"},
    "bytes": {**HEAD, "quality": {"1": {"top1": 0.7}, "3": {"top1": 0.8}}},
    "rows": {**HEAD, "labels": False},
    "pair": {"kind": "encoder"},
    "tags": {**HEAD, "activation": "sigmoid", "top_k": 3},
    "prices": {"kind": "regressor", "num_values": 2},
}


def save(name: str, path: Path) -> None:
    """Write the model of this name as a version."""
    import tensorflow as tf

    manifest = Manifest(
        name=name,
        fingerprint=name,
        dims=(1, 3),
        width=3,
        inputs=SPECS[name],
        made_with={},
        **MORE[name],
    )
    specs = [tf.TensorSpec(spec["shape"], spec["dtype"], key) for key, spec in SPECS[name].items()]

    def decoded(data: Any) -> Any:
        image = tf.io.decode_image(data, channels=3, expand_animations=False)
        return tf.reduce_mean(tf.cast(image, tf.float32), [0, 1])

    def features(*inputs: Any) -> Any:
        first = inputs[0]
        if name == "bytes":
            return tf.ensure_shape(tf.map_fn(decoded, first, tf.float32), (None, 3))
        if name == "gray":
            sizes = tf.cast(tf.shape(first)[1:3], tf.float32) + tf.zeros((tf.shape(first)[0], 2))
            mean = tf.reduce_mean(tf.cast(first, tf.float32), [1, 2])
            return tf.concat([mean, sizes], 1)
        if name == "pixels":
            return tf.reduce_mean(first, [1, 2])
        return tf.concat(inputs, 1)

    def head(prefix: Any, dim: int) -> dict[str, Any]:
        logits = tf.pad(prefix, [[0, 0], [0, 3 - dim]]) / 50
        is_softmax = manifest.activation == "softmax"
        probabilities = tf.nn.softmax(logits) if is_softmax else tf.sigmoid(logits)
        top, class_ids = tf.math.top_k(probabilities, manifest.top_k)
        answer = {"class_ids": tf.cast(class_ids, tf.int64), "probabilities": top}
        answer["confidence"] = top[:, 0]
        if manifest.labels:
            answer["labels"] = tf.gather(tf.constant(LABELS), class_ids)
        return {**answer, "logits": logits}

    def classified(features: Any, dim: int) -> dict[str, Any]:
        answer = head(features[:, :dim], dim)
        answer["dim"] = tf.fill([tf.shape(features)[0]], dim)
        del answer["logits"]
        return answer

    def adaptive(*inputs: Any) -> dict[str, Any]:
        narrow, wide = (classified(features(*inputs), dim) for dim in (1, 3))
        sure = narrow["confidence"] > 0.9
        return {
            n: tf.where(tf.reshape(sure, [-1] + [1] * (len(v.shape) - 1)), v, wide[n])
            for n, v in narrow.items()
        }

    def of_inputs(function: Callable[..., Any]) -> Any:
        return tf.function(function).get_concrete_function(*specs)

    signatures = {
        contract.DESCRIBE: tf.function(
            lambda key: {"manifest": tf.fill(tf.shape(key), manifest.to_json())},
            input_signature=[tf.TensorSpec((None,), tf.string, "key")],
        ),
        contract.FEATURES: of_inputs(lambda *inputs: {"features": features(*inputs)}),
    }
    for dim in manifest.dims:
        signatures[contract.embed(dim)] = of_inputs(
            lambda *inputs, dim=dim: {"embedding": features(*inputs)[:, :dim]}
        )
        if manifest.num_values:
            signatures[contract.regress(dim)] = of_inputs(
                lambda *inputs, dim=dim: {
                    "values": tf.reduce_sum(features(*inputs)[:, :dim], 1, True) * [1.0, -1.0]
                }
            )
        if manifest.num_classes:
            signatures[contract.classify(dim)] = of_inputs(
                lambda *inputs, dim=dim: {
                    n: v for n, v in classified(features(*inputs), dim).items() if n != "dim"
                }
            )
            signatures[contract.head(dim)] = tf.function(
                lambda features, dim=dim: head(features, dim),
                input_signature=[tf.TensorSpec((None, dim), tf.float32, "features")],
            )
    if manifest.cascade:
        signatures[contract.CLASSIFY_ADAPTIVE] = of_inputs(adaptive)
    tf.saved_model.save(tf.Module(), str(path), signatures=signatures)
