"""nab train RECIPE [key=value ...]"""

from __future__ import annotations

from pathlib import Path

from ..pipeline import run
from ..recipe import load_recipe
from ..result import summarize
from .common import EXIT_UNPROTECTED, Parser

__all__ = ["main"]


def main(argv: list[str]) -> int:
    parser = Parser(prog="nab train", description="Train a model on images that may be poisoned.")
    parser.add_argument("recipe", help="a YAML file such as recipes/cifar10_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. seed=1 attack.name=blend train.epochs=20")
    parser.add_argument("--out", type=Path, help="folder for the results; default runs/<recipe name>")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in that folder")
    args = parser.parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    out = args.out or Path("runs") / recipe.name
    result = run(recipe, out, resume=args.resume)
    print("\n".join([*summarize(result), f"written to {out}"]))
    return 0 if result["verdict"]["protected"] else EXIT_UNPROTECTED
