"""The work of `export`."""
