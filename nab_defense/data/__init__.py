"""Sources, transforms and loaders."""

from .loader import build_loader
from .sources import Source, View, open_source
from .transforms import build_transform

__all__ = ["Source", "View", "build_loader", "build_transform", "open_source"]
