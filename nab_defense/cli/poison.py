"""nab poison: write a poisoned copy of a data set as an image folder, and the truth about it beside the folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..bench.attacks import attacks, create
from ..bench.poison import MODES, check_parts, check_rate, poison_source, write_truth
from ..bench.trigger import prepared, save_trigger
from ..data.folder import timm_order
from ..data.sources import Source, open_source
from ..io import check_folder
from ..recipe import key_values, parse_recipe
from ..registry import nearest
from .common import Parser, check_apart, data_settings

__all__ = ["main"]

EXAMPLES = [
    "nab poison digits --attack badnets --rate 0.1 --target 0 --out poisoned/digits",
    "nab poison path/to/images --attack blend alpha=0.1 --rate 0.05 --target cat --out poisoned/images",
    "nab poison digits --attack several 'triggers=[badnets, {name: sig, target: 5}]' --rate 0.1 --target 0 --out poisoned/two",
    "nab poison torch/cifar10 data.options.root=data --attack badnets --rate 0.1 --target 0 --out poisoned/cifar10",
    "nab train recipes/imagefolder.yaml data.source=poisoned/images data.truth=poisoned/images.truth.csv",
]

FILE_TIME = 946684800  # 2000-01-01: one time for every file, so that none stands out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done.

    Raises:
        ValueError: The user's input is wrong; nothing was written.
    """
    arguments = _parser().parse_intermixed_args(argv)
    out: Path = arguments.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{arguments.out} exists and is not an empty folder; name another --out or remove it")
    truth_path, trigger_path = (out.with_name(out.name + ending) for ending in (".truth.csv", ".trigger.safetensors"))
    for path in (truth_path, trigger_path):
        if path.exists():
            raise ValueError(f"{path} is of another poisoned copy, and would be overwritten; name another --out or move it")
    check_apart(arguments.source, out)
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {arguments.limit}")
    check_folder(out)
    reading, settings = data_settings(arguments.settings, ("data.strict", "data.options"))
    attack = create(arguments.attack, **key_values(settings, example="alpha=0.1"))
    data = parse_recipe({"name": "poison", "data": {"source": arguments.source}}, reading, "poison settings").data
    opened = open_source(data.source, strict=data.strict, **data.options)
    source = _as_folder_order(opened).limited(arguments.limit, arguments.seed)
    target = None if arguments.target is None else _class_index(arguments.target, source)
    check_rate(arguments.rate)
    check_parts(attack, target=target, mode=arguments.mode, num_classes=len(source.classes))
    attack = prepared(attack, source, target=target, seed=arguments.seed)
    poisoned, truth = poison_source(source, attack, rate=arguments.rate, target=target, mode=arguments.mode, seed=arguments.seed)
    _check_classes(poisoned)
    written, order = _renamed(poisoned, arguments.seed)
    # The truth goes first: a folder that was cut short then lacks files that its truth names, and is refused.
    write_truth(truth_path, written, truth)
    learned = save_trigger(trigger_path, attack, target=target)
    try:
        _write_images(written, out, order)
    except BaseException:  # a trigger that does not fit on a later image, a full disk: the same command can be given again
        shutil.rmtree(out, ignore_errors=True)
        truth_path.unlink(missing_ok=True)
        trigger_path.unlink(missing_ok=True)
        raise
    goal = "several targets" if truth.target is None else f"target {source.classes[truth.target]}, number {truth.target}"
    goal = "all_to_all" if target is None else goal
    shown = out if arguments.out.name in ("", "..") else arguments.out
    print(
        f"{arguments.out}: {len(written)} images, {int(truth.poisoned.sum())} poisoned by {arguments.attack} ({goal}); "
        f"the truth is in {shown.with_name(truth_path.name)}"
        + f", what the attack learned in {shown.with_name(trigger_path.name)}"
        * learned
    )
    return 0


def _parser() -> Parser:
    what = (
        "Write a poisoned copy of a data set as an image folder DIR, and the truth about it to DIR.truth.csv. What an attack "
        "learned goes to DIR.trigger.safetensors; nab evaluate --trigger takes it."
    )
    parser = Parser("nab poison", what, EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="digits, a folder with one sub-folder a class, or a timm name")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings of attack and data, see the examples")
    parser.add_argument("--attack", required=True, metavar="NAME", help=attacks.listing())
    parser.add_argument("--rate", required=True, type=float, help="share of the whole set to poison, in (0, 1)")
    parser.add_argument("--target", help="class the trigger leads to, by name or index; none for all_to_all")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--mode", default=MODES[0], help=" or ".join(MODES))
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--limit", type=int, metavar="N", help="draw N of the images first")
    return parser


def _as_folder_order(source: Source) -> Source:
    """Number the classes as whoever opens the written folder will, so that all_to_all's y + 1 means the same there."""
    classes = tuple(timm_order(source.classes))
    if classes == source.classes:
        return source
    labels = np.array([classes.index(name) for name in source.classes])[source.labels]
    return replace(source.replaced(labels=labels, load=source.load, change="classes in order"), classes=classes)


def _class_index(text: str, source: Source) -> int:
    if text in source.classes:
        return source.classes.index(text)
    if text.isdecimal() and int(text) < len(source.classes):
        return int(text)
    known = f"{', '.join(source.classes[:20])} or 0..{len(source.classes) - 1}"
    raise ValueError(f"no class {text!r}; known: {known}{nearest(text, source.classes)}")


def _check_classes(source: Source) -> None:
    """Refuse classes that no folder could give back: odd names, or no images."""
    for name, count in zip(source.classes, np.bincount(source.labels, minlength=len(source.classes)), strict=True):
        if name.startswith(".") or "/" in name or not name:
            raise ValueError(f"class {name!r} cannot be the name of a folder")
        if count == 0:
            raise ValueError(f"class {name!r} would be left without images; raise --limit or lower --rate")


def _renamed(source: Source, seed: int) -> tuple[Source, np.ndarray]:
    """The source with file names for ids, and the order to write it in.

    Names are shuffled numbers. The old ones would betray the poison: images that change their class bring along the
    numbering or the naming of the class they come from.
    """
    order = np.random.default_rng([seed, len(source)]).permutation(len(source))
    number = np.argsort(order)
    digits = len(str(len(source) - 1))
    ids = tuple(f"{source.classes[y]}/{n:0{digits}d}.png" for y, n in zip(source.labels, number, strict=True))
    return source.replaced(labels=source.labels, load=source.load, change="renamed", ids=ids), order


def _write_images(source: Source, out: Path, order: np.ndarray) -> None:
    for name in source.classes:
        (out / name).mkdir(parents=True, exist_ok=True)
    for index in order:
        path = out / source.ids[index]
        pixels = source.pixels(int(index))
        # From the bare pixels: a clean image would carry over a color profile that a painted one has lost.
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)
        os.utime(path, (FILE_TIME, FILE_TIME))
