"""The truth about a poisoned training set, in memory and as truth.csv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.sources import Source
from ..io import load_csv, save_csv
from ..registry import nearest

__all__ = ["Truth", "read_truth", "write_truth"]

COLUMNS = ("id", "poisoned", "true_label", "label")
FLAGS = {"0": False, "1": True, "false": False, "true": True}


@dataclass(frozen=True, eq=False)
class Truth:
    """What the attacker knows about a training set.

    Args:
        poisoned: (N,) bool, the sample carries the trigger.
        true_labels: (N,) int64, the labels before the attack.
        target: The class the trigger leads to; None for all_to_all, and where several attacks have several targets.
        mode: "all_to_one", or "all_to_all" (every class y leads to (y + 1) % K).
        cover: (N,) bool, the sample carries a trigger that must not work, with its own label.
    """

    poisoned: NDArray[np.bool_]
    true_labels: NDArray[np.int64]
    target: int | None
    mode: str
    cover: NDArray[np.bool_]

    def __post_init__(self) -> None:
        for name, dtype in (("poisoned", np.bool_), ("true_labels", np.int64), ("cover", np.bool_)):
            array = np.array(getattr(self, name), dtype=dtype)
            if array.shape != (len(self.poisoned),):
                raise ValueError(f"{name} must have shape ({len(self.poisoned)},), got {array.shape}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def subset(self, indices: Sequence[int]) -> Truth:
        """The truth about these samples, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Truth(self.poisoned[chosen], self.true_labels[chosen], self.target, self.mode, self.cover[chosen])


def write_truth(path: Path, source: Source, truth: Truth) -> None:
    """Write truth.csv: id, poisoned (0 or 1), true_label and label by class name; and `cover` where there are covers.

    Names and not numbers, since the same data read back as a folder may number its classes otherwise.
    """
    names = source.classes
    columns = [source.ids, truth.poisoned.astype(int), [names[y] for y in truth.true_labels], [names[y] for y in source.labels]]
    has_cover = bool(truth.cover.any())
    if has_cover:
        columns.append(truth.cover.astype(int))
    save_csv(path, COLUMNS + ("cover",) * has_cover, zip(*columns, strict=True))


def read_truth(path: Path, source: Source) -> Truth:
    """Read truth.csv for a source, in the source's order.

    `target` is the one label that all poisoned samples share; where they do not share one and each label y became y + 1, the
    mode is all_to_all.

    Raises:
        ValueError: A column, an id or a class is missing, unknown or there twice, or a label differs from the source's.
    """
    rows: dict[str, dict[str, str]] = {}
    for row in load_csv(path, COLUMNS):
        if row["id"] in rows:
            raise ValueError(f"{path} has two rows for {row['id']!r}")
        rows[row["id"]] = row
    missing, unknown = set(source.ids) - set(rows), set(rows) - set(source.ids)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the {len(source)} ids of {source.name}, first {min(missing)!r}")
    if unknown:
        raise ValueError(f"{path} has {len(unknown)} ids that {source.name} lacks, first {min(unknown)!r}")
    ordered = [rows[name] for name in source.ids]
    labels = _classes(path, ordered, "label", source)
    true_labels = _classes(path, ordered, "true_label", source)
    wrong = np.flatnonzero(labels != source.labels)
    if len(wrong):
        name, theirs, ours = source.ids[wrong[0]], source.classes[labels[wrong[0]]], source.classes[source.labels[wrong[0]]]
        raise ValueError(f"{path} gives {name!r} the label {theirs!r}, {source.name} has {ours!r}: it is for other data")
    poisoned = _flags(path, ordered, "poisoned")
    cover = _flags(path, ordered, "cover") if ordered and "cover" in ordered[0] else np.zeros(len(ordered), dtype=bool)
    goals = np.unique(labels[poisoned])
    target = int(goals[0]) if len(goals) == 1 else None
    turned = len(goals) > 1 and np.array_equal(labels[poisoned], (true_labels[poisoned] + 1) % len(source.classes))
    return Truth(poisoned, true_labels, target, "all_to_all" if turned else "all_to_one", cover)


def _classes(path: Path, rows: list[dict[str, str]], column: str, source: Source) -> NDArray[np.int64]:
    number = {name: index for index, name in enumerate(source.classes)}
    for row in rows:
        if row[column] not in number:
            hint = nearest(str(row[column]), number)
            raise ValueError(f"{path}: {column} {row[column]!r} of {row['id']!r} is not a class of {source.name}{hint}")
    return np.array([number[row[column]] for row in rows], dtype=np.int64)


def _flags(path: Path, rows: list[dict[str, str]], column: str) -> NDArray[np.bool_]:
    for row in rows:
        if str(row[column]).lower() not in FLAGS:
            raise ValueError(f"{path}: {column} of {row['id']!r} must be 0 or 1, got {row[column]!r}")
    return np.array([FLAGS[row[column].lower()] for row in rows], dtype=bool)
