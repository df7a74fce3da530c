"""BRIDGE: a model trained on any backend becomes a TensorFlow Serving SavedModel with a signature per dim."""
