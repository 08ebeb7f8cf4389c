"""Test images for a saved model, plain and with an attack's trigger; shared by the commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bench.attacks import attacks
from ..bench.evaluate import Cases
from ..recipe import parse_recipe
from ..registry import difference
from ..session import Session

__all__ = ["READING", "TRIGGER", "attack_section", "check_classes", "open_tests"]

TRIGGER = "what the attack learned, where it learns: a run's trigger.safetensors, or DIR.trigger.safetensors of nab poison"
READING = ("data.strict", "data.test_split", "data.options")  # how test images are read; see common.data_settings


def attack_section(name: str, *, target: int, mode: str, params: dict[str, Any], trigger: Path | None) -> dict[str, Any]:
    """A recipe's attack, for measuring only; `trigger` is the file of one that was learned.

    Raises:
        ValueError: No such attack, or it does not take these settings."""
    attacks.create(name, **params)
    file = None if trigger is None else str(trigger)
    return {"name": name, "target": target, "mode": mode, "poison": False, "trigger": file, "params": params}


def open_tests(source: str, header: dict[str, Any], out: Path, reading: list[str], **sections: Any) -> tuple[Session, Cases]:
    """The session of a measurement, and its images.

    Args:
        source: Test images.
        header: Of the model to measure, see checkpoint.save.
        out: Where results will go.
        reading: Settings key=value of the data, see READING.
        sections: More of the recipe: attack, seed, runtime; and test_limit.

    Raises:
        ValueError: Images that cannot be read or used, or other classes than the model's."""
    missing = [fact for fact in ("classes", "input_size") if fact not in header]
    if missing:
        raise ValueError(f"the file does not tell the model's {' and '.join(missing)}; give them to checkpoint.save")
    data = {"source": source, "test": source, "test_limit": sections.pop("test_limit", None), "size": header["input_size"]}
    network = header["network"]
    tree = {
        "name": "measure",
        "data": {**data, "mean": header["mean"], "std": header["std"]},
        "model": {"name": network["model"], "in_chans": network["in_chans"]},
        **sections,
    }
    session = Session(parse_recipe(tree, reading, "evaluation settings"), out, resume=False)
    session.whole_source = session.test_source  # there is no training data here, and nothing is read twice
    check_classes(source, session.test_source.classes, header)
    cases = session.cases()
    assert cases is not None  # data.test is set above
    return session, cases


def check_classes(source: str, ours: tuple[str, ...], header: dict[str, Any], *, instead: str = "") -> None:
    """Refuse images of other classes than the model's; of another number, where their names are not known.

    Args: instead: What else would do where classes are missing."""
    theirs, count = header["classes"], header["network"]["num_classes"]
    mend = f"; add the {count - len(ours)} missing, each with images in a folder of its own{instead}" * (len(ours) < count)
    if theirs is not None and tuple(theirs) != ours:
        told = difference(ours, tuple(theirs))
        raise ValueError(f"{source} has other classes than those the model was trained on: {told}{mend}")
    if len(ours) != count:
        raise ValueError(f"{source} has {len(ours)} classes, {ours[0]!r} to {ours[-1]!r}; the model tells {count} apart{mend}")
