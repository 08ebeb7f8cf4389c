"""Backdoor attacks by name: `create("badnets", size=3)`."""

from . import (  # noqa: F401  (imported to register)
    adap_blend,
    adap_patch,
    badnets,
    blend,
    bpp,
    filter,
    input_aware,
    label_consistent,
    lf,
    narcissus,
    several,
    sig,
    ssba,
    stamp_aware,
    tact,
    wanet,
)  # fmt: skip
from .base import AsymmetricAttack, Attack, CoverAttack, JointAttack, LearnedAttack, SourceAttack, attacks

__all__ = ["AsymmetricAttack", "Attack", "CoverAttack", "JointAttack", "LearnedAttack", "SourceAttack", "attacks", "create"]

create = attacks.create
