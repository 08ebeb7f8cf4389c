"""Running a grid: every missing cell once, each written whole, in an order that makes a grid useful before it is done."""

from __future__ import annotations

import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import io
from ..defences import Outcome, defences
from ..result import commit, provenance, short
from .case import Case
from .cells import Cell, Setting, grouped
from .figures import attack_works, figures
from .schema import NONE, ORACLE

__all__ = ["ATTACK_FAILED", "DONE", "FAILED", "Record", "Runner", "as_record", "cell_path", "records", "run_cells"]

DONE, ATTACK_FAILED, FAILED = "done", "attack failed", "failed"
OF_TWINS = ("status", "twins", "plain_seconds")  # what a cell tells of the others of its setting, if its attack failed
Record = dict[str, Any]
log = logging.getLogger(__name__)
Tell = Callable[[str], None]
Runner = Callable[[list[Cell], Path], Iterator[tuple[Cell, Record]]]


def cell_path(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name}.json"


def run_cells(cells: list[Cell], out: Path, *, tell: Tell, runner: Runner | None = None) -> list[Record]:
    """Run those that are not there yet.

    A cell that cannot be run is written down as failed with its one line, and the others go on; the next run tries it again,
    since what failed may be mended by then, such as a folder that was not there. Faults of the program are logged whole. Where
    the attack does not work on the undefended network no defence is trained: there is nothing to defend; and where another cell
    says so already, nothing at all.

    Args:
        cells: In their order.
        out: Folder of the grid; gets cells/, twins/ and sheets/, with a picture of each attack.
        tell: Called with a line a cell.
        runner: (missing cells, out) -> each with its record, as they are finished; None: one after the other, here.

    Returns: records of the cells that failed; "fault" says whether it is the program's, and not of what it was given."""
    io.check_folder(out)
    there = {cell: found for cell in cells if (found := _there(cell_path(out, cell))) is not None}
    told = _told(cells, there)
    for cell, record in told.items():
        io.save_json(cell_path(out, cell), record)
    missing = [cell for cell in cells if cell not in there and cell not in told]
    done, failed, begun = len(there) + len(told), list[Record](), time.perf_counter()
    others = _of_others(there, here=runner is None)  # also: which commit runs, before anything does
    if there:
        more = f"; the attack of {len(told)} more has failed, as they tell" * bool(told)
        tell(f"{len(there)} of {len(cells)} cells are there already{more}{others}")
    for number, (cell, record) in enumerate((runner or records)(missing, out), start=1):
        io.save_json(cell_path(out, cell), record)
        if record["status"] == FAILED:
            failed.append(record)
            if record["fault"]:
                log.error("the program failed\n%s", record.get("trace", record["error"]))
        left = (time.perf_counter() - begun) / number * (len(missing) - number)
        tell(f"{done + number}/{len(cells)} {cell.name}: {in_short(record)}; {left / 3600:.1f} h left")
    return failed


def _there(path: Path) -> Record | None:
    """A cell's record, where it need not be run."""
    if not path.exists():
        return None
    try:
        record = io.load_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and its cell is run again") from None
    if not isinstance(record, dict) or "status" not in record:
        raise ValueError(f"{path} holds no cell; delete it, and its cell is run again")
    return None if record["status"] == FAILED else record


def _told(cells: list[Cell], there: dict[Cell, Record]) -> dict[Cell, Record]:
    """Missing cells of settings of which all others tell that the attack failed, and of the same twins, with their records."""
    of: dict[Setting, list[Record]] = {}
    for cell, record in there.items():
        of.setdefault(cell.setting, []).append(record)
    told = {}
    for cell in cells:
        if cell in there or cell.kind in (NONE, ORACLE) or cell.setting not in of:
            continue
        first, *others = of[cell.setting]
        alike = all((one["status"], one["twins"]) == (first["status"], first["twins"]) for one in others)
        if first["status"] == ATTACK_FAILED and alike:
            by = {"told_by": first.get("told_by", first["key"])}
            told[cell] = as_record(cell, {**{name: first[name] for name in OF_TWINS}, **by}, 0.0)
    return told


def _of_others(there: dict[Cell, Record], *, here: bool) -> str:
    """What is to be said of cells that other code made, or another machine or precision: a cell's name holds its settings alone.

    Args: here: The others are to run on this machine."""
    own, kinds = commit(), {"by other code, commit": list[str](), "on another machine,": list[str]()}
    for cell, record in there.items():
        if (made := record.get("commit", own)) != own:
            kinds["by other code, commit"].append(short(made))
        if here and (made := record.get("hardware")) not in (None, cell.setting.hardware):
            kinds["on another machine,"].append(made)
    told = "".join(f"; {len(made)} of them {how} {' and '.join(sorted(set(made)))}" for how, made in kinds.items() if made)
    return f"{told}: delete these and twins/ to run them anew" if told else ""


def records(cells: list[Cell], out: Path) -> Iterator[tuple[Cell, Record]]:
    """Run cells in their order, each setting opened once."""
    for group in grouped(cells):
        with tempfile.TemporaryDirectory(prefix="bench_") as work:
            begun = time.perf_counter()
            case = _opened(group[0].setting, out, Path(work))
            for number, cell in enumerate(group):
                found = _found(cell, case, Path(work) / str(number))
                yield cell, as_record(cell, found, time.perf_counter() - begun)
                begun = time.perf_counter()


def _opened(setting: Setting, out: Path, work: Path) -> Case | Record:
    """The case with its twins; or how it fails, as all its cells then do: it is tried once."""
    try:
        case = Case(setting, out, work)
        case.show(out / "sheets")
        case.twins  # noqa: B018  # trained here
    except Exception as error:
        return _failed(error)
    return case


def _found(cell: Cell, case: Case | Record, folder: Path) -> Record:
    if isinstance(case, dict):
        return case
    try:
        return _run(cell, case, folder)
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> Record:
    """One fault must not keep a grid of many hours from the cells behind it."""
    line = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError):
        return {"status": FAILED, "error": line, "fault": False}
    trace = "".join(traceback.format_exception(error))  # a worker's log is not seen
    return {"status": FAILED, "error": f"{type(error).__name__}: {line}", "fault": True, "trace": trace}


def as_record(cell: Cell, found: Record, seconds: float) -> Record:
    """What a cell's file holds: which cell it is, what was found, and the seconds that passed."""
    setting = cell.setting
    place = {"network": setting.network, "attack": setting.attack, "rate": setting.rate, "seed": setting.seed}
    about = {"key": cell.key, "cell": {**place, "defence": cell.defence}, "config": cell.config}
    return {**about, **found, "wall_seconds": seconds}


def _run(cell: Cell, case: Case, folder: Path) -> Record:
    twins = case.twins
    works = attack_works(twins.figures)
    plain = twins.seconds["undefended"]
    found: Record = {
        "status": DONE if works is not False else ATTACK_FAILED,
        **provenance(case.session.runtime),
        "twins": twins.figures,
        "twins_made": twins.made,
        "plain_seconds": plain,
    }
    if works is False and cell.kind not in (NONE, ORACLE):
        return found
    if cell.kind == ORACLE:
        outcome = Outcome(twins.oracle, {"train": twins.seconds["oracle"]}, case.oracle_plan)
    else:
        outcome = defences.create(cell.kind, **cell.row.params).defend(case.task(cell, folder))
    relative = {stage: seconds / plain for stage, seconds in outcome.seconds.items()}
    return {
        **found,
        "figures": figures(outcome, case, detects=cell.kind != ORACLE),
        "seconds": outcome.seconds,
        "relative_seconds": {**relative, "total": sum(relative.values())},
        "note": outcome.note,
    }


def in_short(record: Record) -> str:
    """What a cell showed, for people who watch."""
    took = f"{record['wall_seconds']:.0f} s"
    if record["status"] == FAILED:
        return f"failed, {took}: {record['error']}"
    shown = record["figures"]["defended"] if "figures" in record else record["twins"]["undefended"]
    rates = " ".join(f"{name.upper()} {shown[name]['value']:.3f}" for name in ("acc", "asr") if name in shown)
    return f"{'the attack failed, ' if record['status'] == ATTACK_FAILED else ''}{rates}, {took}"
