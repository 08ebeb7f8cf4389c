"""The commands; argparse lives only here."""

from __future__ import annotations

import sys
from importlib import import_module

from .common import guarded

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train on images that may be poisoned",
    "scan": "rank the images of a data set by suspicion",
    "evaluate": "measure a saved model",
    "poison": "write a poisoned image folder, to try a defense blind",
}


def main(argv: list[str] | None = None) -> int:
    """`nab COMMAND ...`. Returns the exit status: 0 done, 2 wrong input, 3 finished but not protected."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: nab COMMAND ...\n\n" + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        print("\nnab COMMAND --help tells more")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: no command {argv[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return guarded(import_module(f".{argv[0]}", __name__).main, argv[1:])
