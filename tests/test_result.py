"""Which commit a result names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nab_defense import result


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_is_named_where_it_holds_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "venv" / "nab_defense"
    package.mkdir(parents=True)
    file = package / "result.py"
    file.write_text("first")
    monkeypatch.setattr(result, "__file__", str(file))
    assert result.commit() == ""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "other.txt").write_text("a project of somebody's")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "--quiet", "-m", "theirs")
    assert result.commit() == ""  # installed inside another repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "ours")
    assert result.commit() == git(tmp_path, "rev-parse", "HEAD")
    file.write_text("second")
    assert result.commit() == git(tmp_path, "rev-parse", "HEAD") + "+"
