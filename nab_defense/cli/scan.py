"""nab scan SOURCE [--detector NAME]"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from .. import io
from ..data import open_source
from ..detectors import detectors
from ..look import look
from ..methods import check_methods
from ..plan import save_finding
from ..recipe import parse_recipe
from ..result import oddities, save_suspects
from ..schema import Recipe
from ..session import Session
from .common import Parser, check_apart, check_out

__all__ = ["main"]

SMALL = 64  # the scan's network looks at images of at most this edge
EXAMPLES = [
    "nab scan digits",
    "nab scan path/to/images --out runs/look data.limit=5000",
    "nab scan path/to/images data.strict=false scan.epochs=20 data.size=96",
    "nab scan wds/path/to/shards scan.epochs=5",
    "nab scan torch/cifar10 data.options.root=data data.options.download=true",
]


def main(argv: list[str]) -> int:
    parser = Parser("nab scan", "Rank the images of a data set by suspicion. Nothing is changed, no model is shipped.", EXAMPLES)
    parser.add_argument(
        "source", help="digits, a folder with one sub-folder a class, wds/FOLDER of WebDataset shards, or a timm data set name"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings, see the examples")
    parser.add_argument("--detector", default="lga", metavar="NAME", help=f"{detectors.listing()}; default lga")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results; default runs/scan_<source>")
    args = parser.parse_intermixed_args(argv)
    out = args.out or Path("runs") / f"scan_{Path(args.source).resolve().name}"
    check_out(out)
    check_apart(args.source, out)
    session = _session(args.source, args.detector, args.overrides, out)
    session.rehearse()
    finding, _ = look(session, kept=True)
    suspects = int(finding.plan.suspect.sum())
    groups = [dataclasses.asdict(group) for group in finding.selection.groups]
    report = {
        "recipe": session.settings,
        "samples": len(finding.plan),
        "suspects": suspects,
        "fingerprint": session.source.fingerprint,
        "irregular": oddities(session.source),
        "groups": groups,
    }
    io.save_json(out / "report.json", report)
    save_finding(out / "plan.npz", finding)
    save_suspects(out / "suspects.csv", finding, session.source)
    accused = [session.source.classes[label] for label in np.unique(finding.plan.labels[finding.plan.suspect])]
    where = f" labelled {', '.join(accused)}" if accused else ""
    print(f"{suspects} of {len(finding.plan)} samples are suspect{where}; written to {out}")
    return 0


def _session(source: str, detector: str, overrides: list[str], out: Path) -> Session:
    """A small network on small images; their size and color are those of the images, where the settings do not say."""
    kwargs = {"stem_type": "deep", "stem_width": 8, "channels": [16, 32, 64, 128], "avg_down": False}
    tree: dict[str, Any] = {
        "name": f"scan_{Path(source).name}",
        "data": {"source": source},
        "model": {"name": "resnet10t", "small_stem": True, "kwargs": kwargs},
        "scan": {"detector": detector, "epochs": 10},
        "train": {"augment": "crop_flip"},
    }
    asked = _parsed(tree, overrides)
    check_methods(asked)  # before the images are read
    data = asked.data
    opened = open_source(data.source, strict=data.strict, **data.options)
    channels = asked.model.in_chans if "in_chans" in asked.model.model_fields_set else opened.channels
    size = data.size or min(SMALL, opened.edge())
    found = {"size": size, "mean": data.mean or [0.5] * channels, "std": data.std or [0.25] * channels}
    tree = {**tree, "data": tree["data"] | found, "model": {**tree["model"], "in_chans": channels}}
    session = Session(_parsed(tree, overrides), out, resume=False)
    if channels == opened.channels:
        session.whole_source = opened  # not read twice
    return session


def _parsed(tree: dict[str, Any], overrides: list[str]) -> Recipe:
    return parse_recipe(tree, overrides, "scan settings")
