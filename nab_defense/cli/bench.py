"""nab bench GRID.yaml, and nab bench --speed [NAME ...]"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .. import io
from ..grid import Grid, cells_of, draw, find_cells, load_grid, markdown, on_ray, own_share, read_results, run_cells
from ..recipe import key_values
from ..speed import BENCHMARKS, run_speed
from .common import EXIT_FAULT, EXIT_INPUT, Parser

__all__ = ["main"]

EXAMPLES = [
    "nab bench recipes/bench/digits.yaml",
    "nab bench recipes/bench/cpu.yaml --out runs/bench_cpu",
    "nab bench recipes/bench/digits.yaml --cell resnet-blend-10pct-nab-seed0",
    "nab bench recipes/bench/cpu.yaml --summarize",
    "nab bench recipes/bench/cpu.yaml --launcher ray --workers 2",
    "nab bench results/bench/digits --summarize --out runs/summary",
    "nab bench --speed training kmeans",
    "nab bench --speed whole epochs=30 count=5000",
]


def main(argv: list[str]) -> int:
    parser = Parser("nab bench", "Compare defences: every cell of a grid once. One that was stopped goes on.", EXAMPLES)
    what = "a YAML file; those in recipes/bench/ are examples. With --summarize also a folder of cells"
    parser.add_argument("grid", nargs="?", help=what)
    where = "folder for the results; default runs/bench_<grid name>, of --speed runs/speed"
    parser.add_argument("--out", type=Path, metavar="DIR", help=where)
    parser.add_argument("--cell", metavar="KEY", help="run this cell alone, with what it needs: its key, or a part of its name")
    parser.add_argument("--summarize", action="store_true", help="write tables and plots of what is finished, and run nothing")
    parser.add_argument("--launcher", choices=("here", "ray"), default="here", help="ray: spread the settings over a Ray cluster")
    parser.add_argument("--workers", type=int, metavar="N", help="with --launcher ray: start N of its workers on this machine")
    speed = f"instead: what the parts cost on this machine, each beside what it replaces or wraps; of {', '.join(BENCHMARKS)}"
    more = "default all, the better part of an hour on two idle cores; key=value is for the settings of those that are named"
    parser.add_argument("--speed", nargs="*", metavar="NAME", help=f"{speed}; {more}")
    args = parser.parse_args(argv)
    if (args.speed is None) == (args.grid is None):
        parser.error("give either a grid or --speed")
    if args.workers is not None and (args.launcher != "ray" or args.workers < 1):
        raise ValueError(f"--workers {args.workers}: at least 1, and with --launcher ray")
    _refuse_idle(args)
    if args.speed is not None:
        return _speed(args.out or Path("runs") / "speed", args.speed)
    if args.summarize and Path(args.grid).is_dir():
        return _summarize(Path(args.grid), None, args.out)
    grid = load_grid(args.grid)
    out = args.out or Path("runs") / f"bench_{grid.name}"
    if args.summarize:
        return _summarize(out, grid, None)
    cells = cells_of(grid, str(args.grid))
    cells = own_share(cells if args.cell is None else find_cells(cells, args.cell))
    runner = on_ray(args.workers) if args.launcher == "ray" else None
    failed = run_cells(cells, out, tell=lambda line: print(line, flush=True), runner=runner)
    print(f"{len(cells)} cells, {len(failed)} failed; written to {out}")
    if not failed or "RANK" in os.environ:  # torchrun ends every process once one has a status of its own
        return 0
    return EXIT_FAULT if any(record["fault"] for record in failed) else EXIT_INPUT


def _refuse_idle(args: argparse.Namespace) -> None:
    """Refuse options that would change nothing beside --speed or --summarize."""
    timed = args.speed is not None
    idle = {"--cell": args.cell is not None, "--launcher ray": args.launcher == "ray", "--summarize": args.summarize and timed}
    for option, given in idle.items():
        if given and (timed or args.summarize):
            raise ValueError(f"{option} does nothing beside {'--speed' if timed else '--summarize'}; give one of the two")


def _summarize(cells: Path, grid: Grid | None, out: Path | None) -> int:
    """Tables and plots of the cells below a folder, in its summary/ or in `out`."""
    results, folder = read_results(cells, grid), out or cells / "summary"
    io.check_folder(folder)
    page = markdown(results)
    io.save_text(folder / "tables.md", page)
    drawn = draw(results, folder)
    print(page)
    print(f"written to {folder}: tables.md, {', '.join(path.name for path in drawn)}")
    return 0


def _speed(out: Path, words: list[str]) -> int:
    names, knobs = ([word for word in words if ("=" in word) is setting] for setting in (False, True))
    for name, result in run_speed(out, names, **key_values(knobs, example="repeats=3")).items():
        print("\n".join(_ratios(name, result)))
    print(f"written to {out}")
    return 0


def _ratios(where: str, value: Any) -> list[str]:
    """Every ratio in a result, with its place."""
    if isinstance(value, list):
        return [line for place, one in enumerate(value) for line in _ratios(f"{where}[{place}]", one)]
    if not isinstance(value, dict):
        return []
    lines = [line for key, one in value.items() for line in _ratios(f"{where}.{key}", one)]
    if "ratio" in value:
        ratio = value["ratio"]
        lines.append(f"{where:30} {value['of']:24} {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    return lines
