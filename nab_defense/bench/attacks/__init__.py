"""Backdoor attacks by name: `create("badnets", size=3)`."""

from . import badnets, blend, sig, wanet  # noqa: F401  (imported to register)
from .base import Attack, CoverAttack, attacks

__all__ = ["Attack", "CoverAttack", "attacks", "create"]

create = attacks.create
