"""The version of the distribution, said in pyproject.toml alone."""

from importlib.metadata import version

__version__ = version("keras-mrl")
