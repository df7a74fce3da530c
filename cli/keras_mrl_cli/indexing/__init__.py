"""The work of `index` and `search`."""
