"""The work of `inspect`."""
