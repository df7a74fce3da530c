"""Two devices train as one does: simulated, in processes of their own."""

import json
from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers.small_models import run_fresh

pytestmark = pytest.mark.backend

# The argument is the number of devices.
SCRIPT = """
import contextlib, json, os, sys
devices = int(sys.argv[1])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
import keras, numpy as np
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, MatryoshkaMetric
from keras_mrl.losses import crossentropy

crossentropy.CHUNK_LOGITS = 500  # several chunks in every step
scope = contextlib.nullcontext
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
        scope = tf.distribute.MirroredStrategy(names, cross_device_ops=reduce).scope

random = np.random.default_rng(0)
x = random.normal(size=(64, 6)).astype("float32")
y, weights = random.integers(0, 50, 64), random.random(64)
dims = (2, 4, 8)

def trained(tied, dims_per_step):
    keras.utils.set_random_seed(0)
    with scope():
        backbone = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8)])
        head = MatryoshkaHead(50, dims, tied=tied, kernel_regularizer="l2")
        model = MatryoshkaClassifier(backbone, head)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        model.compile(
            keras.optimizers.SGD(0.5),
            MatryoshkaLoss(loss, dims_per_step=dims_per_step),
            metrics=[MatryoshkaMetric(accuracy, dims)],
            jit_compile=keras.backend.backend() == "jax",
        )
    return model.fit(
        x, y, batch_size=32, epochs=2, verbose=0, shuffle=False, sample_weight=weights,
        validation_data=(x, y) if tied else None,
    ).history

print(json.dumps({"tied": trained(True, None), "drawn": trained(False, 2)}))
"""


def trained(devices: int) -> dict[str, dict[str, Any]]:
    """The logs of both forms."""
    logs: dict[str, dict[str, Any]] = json.loads(run_fresh(SCRIPT, devices).splitlines()[-1])
    return logs


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras distributes over JAX and TensorFlow alone"
)
def test_the_losses_of_two_devices_are_those_of_one() -> None:
    one, two = trained(1), trained(2)
    for form, log in one.items():
        assert log.keys() == two[form].keys()
        assert log["loss"][0] != pytest.approx(log["loss"][-1], rel=1e-3)  # something was learnt
        for name, values in log.items():
            np.testing.assert_allclose(two[form][name], values, rtol=2e-5, err_msg=name)
