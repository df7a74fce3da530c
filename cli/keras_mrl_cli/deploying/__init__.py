"""The work of `deploy`."""
