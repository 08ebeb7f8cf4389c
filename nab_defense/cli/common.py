"""What every command shares: logging, one-line errors, exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from .. import io, ranks
from ..disk import DISK, disk_error
from ..registry import nearest
from ..runtime import keep_freed_memory
from .ranked import AGAIN, EXIT_LOST, LOST, one_voice, tell

__all__ = ["EXIT_FAULT", "EXIT_INPUT", "EXIT_UNPROTECTED", "Parser", "check_apart", "check_out", "data_settings", "guarded"]

EXIT_FAULT = 1
EXIT_INPUT = 2
EXIT_UNPROTECTED = 3


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake, and with examples.

    Args:
        prog, description: As in argparse.
        examples: Command lines to start from."""

    def __init__(self, prog: str, description: str, examples: list[str]) -> None:
        lines = "\n".join(f"  {line}" for line in examples)
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=f"examples:\n{lines}", formatter_class=shape)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"error: {message}; see {self.prog} --help\n" if ranks.speaks() else None)


def check_out(out: Path) -> None:
    """Refuse to write beside a trained model, whose own results would be lost, and to where nothing can be written.

    Raises:
        ValueError: Names the folder."""
    io.check_folder(out)
    if (out / "model.safetensors").exists():
        raise ValueError(f"{out} holds a trained model and its results, which would be overwritten; name another --out")


def check_apart(source: str, out: Path) -> None:
    """Refuse to write into a folder of images, where what is written would be read as one of its classes.

    Raises:
        ValueError: Names both."""
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out} lies in {source}, whose images are read; name an --out elsewhere")


def data_settings(items: list[str], takes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Part a command's key=value items into the settings of the data, which start with "data.", and the others.

    Args:
        items: As given.
        takes: The settings of the data that the command uses, "data.options" for all of its keys.

    Raises:
        ValueError: Another setting of the data, which the command would not use."""
    ours = [item for item in items if item.startswith("data.")]
    for item in ours:
        key = item.partition("=")[0]
        if ".".join(key.split(".")[:2]) not in takes:
            raise ValueError(f"{item!r} cannot be set here; known: {', '.join(takes)}{nearest(key, takes)}")
    return ours, [item for item in items if item not in ours]


def guarded(command: Callable[[list[str]], int], argv: list[str], *, apart: bool = False) -> int:
    """Run a command; the user's mistakes become one line and exit status 2.

    Args: apart: Processes that torchrun starts do not join each other."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no look at the network at run time
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    keep_freed_memory()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name that the terminal cannot show
    with nullcontext() if apart else ranks.joined():
        logging.basicConfig(level=_level(), format="%(message)s")
        return _attempt(command, argv)


def _level() -> int:
    if not ranks.leads():
        return logging.CRITICAL
    return logging.INFO if sys.stderr.isatty() else logging.WARNING


def _attempt(command: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        with one_voice():
            status = command(argv)
        ranks.wait()  # torchrun ends all ranks as soon as one has ended with another status than 0
        return status
    except KeyboardInterrupt:
        tell(f"stopped; {AGAIN}")
        return 130
    except Exception as error:
        found = _in_words(error)
        if found is not None:
            tell(f"error: {' '.join(found[0].split())}")
            return found[1]
        if ranks.speaks():
            raise
        return EXIT_LOST


def _in_words(error: Exception) -> tuple[str, int] | None:
    """What to tell the user, and the exit status; None for what is a fault of ours."""
    message = str(error)
    if isinstance(error, ValueError):
        if "Original Traceback" in message:  # from a loader's process, which sends its whole traceback
            message = message.strip().splitlines()[-1].removeprefix("ValueError: ")
        return message, EXIT_INPUT
    if ranks.lost(error):
        return LOST, EXIT_LOST
    cause = disk_error(error) if isinstance(error, OSError | RuntimeError) else None
    if cause is None:
        return None
    return f"{cause.filename or 'the output'}: {DISK[cause.errno or 0]}. Finished files are intact", EXIT_INPUT
