"""Whether the methods that a recipe names exist, take the settings it gives them, and go together."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .bench.attacks import attacks
from .bench.poison import check_parts
from .detectors import detectors
from .purify import purifiers
from .relabel import relabelers
from .schema import Recipe
from .stamp import Stamp

__all__ = ["check_methods"]

# What the pipeline hands a relabeler; these stand for it where only the recipe's own settings are checked.
HANDED: dict[str, dict[str, Any]] = {
    "unlearned": {"model": None, "loaders": None, "runtime": None, "unseen": False},
    "trusted": {"features": np.zeros((1, 1), np.float32), "labels": np.zeros(1, np.int64)},
}


def check_methods(recipe: Recipe) -> None:
    """Refuse methods and settings of methods that do not exist or do not go together.

    Raises:
        ValueError: Names the setting, what is allowed, and the nearest right spelling."""
    stage, attack = recipe.relabel, recipe.attack
    Stamp(**recipe.stamp.model_dump())
    detectors.create(recipe.scan.detector, **recipe.scan.params)
    handed = HANDED.get(stage.name, {})
    own = [name for name in stage.params if name in handed]
    if own:
        raise ValueError(f"relabeler {stage.name!r} has no setting {own[0]!r}: the run provides it")
    relabelers.create(stage.name, **{**stage.params, **handed})
    if stage.name == "trusted" and stage.trusted is None:
        raise ValueError("relabel.name=trusted needs relabel.trusted: a folder of verified images with the same classes")
    if stage.name != "trusted" and stage.trusted is not None:
        raise ValueError(f"only relabel.name=trusted reads relabel.trusted, {stage.name!r} does not; drop one of the two")
    if stage.name == "unlearned" and stage.encoder is not None:
        raise ValueError("relabel.name=unlearned uses the scan's network; drop relabel.encoder, or name another relabeler")
    for key, further in (("scan.model", recipe.scan.model), ("relabel.encoder", stage.encoder)):
        if further is not None and further.in_chans != recipe.model.in_chans:
            raise ValueError(f"{key}.in_chans={further.in_chans} and model.in_chans={recipe.model.in_chans} must agree")
    if recipe.purify is not None:
        method = purifiers.create(recipe.purify.method, **recipe.purify.params)
        if method.labelled and not recipe.purify.labelled:
            raise ValueError(
                f"purify.method={recipe.purify.method} needs labels; drop purify.labelled=false, or name another method"
            )
    if attack is not None:
        # How many classes there are the data will tell; that this is one of them is asked then.
        target = attack.target if attack.mode == "all_to_one" else None
        check_parts(attacks.create(attack.name, **attack.params), target=target, mode=attack.mode, num_classes=sys.maxsize)
        if attack.poison and recipe.data.truth is not None:
            raise ValueError(
                "data.truth says what is poisoned already and attack would poison it again; drop one, or set "
                "attack.poison=false to use the attack for measuring only"
            )
    if (recipe.data.mean is None) != (recipe.data.std is None):
        raise ValueError("data.mean and data.std go together; set both or neither")
