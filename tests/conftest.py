"""What every test of the project shares."""

import os

# TensorFlow's greetings drown what a failing test says; read by TensorFlow when it is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
