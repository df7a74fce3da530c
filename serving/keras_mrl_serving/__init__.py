"""SERVE: what an application that asks a Matryoshka model needs, without TensorFlow and without Keras."""
