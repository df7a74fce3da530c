"""What every test of the project shares."""

import os
import signal

import hypothesis
import pytest

# TensorFlow's greetings drown what a failing test says, and one test reads its errors. TensorFlow
# looks at this when it is imported.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

# What the tests compile runs once or twice, and to optimise it takes longer than to run it. JAX
# looks at this when it is imported. `make soak` compiles as users do.
if not os.environ.get("KERAS_MRL_SOAK"):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# A shell without job control has its background jobs ignore interrupts, and they their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `make soak` runs the property tests alone, with many more examples.
hypothesis.settings.register_profile("test", deadline=None)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("soak" if os.environ.get("KERAS_MRL_SOAK") else "test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.soak)
