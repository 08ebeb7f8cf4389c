"""nab scan SOURCE [--detector NAME]"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from .. import io
from ..data import open_source
from ..pipeline import detect
from ..plan import save_finding
from ..recipe import parse_recipe
from ..result import save_suspects
from ..session import Session
from .common import Parser

__all__ = ["main"]

SMALL = 64  # the scan's network looks at images of at most this edge


def main(argv: list[str]) -> int:
    parser = Parser(prog="nab scan", description="Rank the images of a data set by suspicion; no model is shipped.")
    parser.add_argument("source", help="digits, a folder with one sub-folder a class, or a timm data set name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings, e.g. scan.epochs=10 data.limit=5000")
    parser.add_argument("--detector", default="lga", help="lga, spectral, activation_clustering or knn; default lga")
    parser.add_argument("--out", type=Path, help="folder for the results; default runs/scan_<source>")
    args = parser.parse_intermixed_args(argv)
    recipe = parse_recipe(_tree(args.source, args.detector), args.overrides, "scan settings")
    out = args.out or Path("runs") / f"scan_{Path(args.source).name}"
    session = Session(recipe, out, resume=False)
    session.claim()
    finding = detect(session)
    suspects = int(finding.plan.suspect.sum())
    groups = [dataclasses.asdict(group) for group in finding.selection.groups]
    report = {
        "recipe": json.loads(recipe.model_dump_json()),
        "samples": len(finding.plan),
        "suspects": suspects,
        "fingerprint": session.source.fingerprint,
        "irregular": session.source.irregular,
        "groups": groups,
    }
    io.save_json(out / "report.json", report)
    save_finding(out / "plan.npz", finding)
    save_suspects(out / "suspects.csv", finding, session.source)
    accused = [session.source.classes[group.label] for group in finding.selection.groups if group.distinct]
    where = f" labelled {', '.join(accused)}" if accused else ""
    print(f"{suspects} of {len(finding.plan)} samples are suspect{where}; written to {out}")
    return 0


def _tree(source: str, detector: str) -> dict[str, object]:
    """A recipe for scanning anything: a small network on small images."""
    opened = open_source(source)
    edge = min(SMALL, max(opened.image(0).size))
    spread = [0.5] * opened.channels
    kwargs = {"stem_type": "deep", "stem_width": 8, "channels": [16, 32, 64, 128], "avg_down": False}
    return {
        "name": f"scan_{Path(source).name}",
        "data": {"source": source, "size": edge, "mean": spread, "std": [value / 2 for value in spread]},
        "model": {"name": "resnet10t", "in_chans": opened.channels, "small_stem": True, "kwargs": kwargs},
        "scan": {"detector": detector, "epochs": 10},
        "train": {"augment": "crop_flip"},
    }
