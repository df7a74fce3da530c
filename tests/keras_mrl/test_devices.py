"""Two devices train as one does: simulated, in a process of their own."""

import json

import keras
import numpy as np
import pytest

from tests.helpers.small_models import run_fresh

pytestmark = pytest.mark.backend

SCRIPT = """
import contextlib, json, os
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"
import keras, numpy as np
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, MatryoshkaMetric
from keras_mrl.losses import crossentropy

crossentropy.CHUNK_LOGITS = 500  # several chunks in every step
if keras.backend.backend() == "jax":
    import jax
    assert len(jax.devices()) == 2

    @contextlib.contextmanager
    def scope():
        yield keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
else:
    import tensorflow as tf
    (cpu,) = tf.config.list_physical_devices("CPU")
    logical = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, logical)
    names = [device.name for device in tf.config.list_logical_devices("CPU")]
    reduce = tf.distribute.ReductionToOneDevice()
    scope = tf.distribute.MirroredStrategy(names, cross_device_ops=reduce).scope

random = np.random.default_rng(0)
x = random.normal(size=(64, 6)).astype("float32")
y, weights = random.integers(0, 50, 64), random.random(64)
dims = (2, 4, 8)

def trained(scope, tied, dims_per_step):
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

print(json.dumps([
    {"tied": trained(devices, True, None), "drawn": trained(devices, False, 2)}
    for devices in (contextlib.nullcontext, scope)
]))
"""


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras distributes over JAX and TensorFlow alone"
)
def test_the_losses_of_two_devices_are_those_of_one() -> None:
    one, two = json.loads(run_fresh(SCRIPT).splitlines()[-1])
    for form, log in one.items():
        assert log.keys() == two[form].keys()
        assert log["loss"][0] != pytest.approx(log["loss"][-1], rel=1e-3)  # something was learnt
        for name, values in log.items():
            np.testing.assert_allclose(two[form][name], values, rtol=2e-5, err_msg=name)
