"""nab evaluate MODEL --data SOURCE [--attack NAME]"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import io
from ..bench.attacks import attacks
from ..bench.evaluate import evaluate, to_dict
from ..checkpoint import load, read_header
from ..defended import DefendedModel
from ..recipe import key_values
from ..result import summarize_models
from .common import Parser, check_out, data_settings
from .measure import READING, TRIGGER, attack_section, open_tests
from .suspect import builder

__all__ = ["main"]

EXAMPLES = [
    "nab evaluate runs/quickstart_digits --data digits",
    "nab evaluate runs/quickstart_digits --data digits --attack blend alpha=0.3 --target 0",
    "nab evaluate runs/mine/model.safetensors --data path/to/test --attack badnets size=3 --out runs/mine_badnets",
    "nab evaluate runs/mine --data path/to/test --attack narcissus --trigger runs/mine/trigger.safetensors",
    "nab evaluate runs/mine --data torch/cifar10 data.options.root=data data.options.download=true",
]


def main(argv: list[str]) -> int:
    parser = Parser(
        "nab evaluate",
        "Measure a saved model: ACC (right on clean images), and with an attack ASR (triggered images that go where the attacker "
        "wants) and RA (triggered images that are right all the same).",
        EXAMPLES,
    )
    parser.add_argument("file", type=Path, metavar="model", help="a run's folder, or its model.safetensors")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of attack and data, see the examples")
    parser.add_argument("--data", required=True, help="test images: a folder, digits, or a timm data set name")
    parser.add_argument("--model", metavar="package.module:function", help="builds the network where timm does not have it")
    parser.add_argument("--attack", metavar="NAME", help=f"paint its trigger on the images: {attacks.listing()}")
    parser.add_argument("--trigger", type=Path, metavar="FILE", help=TRIGGER)
    parser.add_argument("--target", type=int, default=0, help="number of the attack's target class; default 0")
    parser.add_argument("--mode", default="all_to_one", choices=("all_to_one", "all_to_all"))
    parser.add_argument("--limit", type=int, help="evaluate this many random images", metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="seed of that draw; default 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for result.json; default <run>/evaluation")
    args = parser.parse_intermixed_args(argv)
    out = args.out or (args.file if args.file.is_dir() else args.file.parent) / "evaluation"
    check_out(out)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    attack, (reading, settings) = None, data_settings(args.settings, READING)
    if args.attack is not None:
        params = key_values(settings, example="size=3")
        attack = attack_section(args.attack, target=args.target, mode=args.mode, params=params, trigger=args.trigger)
    elif settings or args.trigger:
        given = settings[0] if settings else f"--trigger {args.trigger}"
        raise ValueError(f"{given!r} sets an attack; name it with --attack")
    header = read_header(args.file)
    model = load(args.file, builder(args.model))
    session, cases = open_tests(args.data, header, out, reading, attack=attack, seed=args.seed, test_limit=args.limit)
    session.runtime.place(model)
    if isinstance(model, DefendedModel):
        plain = to_dict(evaluate(model.model, cases, session.runtime))
        models: dict[str, Any] = {"defended": {**to_dict(evaluate(model, cases, session.runtime)), "plain": plain}}
    else:
        models = {"model": to_dict(evaluate(model, cases, session.runtime))}
    facts = {"model": str(args.file), "data": args.data, "attack": attack, "verdict": header.get("verdict")}
    io.save_json(out / "result.json", {**facts, "models": models})
    print("\n".join([*summarize_models(models), f"written to {out}"]))
    return 0
