"""The development server: SavedModels served as TensorFlow Serving does, for work and tests."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .server import DevServer as DevServer

__all__ = ["DevServer"]


def __getattr__(name: str) -> Any:
    """Import the server, and so TensorFlow, where it is first needed."""
    if name != "DevServer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .server import DevServer

    return DevServer
