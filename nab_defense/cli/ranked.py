"""Commands that torchrun starts several times: one voice for all ranks, also when torchrun ends them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from .. import ranks

__all__ = ["AGAIN", "EXIT_LOST", "LOST", "one_voice", "tell"]

EXIT_LOST = 1
AGAIN = "the same command goes on with --resume, where it has that option"
LOST = f"another rank of this run died; {AGAIN}"
ENDED = f"torchrun ended this run, as it does when another rank died; {AGAIN}"
_telling = threading.Lock()


def tell(message: str) -> None:
    """Say in one line on the error stream what ends the command, unless another rank, or this one, has said what does."""
    with _telling:
        if ranks.speaks():
            print(message, file=sys.stderr, flush=True)


@contextmanager
def one_voice() -> Iterator[None]:
    """Where there are several ranks, have only the first print, and a rank that torchrun ends say why."""
    if ranks.count() == 1:
        yield
        return
    if not ranks.leads():
        warnings.simplefilter("ignore")
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    # The main thread may be waiting for a rank that died, outside Python, where no handler of Python runs; so a thread listens.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(mouth)
    os.register_at_fork(after_in_child=_deaf)
    threading.Thread(target=_listen, args=(ear,), daemon=True).start()
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if ranks.leads() else nowhere):
        yield
    _deaf()  # not where the command failed: there is something to tell still


def _deaf() -> None:
    """Have SIGTERM end the process at once: a loader's, or one that is done."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _listen(ear: int) -> None:
    while signal.SIGTERM not in os.read(ear, 1):
        pass
    tell(f"error: {ENDED}")
    os._exit(EXIT_LOST)
