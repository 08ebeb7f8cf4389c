"""Defences by name, all called alike, for comparing them: `defences.create("nab_paper", detector="lga")`."""

from . import abl, dbr, drop, nab, pdb, plain, repaired  # noqa: F401  (imported to register)
from .base import Defence, Outcome, Task, defences

__all__ = ["Defence", "Outcome", "Task", "defences"]
