"""nab speed [NAME ...]"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..speed import BENCHMARKS, run_speed
from .common import Parser

__all__ = ["main"]

EXAMPLES = ["nab speed kmeans knn", "nab speed training --out results", "nab speed"]


def main(argv: list[str]) -> int:
    what = (
        "Measure what the parts cost on this machine, each beside what it replaces or wraps. All of them take the better part of "
        "half an hour on two cores; leave the machine alone meanwhile."
    )
    parser = Parser("nab speed", what, EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default all")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/speed"), metavar="DIR", help="for speed_NAME.json; default runs/speed"
    )
    args = parser.parse_args(argv)
    for name, result in run_speed(args.out, args.names).items():
        print("\n".join(_lines(name, result)))
    print(f"written to {args.out}")
    return 0


def _lines(where: str, value: Any) -> list[str]:
    """Every ratio in a result, with its place."""
    if isinstance(value, list):
        return [line for place, one in enumerate(value) for line in _lines(f"{where}[{place}]", one)]
    if not isinstance(value, dict):
        return []
    lines = [line for key, one in value.items() for line in _lines(f"{where}.{key}", one)]
    if "ratio" in value:
        ratio = value["ratio"]
        lines.append(f"{where:30} {value['of']:24} {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
    return lines
