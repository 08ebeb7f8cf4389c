"""The house rules, held from the source: who imports whom, what may be read, how long a file gets."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "nab_defense"
LAYERS: list[Collection[str]] = [
    "types registry stamp io disk runtime clean changes waves channels kept neighbors mixture principal ranks parallel".split(),  # noqa: SIM905
    {"data", "scan", "content", "variation", "dataset", "defended", "train", "sites", "universal"},
    {"detectors", "relabel", "purify", "select", "parts", "passes", "naming", "imprint", "plan", "replay"},
    {"checkpoint", "check", "bench", "report"},
    "schema recipe methods loaders session look examine outside showing hidden candidates again repair result pipeline defences".split(),  # noqa: E501, SIM905
    ["speed", "grid", "cli"],
]
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
METHODS = {"detectors", "relabel", "purify", "bench.attacks", "defences"}  # one method a file: siblings share base.py alone
ORDERED = [*LAYERS[4], *LAYERS[5]]  # within these layers, too, only what comes before may be imported
BELOW = {own: {room for room in LAYER if LAYER[room] == 0 or LAYER[room] < LAYER[own]} for own in LAYER}
BELOW |= {own: BELOW[own] | set(ORDERED[:place]) for place, own in enumerate(ORDERED)}
BELOW |= {own: BELOW[own] | {"select"} for own in ("naming", "parts", "passes", "plan")}  # which are made of selections
TIMM_ROOMS = {"data", "train", "parallel", "checkpoint", "pipeline", "speed"}
MAX_LINES = 300
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
SAFE_YAML = {"safe_load", "safe_load_all", "safe_dump", "safe_dump_all", "YAMLError", "compose"}  # compose makes no objects
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
MACHINE_PATH = re.compile(r"(?<![\w.~})\]-])/(work|root|home|Users)/")


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the repository root, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> list[str]:
        """["nab_defense", "data", "folder"]; of an __init__ the package alone."""
        parts = list(PurePosixPath(self.path).with_suffix("").parts)
        return parts[:-1] if self.is_init else parts

    @property
    def is_init(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def room(self) -> str:
        """The part below the package that DESIGN.md gives a layer; "" outside the package and for its face."""
        return self.module[1] if self.module[0] == PACKAGE and len(self.module) > 1 else ""

    @property
    def folder(self) -> str:
        """ "bench.attacks" for nab_defense/bench/attacks/badnets.py, "" for a file right below the package."""
        return ".".join((self.module if self.is_init else self.module[:-1])[1:])

    @cached_property
    def imports(self) -> list[tuple[int, str, str]]:
        """(line, absolute dotted name, name it has in this file), relative imports resolved."""
        found = []
        package = self.module if self.is_init else self.module[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*base, *([node.module] if node.module else [])])
                found += [(node.lineno, f"{start}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        return found

    @property
    def inner_imports(self) -> list[tuple[int, list[str]]]:
        """(line, parts below the package) of what is imported from the package itself."""
        return [(line, name.split(".")[1:]) for line, name, _ in self.imports if name.split(".")[0] == PACKAGE]

    @cached_property
    def calls(self) -> list[tuple[ast.Call, str]]:
        """Calls with the absolute name of what is called: `np.load(...)` is "numpy.load"."""
        names = {local: local if local == name.split(".")[0] else name for _, name, local in self.imports}
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                head, *rest = ast.unparse(node.func).split(".")
                found.append((node, ".".join([names.get(head, head), *rest])))
        return found

    def at(self, line: int, problem: str) -> str:
        return f"{self.path}:{line}: {problem}"


Rule = Callable[[list[Source]], Iterator[str]]


def lower_layers_only(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.room and source.room not in LAYER:
            yield source.at(1, f"{source.room!r} has no layer; give it one in DESIGN.md and in LAYERS")
        elif source.room:
            for line, target in source.inner_imports:
                yield from _wrong_layer(source, line, target)


def _wrong_layer(source: Source, line: int, target: list[str]) -> Iterator[str]:
    own, room = source.room, target[0] if target else ""
    if room not in LAYER:
        what = "its own public face; import from the file that has it" if len(target) < 2 else f"{room}, which has no layer"
        yield source.at(line, f"imports {what}")
    elif room != own and room not in BELOW[own]:
        yield source.at(line, f"{own} (L{LAYER[own]}) imports {room} (L{LAYER[room]}); a layer imports only lower ones")


def siblings_share_base_alone(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.folder in METHODS and source.room and not source.is_init:
            depth = source.folder.count(".") + 1
            for line, target in source.inner_imports:
                if ".".join(target[:depth]) == source.folder and target[depth : depth + 1] != ["base"]:
                    yield source.at(line, f"imports its sibling {target[-1]}; files of {source.folder}/ import base.py alone")


def truth_stays_in_bench(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.room == "defences" or (source.room != "bench" and LAYER.get(source.room, 9) < 4):
            for line, target in source.inner_imports:
                if target[:1] == ["bench"]:
                    yield source.at(line, "imports bench, which knows the truth; only L4 but defences, L5 and tests may")


def timm_in_its_rooms(sources: list[Source]) -> Iterator[str]:
    yield from _library_outside("timm", TIMM_ROOMS, sources)


def argparse_in_cli(sources: list[Source]) -> Iterator[str]:
    yield from _library_outside("argparse", {"cli"}, sources)


def _library_outside(library: str, rooms: set[str], sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for line, name, _ in source.imports:
            if name.split(".")[0] == library and source.room not in rooms:
                yield source.at(line, f"imports {library}, which belongs in {', '.join(sorted(rooms))}")


def nothing_is_unpickled(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for line, name, _ in source.imports:
            if name.split(".")[0] in UNPICKLERS:
                yield source.at(line, f"imports {name}; save tensors as safetensors, arrays as npz, values as JSON")
        for call, name in source.calls:
            keyword, value = SAFE_ONLY_WITH.get(name, ("", None))
            given = [k.value.value for k in call.keywords if k.arg == keyword and isinstance(k.value, ast.Constant)]
            if keyword and given != [value]:
                yield source.at(call.lineno, f"{name} without {keyword}={value}")
            if name.startswith("yaml.") and name.split(".")[1] not in SAFE_YAML:
                yield source.at(call.lineno, f"{name}; use yaml.safe_load or yaml.safe_dump")


def print_in_cli(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for call, name in source.calls:
            if name == "print" and source.room != "cli":
                yield source.at(call.lineno, "prints; use logging.getLogger(__name__), or return the text to cli/")


def files_stay_short(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if (count := len(source.text.splitlines())) > MAX_LINES:
            yield source.at(count, f"{count} lines; split it where it holds two things, {MAX_LINES} are the limit")


def every_test_file_asserts(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if PurePosixPath(source.path).name.startswith("test_"):
            names = [name.rsplit(".")[-1] for _, name in source.calls]
            checks = any(name == "raises" or name.startswith("assert") for name in names)
            if not checks and not any(isinstance(node, ast.Assert) for node in ast.walk(source.tree)):
                yield source.at(1, "asserts nothing; a test that only runs code passes when the code is wrong")


def registered_names_are_unique(sources: list[Source]) -> Iterator[str]:
    seen: dict[tuple[str, str], str] = {}
    for source in sources:
        for call, name in source.calls:
            registry, _, method = name.rpartition(".")
            if source.room and method == "register" and call.args and isinstance(call.args[0], ast.Constant):
                key = (registry, str(call.args[0].value))
                if key in seen:
                    yield source.at(call.lineno, f"{key[1]!r} is in {registry} already, from {seen[key]}")
                seen[key] = source.at(call.lineno, "").rstrip(": ")


PACKAGE_RULES: list[Rule] = [
    lower_layers_only, siblings_share_base_alone, truth_stays_in_bench, timm_in_its_rooms, argparse_in_cli,
    nothing_is_unpickled, print_in_cli, registered_names_are_unique,
]  # fmt: skip
FOLDERS: dict[Rule, tuple[str, ...]] = {rule: (PACKAGE, "tools") for rule in PACKAGE_RULES}
FOLDERS |= {files_stay_short: (PACKAGE, "tools", "tests"), every_test_file_asserts: ("tests",)}


def sources_below(*folders: str) -> list[Source]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [Source(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize("rule", FOLDERS, ids=lambda rule: rule.__name__)
def test_source_keeps(rule: Rule) -> None:
    sources = sources_below(*FOLDERS[rule])
    assert sources, f"no Python file below {FOLDERS[rule]}"
    problems = list(rule(sources))
    assert not problems, "\n" + "\n".join(problems)


def test_no_path_of_one_machine_is_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8", errors="ignore") for file in files}
    problems = [f"{name}: {hit[0]}" for name, text in texts.items() for hit in MACHINE_PATH.finditer(text)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "found"),
    [("open('/" + "root/x')", True), ("see https://example.org/home/x", False), ("$HOME/work/x, ./home/x", False)],
)
def test_machine_path(text: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is found


BROKEN = [
    (lower_layers_only, "nab_defense/scan.py", "from .checkpoint import load"),
    (lower_layers_only, "nab_defense/train.py", "def f():\n    from . import scan"),
    (lower_layers_only, "nab_defense/detectors/__init__.py", "from ..relabel.knn import Knn"),
    (lower_layers_only, "nab_defense/recipe.py", "from .pipeline import run"),
    (lower_layers_only, "nab_defense/scan.py", "from nab_defense import NABPlan"),
    (lower_layers_only, "nab_defense/misc.py", ""),
    (siblings_share_base_alone, "nab_defense/detectors/lga.py", "from .spectral import spectral_scores"),
    (siblings_share_base_alone, "nab_defense/bench/attacks/wanet.py", "from . import blend"),
    (truth_stays_in_bench, "nab_defense/check.py", "from .bench.metrics import auroc"),
    (truth_stays_in_bench, "nab_defense/defences/abl.py", "import nab_defense.bench"),
    (timm_in_its_rooms, "nab_defense/scan.py", "import timm"),
    (timm_in_its_rooms, "nab_defense/cli/export.py", "from timm.models import create_model"),
    (argparse_in_cli, "nab_defense/recipe.py", "import argparse"),
    (argparse_in_cli, "tools/train.py", "from argparse import ArgumentParser"),
    (nothing_is_unpickled, "nab_defense/io.py", "from pickle import loads"),
    (nothing_is_unpickled, "nab_defense/io.py", "import torch\ntorch.load(path)"),
    (nothing_is_unpickled, "nab_defense/io.py", "from torch import load as read\nread(path, weights_only=False)"),
    (nothing_is_unpickled, "nab_defense/io.py", "import numpy as np\nnp.load(path)"),
    (nothing_is_unpickled, "nab_defense/io.py", "import yaml\nyaml.load(text, yaml.Loader)"),
    (nothing_is_unpickled, "nab_defense/io.py", "import torch.nn\nimport torch\ntorch.load(path)"),
    (print_in_cli, "nab_defense/train.py", "print(loss)"),
    (files_stay_short, "nab_defense/train.py", "x = 1\n" * (MAX_LINES + 1)),
    (every_test_file_asserts, "tests/test_train.py", "def test_it_runs():\n    train()"),
    (registered_names_are_unique, "nab_defense/detectors/lga.py", '@d.register("a")\nclass A: ...\n' * 2),
]
KEPT = [
    (lower_layers_only, "nab_defense/stamp.py", "from .types import NABPlan"),
    (lower_layers_only, "nab_defense/data/sources.py", "from ..registry import nearest\nfrom .folder import read_folder"),
    (lower_layers_only, "nab_defense/pipeline.py", "import torch\nfrom .recipe import Recipe\nfrom .bench import metrics"),
    (siblings_share_base_alone, "nab_defense/detectors/lga.py", "from ..scan import Scan\nfrom .base import detectors"),
    (siblings_share_base_alone, "nab_defense/detectors/__init__.py", "from . import lga"),
    (truth_stays_in_bench, "nab_defense/bench/evaluate.py", "from .attacks.base import attacks"),
    (timm_in_its_rooms, "nab_defense/data/sources.py", "from timm.data import create_dataset"),
    (argparse_in_cli, "nab_defense/cli/train.py", "import argparse"),
    (nothing_is_unpickled, "nab_defense/io.py", "import numpy, torch, yaml\ntorch.load(p, weights_only=True)\nyaml.safe_load(t)"),
    (print_in_cli, "nab_defense/cli/train.py", "print(result)"),
    (files_stay_short, "nab_defense/train.py", "x = 1\n" * MAX_LINES),
    (every_test_file_asserts, "tests/test_train.py", "def test_it():\n    with pytest.raises(ValueError):\n        train()"),
    (registered_names_are_unique, "nab_defense/relabel/knn.py", '@d.register("a")\nclass A: ...\n@e.register("a")\nclass B: ...'),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_rule_finds_a_break(rule: Rule, path: str, text: str) -> None:
    problems = list(rule([Source(path, text)]))
    assert len(problems) == 1 and problems[0].startswith(f"{path}:")


@pytest.mark.parametrize(("rule", "path", "text"), KEPT)
def test_rule_lets_pass(rule: Rule, path: str, text: str) -> None:
    assert not list(rule([Source(path, text)]))


def test_every_rule_is_shown_to_fail_and_to_pass() -> None:
    assert set(FOLDERS) == {rule for rule, _, _ in BROKEN} == {rule for rule, _, _ in KEPT}
