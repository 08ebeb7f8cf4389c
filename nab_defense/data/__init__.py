"""Sources, transforms and loaders."""

from .distort import Distortion
from .loader import build_loader
from .resident import ResidentLoader
from .sources import Source, View, open_source
from .store import Held, Store
from .transforms import build_transform

__all__ = ["Distortion", "Held", "ResidentLoader", "Source", "Store", "View", "build_loader", "build_transform", "open_source"]
