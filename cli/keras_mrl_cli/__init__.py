"""The front door: one module per command, no room imported before its command runs."""
