"""The frame around the package: its metadata, pins, entry points and licence agree with each other."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
DIRECT = [
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *(d for deps in EXTRAS.values() for d in deps),
]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pairs), "constraints.txt holds something else than name==version"
    return {str(canonicalize_name(pair[1])): pair[2] for pair in pairs if pair}


@pytest.mark.parametrize("dependency", DIRECT)
def test_direct_dependency_is_pinned_within_its_bounds(dependency: str) -> None:
    wanted = Requirement(dependency)
    pinned = pins()
    name = str(canonicalize_name(wanted.name))
    assert name in pinned, f"{wanted.name} has no line in constraints.txt"
    assert pinned[name] in wanted.specifier
    assert ">=" in str(wanted.specifier), f"{wanted.name} has no lower bound"


def test_constraints_fit_any_platform() -> None:
    assert not [name for name in pins() if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_dev_extra_holds_what_the_other_extras_hold() -> None:
    assert all(set(deps) <= set(EXTRAS["dev"]) for deps in EXTRAS.values())


def test_licence_is_the_unmodified_apache_text() -> None:
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # of apache.org/licenses/LICENSE-2.0.txt
    assert PROJECT["project"]["license"] == "Apache-2.0"


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_tool_only_calls_its_command(tool: Path) -> None:
    lines = [line for line in tool.read_text(encoding="utf-8").splitlines() if line and not line.startswith("import ")]
    assert len(lines) == 3 and lines[0] == "from nab_defense.cli import main"
    assert f'main(["{tool.stem}", *sys.argv[1:]])' in lines[-1]


def test_types_are_shipped() -> None:
    assert (ROOT / "nab_defense" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"


def test_no_source_file_is_ignored_by_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = [file for folder in ("nab_defense", "tools", "tests", "recipes") for file in (ROOT / folder).rglob("*")]
    names = [f.relative_to(ROOT).as_posix() for f in files if f.suffix in {".py", ".yaml", ".html", ".css", ".typed"}]
    ignored = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True).stdout
    assert not ignored, f".gitignore hides source files:\n{ignored}"
