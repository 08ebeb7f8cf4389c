"""The commands; argparse lives only here."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from .. import ranks
from ..registry import nearest
from .common import guarded

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train on images that may be poisoned",
    "scan": "rank the images of a data set by suspicion",
    "purify": "repair a model after training, with a few clean images",
    "evaluate": "measure a saved model",
    "bench": "compare defences on many attacks",
    "poison": "write a poisoned image folder, to try a defense blind",
}
FIRST_ALONE = {"purify", "poison"}  # what a single rank does while others wait
EXIT_UNREAD = 141  # as a shell says of what a closed pipe ended
APART = {"bench"}  # where every rank has cells of its own, and none waits for another
USAGE = """usage: nab COMMAND ...

{commands}

examples:
  nab train recipes/quickstart_digits.yaml
  nab scan path/to/images
  nab purify --model resnet18 --checkpoint bad.pth --clean path/to/clean --method ibau
  nab evaluate runs/quickstart_digits --data digits --attack blend alpha=0.3
  nab bench recipes/bench/digits.yaml
  nab poison digits --attack badnets --rate 0.1 --target 0 --out poisoned/digits
  nab bench --speed kmeans knn

nab COMMAND --help tells more. Exit status: 0 done, 1 a fault of this program, 2 wrong input (one line says what), 3 finished but
not protected."""


def main(argv: list[str] | None = None) -> int:
    """`nab COMMAND ...`. Returns the exit status: 0 done, 1 a fault of ours, 2 wrong input, 3 finished but not protected."""
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read has gone, as `head` does; files are written before anything is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter still flushes
        return EXIT_UNREAD


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: no command {argv[0]!r}; known: {known}{nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2

    def command(arguments: list[str]) -> int:
        work = import_module(f".{argv[0]}", __name__).main
        return int(ranks.on_first(lambda: work(arguments)) if argv[0] in FIRST_ALONE else work(arguments))

    return guarded(command, argv[1:], apart=argv[0] in APART)
