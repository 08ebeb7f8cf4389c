"""nab evaluate MODEL --data SOURCE [--attack NAME]"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import io
from ..bench.evaluate import evaluate, to_dict
from ..checkpoint import load, read_header
from ..defended import DefendedModel
from ..recipe import parse_recipe
from ..result import summarize_models
from ..session import Session
from .common import Parser, key_values

__all__ = ["main"]


def main(argv: list[str]) -> int:
    parser = Parser(prog="nab evaluate", description="Measure a saved model: ACC, and with an attack ASR and RA.")
    parser.add_argument("model", type=Path, help="a run's folder, or its model.safetensors")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the attack, e.g. pattern=white")
    parser.add_argument("--data", required=True, help="test images: a folder, digits, or a timm data set name")
    parser.add_argument("--attack", help="badnets, blend, sig or wanet")
    parser.add_argument("--target", type=int, default=0, help="the attack's target class; default 0")
    parser.add_argument("--mode", default="all_to_one", choices=("all_to_one", "all_to_all"))
    parser.add_argument("--limit", type=int, help="evaluate this many random images")
    parser.add_argument("--out", type=Path, help="folder for result.json; default <run>/evaluation")
    args = parser.parse_intermixed_args(argv)
    header = read_header(args.model)
    model = load(args.model)
    attack = None
    if args.attack is not None:
        attack = {
            "name": args.attack,
            "target": args.target,
            "mode": args.mode,
            "poison": False,
            "params": key_values(args.settings),
        }
    elif args.settings:
        raise ValueError(f"{args.settings[0]!r} sets an attack; name it with --attack")
    network = header["network"]
    tree = {
        "name": "evaluate",
        "data": {
            "source": args.data, "test": args.data, "test_limit": args.limit, "size": header["input_size"],
            "mean": header["mean"], "std": header["std"],
        },
        "attack": attack,
        "model": {"name": network["model"], "in_chans": network["in_chans"]},
    }  # fmt: skip
    out = args.out or (args.model if args.model.is_dir() else args.model.parent) / "evaluation"
    session = Session(parse_recipe(tree, (), "evaluation settings"), out, resume=False)
    cases = session.cases()
    assert cases is not None  # data.test is set above
    ours, theirs = session.source.classes, tuple(header["classes"])
    if ours != theirs:
        raise ValueError(
            f"{args.data} has {len(ours)} classes, {ours[0]!r} to {ours[-1]!r}; the model was trained on {len(theirs)} others"
        )
    session.runtime.place(model)
    if isinstance(model, DefendedModel):
        plain = to_dict(evaluate(model.model, cases, session.runtime))
        models: dict[str, Any] = {"defended": {**to_dict(evaluate(model, cases, session.runtime)), "plain": plain}}
    else:
        models = {"model": to_dict(evaluate(model, cases, session.runtime))}
    facts = {"model": str(args.model), "data": args.data, "attack": attack, "verdict": header["verdict"]}
    io.save_json(out / "result.json", {**facts, "models": models})
    print("\n".join([*summarize_models(models), f"written to {out}"]))
    return 0
