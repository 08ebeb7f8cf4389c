"""A method's candidates, with the perturbations that purify would hand it."""

from __future__ import annotations

import copy

from nab_defense.clean import CleanSet, Pixels
from nab_defense.kept import Kept
from nab_defense.purify.base import Candidates, Notes, Purifier, frozen
from nab_defense.purify.run import PATCH, RADIUS
from nab_defense.runtime import Runtime
from nab_defense.universal import pool_of

CPU = Runtime(device="cpu", precision="float32")


def offered(
    method: Purifier, network: Pixels, clean: CleanSet, *, radius: float = RADIUS, notes: Notes | None = None
) -> Candidates:
    """As purify asks for them; the network is changed in place."""
    pool = pool_of(frozen(copy.deepcopy(network)), clean, radius=radius, patch=PATCH, runtime=CPU)
    return method.candidates(network, clean, pool=pool, runtime=CPU, notes=notes or Notes(), kept=Kept())
