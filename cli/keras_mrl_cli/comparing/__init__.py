"""What `keras-mrl compare` does: nets trained alike, and what their features are worth."""
