"""nab bench GRID.yaml"""

from __future__ import annotations

from pathlib import Path

from .. import io
from ..grid import Grid, cells_of, draw, find_cells, load_grid, markdown, own_share, read_results, run_cells
from .common import Parser

__all__ = ["main"]

EXAMPLES = [
    "nab bench recipes/bench/digits.yaml",
    "nab bench recipes/bench/cpu.yaml --out runs/bench_cpu",
    "nab bench recipes/bench/digits.yaml --cell resnet-blend-10pct-nab-seed0",
    "nab bench recipes/bench/cpu.yaml --summarize",
    "nab bench results/bench --summarize --out runs/summary",
]


def main(argv: list[str]) -> int:
    parser = Parser("nab bench", "Compare defences: every cell of a grid once. One that was stopped goes on.", EXAMPLES)
    parser.add_argument("grid", help="a YAML file; those in recipes/bench/ are examples. With --summarize also a folder of cells")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results; default runs/bench_<grid name>")
    parser.add_argument("--cell", metavar="KEY", help="run this cell alone, with what it needs: its key, or a part of its name")
    parser.add_argument("--summarize", action="store_true", help="write tables and plots of what is finished, and run nothing")
    args = parser.parse_args(argv)
    if args.summarize and Path(args.grid).is_dir():
        return _summarize(Path(args.grid), None, args.out)
    grid = load_grid(args.grid)
    out = args.out or Path("runs") / f"bench_{grid.name}"
    if args.summarize:
        return _summarize(out, grid, None)
    cells = cells_of(grid, str(args.grid))
    cells = own_share(cells) if args.cell is None else find_cells(cells, args.cell)
    failed = run_cells(cells, out, tell=lambda line: print(line, flush=True))
    print(f"{len(cells)} cells, {len(failed)} failed; written to {out}")
    return 0


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
