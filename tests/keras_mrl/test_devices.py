"""Several devices train as one does: simulated, in processes of their own."""

import json
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers.small_models import run_fresh

pytestmark = pytest.mark.backend

# One device or four: the same script, told how many.
SCRIPT = """
import contextlib, json, os, sys
devices = int(sys.argv[1])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
import keras, numpy as np
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, MatryoshkaMetric
from keras_mrl.losses import crossentropy

crossentropy.CHUNK_LOGITS = 500  # several chunks in every step
scope = contextlib.nullcontext()
if keras.backend.backend() == "jax":
    import jax
    assert len(jax.devices()) == devices
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
else:
    import tensorflow as tf
    (cpu,) = tf.config.list_physical_devices("CPU")
    logical = [tf.config.LogicalDeviceConfiguration()] * devices
    tf.config.set_logical_device_configuration(cpu, logical)
    names = [device.name for device in tf.config.list_logical_devices("CPU")]
    if devices > 1:
        reduce = tf.distribute.ReductionToOneDevice()
        scope = tf.distribute.MirroredStrategy(names, cross_device_ops=reduce).scope()

random = np.random.default_rng(0)
x = random.normal(size=(128, 6)).astype("float32")
y = random.integers(0, 50, 128)
dims = (2, 4, 8)
keras.utils.set_random_seed(0)
with scope:
    backbone = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8)])
    head = MatryoshkaHead(50, dims, tied=sys.argv[2] == "tied", kernel_regularizer="l2")
    model = MatryoshkaClassifier(backbone, head)
    drawn = 2 if sys.argv[2] == "drawn" else None
    model.compile(
        keras.optimizers.SGD(0.5),
        MatryoshkaLoss(
            keras.losses.SparseCategoricalCrossentropy(from_logits=True), dims_per_step=drawn
        ),
        metrics=[MatryoshkaMetric(keras.metrics.SparseCategoricalAccuracy(name="accuracy"), dims)],
        jit_compile=keras.backend.backend() == "jax",
    )
history = model.fit(
    x, y, batch_size=64, epochs=3, verbose=0, shuffle=False, validation_data=(x, y),
    sample_weight=random.random(128),
)
print(json.dumps(history.history))
"""


def trained(devices: int, form: str) -> dict[str, Any]:
    log: dict[str, Any] = json.loads(run_fresh(SCRIPT, devices, form).splitlines()[-1])
    return log


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras distributes over JAX and TensorFlow alone"
)
@pytest.mark.parametrize("form", ["tied", "drawn"])
def test_the_losses_of_four_devices_are_those_of_one(form: str) -> None:
    one, four = trained(1, form), trained(4, form)
    assert one.keys() == four.keys()
    assert one["loss"][0] != pytest.approx(one["loss"][-1], rel=1e-3)  # something was learnt
    for name, values in one.items():
        np.testing.assert_allclose(four[name], values, rtol=2e-5, err_msg=name)
