"""The version of the distribution, as pyproject.toml has it."""

from importlib.metadata import version

__version__ = version("keras-mrl")
