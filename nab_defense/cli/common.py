"""What every command shares: logging, one-line errors, exit status."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import yaml

__all__ = ["EXIT_INPUT", "EXIT_UNPROTECTED", "Parser", "guarded", "key_values"]

EXIT_INPUT = 2
EXIT_UNPROTECTED = 3


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def key_values(items: list[str]) -> dict[str, Any]:
    """["size=3", "pattern=white"] -> {"size": 3, "pattern": "white"}; values in YAML."""
    values = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ValueError(f"{item!r} is not a setting; write key=value")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{item!r}: the value is not valid YAML; quote it") from None
    return values


def guarded(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run a command; the user's mistakes become one line and exit status 2."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no look at the network at run time
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.basicConfig(level=logging.INFO if sys.stderr.isatty() else logging.WARNING, format="%(message)s")
    try:
        return command(argv)
    except ValueError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST):
            raise
        message = (
            f"cannot write {error.filename or 'the output'}: {error.strerror}; what was there is intact, make room, use --resume"
        )
    except KeyboardInterrupt:
        print("stopped; go on with --resume", file=sys.stderr)
        return 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_INPUT
