"""Output that nobody reads to its end, as with `nab --help | head -3`."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_closed_pipe_is_no_fault_of_ours() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "from nab_defense.cli import main; raise SystemExit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
