"""How far a SavedModel may be from the Keras model and still count as equal."""

TOLERANCE = 1e-5  # of a row's largest magnitude
