"""The development server: SavedModels served as TensorFlow Serving does, for work and tests."""

from .server import DevServer as DevServer
