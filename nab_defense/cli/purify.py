"""nab purify --checkpoint FILE --clean SOURCE --method NAME [key=value ...]"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import textwrap
from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoint, io
from ..bench.attacks import attacks
from ..bench.evaluate import evaluate, to_dict
from ..clean import CleanSet, Pixels
from ..data import Source, open_source
from ..kept import forget, left
from ..purify import check_known, purifiers, purify
from ..recipe import key_values, parse_recipe
from ..registry import nearest
from ..repair import in_words, outcome, ranking, read_clean, read_suspects
from ..result import provenance, save_ranking
from ..runtime import Runtime
from ..schema import Recipe
from .common import Parser, check_out, data_settings
from .measure import READING, TRIGGER, attack_section, check_classes, open_tests
from .repaired import close, finished
from .suspect import Suspect, add_arguments, open_suspect

__all__ = ["main"]

EXAMPLES = [
    "nab purify --checkpoint runs/mine --clean path/to/clean --method ibau",
    "nab purify --model resnet18 --checkpoint bad.pth --clean path/to/clean --method ibau rounds=10 clean_limit=500",
    "nab purify --model nets:small --checkpoint bad.pth --mean 0,0,0 --std 1,1,1 --input-size 32 --clean clean --method ibau",
]
UNLABELED = " or ".join(name for name in purifiers.names() if not purifiers.get(name).labelled)
LIMITS = ("max_drop", "holdout")
# What every method takes beside its own settings, `seed` and `runtime.*`.
SHARED: dict[str, Any] = {name: inspect.signature(purify).parameters[name].default for name in LIMITS}
SHARED |= {"clean_limit": None, "hflip": 0.5}
TAKEN = ("seed", "runtime.threads", "runtime.device", "runtime.precision", "runtime.channels_last")  # of a recipe
SETTINGS = (
    "the method's settings",
    f"max_drop: largest loss of held-out accuracy, {SHARED['max_drop']}",
    f"holdout: share of the clean images that only selects, {SHARED['holdout']}",
    "clean_limit: draw so many of the clean images, as many of each class",
    "hflip: share of flipped images in augmentation, 0.5",
    ", ".join(TAKEN),
    "attack.*: settings of --attack",
    "data.strict, data.options.*, data.test_split: how images are read",
)


def main(argv: list[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    stem = args.checkpoint.absolute().parent.name if args.checkpoint.stem == "model" else args.checkpoint.stem
    out = args.out or Path("runs") / f"purified_{stem}"
    unfinished = out / "unfinished"
    if not args.resume:
        if left(unfinished):  # beside which it may have left its model
            raise ValueError(f"{unfinished} holds an interrupted repair; go on with --resume, delete it, or name another --out")
        check_out(out)
    reading, args.settings = data_settings(args.settings, READING)
    knobs, shared, attack, recipe = _settings(args, reading)
    method: Any = purifiers.create(args.method, **knobs)
    runtime = Runtime(**recipe.runtime.model_dump(), seed=recipe.seed)
    about = {"num_classes": args.num_classes, "mean": args.mean, "std": args.std, "input_size": args.input_size}
    suspect = open_suspect(args.model, args.checkpoint, **about, runtime=runtime)
    instead = f", or use --unlabeled with --method {UNLABELED}"
    whole = _opened(args.clean, suspect, recipe, labelled=not args.unlabeled, instead=instead)
    source, clean = _drawn(whole, args, suspect, shared, recipe)
    if clean.labels is not None:
        suspect = dataclasses.replace(suspect, classes=source.classes)
    training = None if args.rank is None else _opened(args.rank, suspect, recipe)
    listed, accused = _accused(args, suspect, recipe)
    cases = None
    if args.test is not None:  # opened now, so that a mistake in it costs no repair; nothing reads them before that is done
        tests = {"attack": attack, "seed": recipe.seed, "runtime": recipe.runtime.model_dump()}
        session, cases = open_tests(args.test, suspect.header(), out, reading, **tests)
        if session.test_source.fingerprint == whole.fingerprint:
            raise ValueError(f"--test {args.test} has the images of --clean, by which the model is repaired; name others")
    asked = _asked(args, method, shared, recipe, suspect, source, clean)
    asked["suspects"] = listed
    ranked = None
    if training is not None:
        ranked = {"source": args.rank, "fingerprint": training.fingerprint, "images": len(training)}
    test = None if args.test is None else {"source": args.test, "attack": attack}
    if args.resume and not left(unfinished):  # beside which a killed run may have left its model
        done = finished(out, {**asked, "ranked": ranked, "test": test})
        if done is not None:
            return close(done, suspect.classes, f"it was finished already, in {out}")
        check_out(out)
    if not left(unfinished) and (out / "suspects.csv").exists():
        raise ValueError(f"{out} holds the suspects.csv of an earlier run; name another --out")
    limits = {name: shared[name] for name in LIMITS}
    check_known(suspect.model, clean, mean=suspect.mean, std=suspect.std, runtime=runtime, classes=source.classes)
    found = purify(
        suspect.model, clean, method,
        mean=suspect.mean, std=suspect.std, runtime=runtime, **limits, suspects=accused, state=unfinished, resume=args.resume,
    )  # fmt: skip
    verdict = {
        "protected": found.repaired,
        "text": in_words(found, args.method, shared["max_drop"], instead="no model written"),
    }
    models = {"original": suspect.model}
    if found.status == "accepted":
        models["purified"] = found.model
        how = {name: asked[name] for name in ("method", "knobs", *SHARED, "seed")}
        _save(out, found.model, suspect, verdict=verdict, purified=how)
    result = {
        **asked,
        **outcome(found),
        "verdict": verdict,
        **provenance(runtime),
        "models": {},
    }
    io.save_json(out / "result.json", result)
    last = [f"written to {out}"]
    if training is not None and found.unlearned is not None:
        original = runtime.place(Pixels(suspect.model, suspect.mean, suspect.std))
        scores = ranking(original, found.unlearned, training, size=suspect.input_size, runtime=runtime)
        save_ranking(out / "suspects.csv", training, scores, args.method)
        result["ranked"] = ranked
        io.save_json(out / "result.json", result)
    elif training is not None:
        last.insert(0, f"nothing to rank {args.rank} by: the network did not forget the clean images")
    if cases is not None:
        result["models"] = {name: to_dict(evaluate(model, cases, runtime)) for name, model in models.items()}
        io.save_json(out / "result.json", {**result, "test": test})
    forget(unfinished)
    return close(result, suspect.classes, *last)


def _parser() -> Parser:
    what = (
        "Repair a trained model that may hold a backdoor, with a few images that are trusted. The best of a method's candidates "
        "is written; none where none is better. The exit status is 3 then, and also where what is written can still be turned."
        "\n\nmethods and their settings:\n"
    )
    parser = Parser("nab purify", what + "\n".join(_method_line(name) for name in purifiers.names()), EXAMPLES)
    add_arguments(parser)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="; ".join(SETTINGS))
    parser.add_argument("--clean", required=True, metavar="SOURCE", help="trusted images: a folder, digits, or a timm name")
    parser.add_argument("--method", required=True, metavar="NAME", help=", ".join(purifiers.names()))
    parser.add_argument("--unlabeled", action="store_true", help="no labels are read; any folder of images will do")
    parser.add_argument(
        "--rank", metavar="SOURCE", help="with --method rnp: rank these training images by suspicion, in suspects.csv"
    )
    accused = "suspects.csv of nab scan or nab train: candidates are judged by these, too; needs --training"
    parser.add_argument("--suspects", type=Path, metavar="FILE", help=accused)
    parser.add_argument("--training", metavar="SOURCE", help="the training images that --suspects names")
    parser.add_argument("--test", metavar="SOURCE", help="measure ACC before and after; these images select nothing")
    parser.add_argument("--attack", metavar="NAME", help=f"and ASR, with this trigger on them: {', '.join(attacks.names())}")
    parser.add_argument("--trigger", type=Path, metavar="FILE", help=TRIGGER)
    parser.add_argument("--target", type=int, default=0, help="number of the attack's target class; default 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results; default runs/purified_<checkpoint>")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of this command in that folder")
    return parser


def _method_line(name: str) -> str:
    knobs = inspect.signature(purifiers.get(name)).parameters.values()
    text = f"{name}: {' '.join(f'{knob.name}={knob.default}' for knob in knobs)}"
    return textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    ")


def _settings(
    args: argparse.Namespace, reading: list[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None, Recipe]:
    """Settings of the method, those that every method has, the attack, and a recipe for seed, runtime and how data is read.

    Raises:
        ValueError: Names the setting, what is allowed, and the nearest right spelling."""
    own = list(inspect.signature(purifiers.get(args.method)).parameters)
    if args.rank is not None and args.method != "rnp":
        raise ValueError(f"--rank ranks by the network that rnp has unlearn; {args.method} has none: choose --method rnp")
    knobs: dict[str, Any] = {}
    shared, trigger, rest = dict(SHARED), {}, []
    for item in args.settings:
        ((key, value),) = key_values([item], example="rounds=5").items()
        if key in own:
            knobs[key] = value
        elif key in SHARED:
            shared[key] = _number(key, value)
        elif key.startswith("attack."):
            trigger[key.removeprefix("attack.")] = value
        elif key in TAKEN:
            rest.append(item)
        else:
            known = [*own, *SHARED, *TAKEN]
            raise ValueError(f"no setting {key!r}; {args.method} has: {', '.join(known)}{nearest(key, known)}")
    recipe = parse_recipe({"name": "purify", "data": {"source": args.clean}}, [*rest, *reading], "purify settings")
    if args.attack is None:
        if trigger or args.trigger:
            given = f"attack.{next(iter(trigger))}" if trigger else f"--trigger {args.trigger}"
            raise ValueError(f"{given} sets an attack; name it with --attack")
        return knobs, shared, None, recipe
    if args.test is None:
        raise ValueError("--attack measures on test images; add --test")
    goal = {"target": args.target, "mode": "all_to_one", "params": trigger, "trigger": args.trigger}
    return knobs, shared, attack_section(args.attack, **goal), recipe


def _number(key: str, value: Any) -> float:
    whole = key == "clean_limit"
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= whole:
        raise ValueError(f"{key} must be a {'whole number of at least 1' if whole else 'number of at least 0'}, got {value!r}")
    if key == "hflip" and value > 1:
        raise ValueError(f"hflip must be at most 1, got {value!r}")
    return value


def _drawn(
    whole: Source, args: argparse.Namespace, suspect: Suspect, shared: dict[str, Any], recipe: Recipe
) -> tuple[Source, CleanSet]:
    """The clean images that are asked for, as a source and in memory."""
    limit, hflip = shared["clean_limit"], shared["hflip"]
    return read_clean(whole, size=suspect.input_size, limit=limit, labelled=not args.unlabeled, hflip=hflip, seed=recipe.seed)


def _accused(args: argparse.Namespace, suspect: Suspect, recipe: Recipe) -> tuple[dict[str, Any] | None, CleanSet | None]:
    """What a scan accused, to judge by: what result.json says of it, and the images."""
    if (args.suspects is None) != (args.training is None):
        raise ValueError("--suspects and --training go together: what a scan accused, and the images that it names")
    if args.suspects is None:
        return None, None
    source = _opened(args.training, suspect, recipe)
    images = read_suspects(args.suspects, source, size=suspect.input_size, seed=recipe.seed)
    listed = {"file": str(args.suspects), "sha256": io.file_hash(args.suspects)}
    return {**listed, "source": args.training, "fingerprint": source.fingerprint, "images": len(images)}, images


def _opened(name: str, suspect: Suspect, recipe: Recipe, *, labelled: bool = True, instead: str = "") -> Source:
    """Images for the model, of its classes where they are labelled, read as the settings of the data say."""
    data = recipe.data
    source = open_source(name, channels=len(suspect.mean), strict=data.strict, labelled=labelled, **data.options)
    if labelled:
        check_classes(name, source.classes, suspect.header(), instead=instead)
    return source


def _asked(
    args: argparse.Namespace,
    method: Any,
    shared: dict[str, Any],
    recipe: Recipe,
    suspect: Suspect,
    source: Source,
    clean: CleanSet,
) -> dict[str, Any]:
    """All that is to be done, and to what, as result.json has it."""
    n_fit, n_held = (len(part) for part in clean.split(shared["holdout"], recipe.seed))
    data = {"source": args.clean, "fingerprint": source.fingerprint, "n_fit": n_fit, "n_held": n_held}
    digest = io.file_hash(checkpoint.weights_file(args.checkpoint))
    return {
        "method": args.method,
        "knobs": dataclasses.asdict(method),
        **shared,
        "seed": recipe.seed,
        "runtime": recipe.runtime.model_dump(),
        "data": {**data, "labelled": clean.labels is not None},
        "model": dataclasses.asdict(suspect.network),
        "input": {"mean": list(suspect.mean), "std": list(suspect.std), "size": suspect.input_size},
        "checkpoint": {"file": str(args.checkpoint), "key": suspect.key, "sha256": digest},
    }


def _save(out: Path, model: nn.Module, suspect: Suspect, **header: Any) -> None:
    facts = {"classes": suspect.classes, "input_size": suspect.input_size, **header}
    checkpoint.save(out / "model.safetensors", model, suspect.network, mean=suspect.mean, std=suspect.std, **facts)
