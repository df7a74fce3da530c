"""The development server: SavedModels served as TensorFlow Serving does, for work and tests."""

from .dev_server import DevServer as DevServer
