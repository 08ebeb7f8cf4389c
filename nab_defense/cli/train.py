"""nab train RECIPE [key=value ...]"""

from __future__ import annotations

from pathlib import Path

from .. import ranks
from ..pipeline import run
from ..recipe import load_recipe
from ..result import summarize
from .common import EXIT_UNPROTECTED, Parser, check_apart

__all__ = ["main"]

EXAMPLES = [
    "nab train recipes/quickstart_digits.yaml",
    "nab train recipes/imagefolder.yaml data.source=path/to/train data.test=path/to/val model.name=convnext_tiny",
    "nab train recipes/cifar10_cpu.yaml seed=1 attack=blend attack.params.alpha=0.1 train.epochs=20 --out runs/blend",
    "nab train recipes/cifar10_cpu.yaml --resume",
    "torchrun --nproc-per-node 2 tools/train.py recipes/cifar10_cpu.yaml",
]


def main(argv: list[str]) -> int:
    parser = Parser("nab train", "Train a model on images that may be poisoned.", EXAMPLES)
    parser.add_argument("recipe", help="a YAML file; those in recipes/ are examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's, values in YAML")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results; default runs/<recipe name>")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of this recipe in that folder")
    args = parser.parse_intermixed_args(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    out = args.out or Path("runs") / recipe.name
    check_apart(recipe.data.source, out)
    result = run(recipe, out, resume=args.resume or ranks.restarted())
    print("\n".join([*summarize(result), f"written to {out}"]))
    return 0 if result["verdict"]["protected"] else EXIT_UNPROTECTED
