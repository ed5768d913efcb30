"""The folder of a sweep: its record sweep.json, and whether a command goes on with it.

::

    sweeps/beta-k/
      sweep.json sweep.md sweep.csv        grid, settings, and the figures of every cell
      curves.png curves.svg                validation figures against steps
      grid.png grid.svg                    figures over the grid, where it has two keys
      runs/<cell>/                         a run each, as any other
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.sweep_grid import Cell, Plan, text_of
from vqgen.config import Config
from vqgen.console import Console
from vqgen.errors import ConfigError, InputError, MismatchError
from vqgen.files import read_json, remove_folder, write_json
from vqgen.locks import locked
from vqgen.problems import check
from vqgen.run_folder import RunFolder, require_enclosed, versions
from vqgen.training_state import plain, refuse_differences

FORMAT = 1
RECORD = "sweep.json"
RUNS = "runs"
DONE, FAILED, WAITING = "done", "failed", "waiting"
"""States of a cell."""


class _Part(BaseModel):
    """Strict: a text is no number. What else a record holds is nobody's business here."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Images(_Part):
    key: str
    fingerprint: str
    pixel_variance: int | float


class _Figures(_Part):
    codec: str | None = None
    priors: dict[str, dict[str, dict[str, Any]]] = {}


class _Cell(_Part):
    name: str
    state: Literal["done", "failed", "waiting"]
    message: str | None
    figures: _Figures


class _Record(_Part):
    settings: dict[str, Any]
    grid: dict[str, list[Any]]
    priors: list[str]
    images: list[_Images]
    cells: list[_Cell]


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of sweep.json; None where ``folder`` is not there, or is empty.

    Raises:
        InputError: the folder is a file or holds other things, or the record is damaged or of a newer vqgen.
    """
    if folder.is_dir():
        require_enclosed(folder)
    path = folder / RECORD
    if not path.is_file():
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file, not a folder.", "Name another folder with --out.")
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(f"{folder} is not empty and not a sweep (no {RECORD}).", "Name another folder with --out.")
        return None
    record: dict[str, Any] = read_json(path)
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(
            f"{path} is not the record of a sweep (bad or missing: {where[:100]}).",
            "Restore it, or name another folder with --out.",
        ) from error
    if record.get("format") != FORMAT:
        raise InputError(f"{path} has format {record.get('format')!r}; this vqgen reads {FORMAT}.", "Upgrade vqgen.")
    return record


def require_same(record: dict[str, Any], plan: Plan, folder: Path) -> None:
    """Refuse to go on with a sweep of other settings or another grid; more values of the same keys are no difference.

    Raises:
        ConfigError: listing what differs.
    """
    stored, problems = check(Config, record["settings"])
    if stored is None:
        raise InputError(f"{folder / RECORD} is damaged ({problems[0]}).", "Start over with --overwrite.")
    was = _identity(stored, record["priors"], record["grid"])
    now = _identity(plan.base, plan.priors, plan.grid)
    grown = was["grid"].keys() == now["grid"].keys() and all(
        set(values) <= set(now["grid"][key]) for key, values in was["grid"].items()
    )
    if grown:
        was["grid"] = now["grid"]
    try:
        refuse_differences(was, now, folder)
    except ConfigError as error:
        raise ConfigError(
            f"The sweep in {folder} was started with another grid or other settings:{error.message.partition(':')[2]}",
            "Go on with the same ones (a key may get more values), name another folder with --out, or start over with "
            "--overwrite.",
        ) from None


def _identity(base: Config, priors: Sequence[str], grid: dict[str, list[Any]]) -> dict[str, Any]:
    texts = {key: [text_of(value) for value in values] for key, values in grid.items()}
    return plain({**base.model_dump(mode="json", exclude_none=True), "--prior": list(priors), "grid": texts})


def require_same_images(record: dict[str, Any] | None, images: Sequence[dict[str, Any]]) -> None:
    """Refuse to go on with other images than those that finished cells saw.

    Raises:
        MismatchError: naming the source.
    """
    known = {entry["key"]: entry["fingerprint"] for entry in (record or {}).get("images", ())}
    for entry in images:
        if known.get(entry["key"], entry["fingerprint"]) != entry["fingerprint"]:
            raise MismatchError(
                f"The images of '{entry['source']}' are not those that this sweep was started with.",
                "Put those back, name another folder with --out, or start over with --overwrite.",
            )


def hold(stack: ExitStack, folder: Path) -> None:
    """Keep other processes out of the sweep until ``stack`` closes.

    Raises:
        InputError: one is at work there.
    """
    if folder.is_dir():
        require_enclosed(folder)
    try:
        stack.enter_context(locked(folder / ".lock"))
    except InputError as error:
        held = "--run" in error.hint  # else the disk says what is wrong
        hint = "Wait for it to end, or name another folder with --out." if held else error.hint
        raise InputError(error.message, hint) from error


def remove_sweep(folder: Path, console: Console) -> None:
    """Remove what a sweep left in its folder, after naming it."""
    if not (folder / RECORD).is_file():
        return
    made = [RUNS, *(f"{name}.{kind}" for name in ("curves", "grid") for kind in ("png", "svg"))]
    present = [name for name in [*made, "sweep.md", "sweep.csv", RECORD] if (folder / name).exists()]
    console.say(f"{folder}: removing {', '.join(present)}.")
    remove_folder(folder / RUNS)
    for name in present:
        if name != RUNS:
            (folder / name).unlink(missing_ok=True)


def run_of(folder: Path, cell: Cell) -> RunFolder:
    """The run of a cell."""
    return RunFolder(folder / RUNS / cell.name)


def has_codec(run: RunFolder) -> bool:
    """Whether codec and codes of a run are done."""
    return {"codec", "codes"} <= set(run.stages())


def is_done(run: RunFolder, cell: Cell) -> bool:
    """Whether a cell's run holds all that it is to hold."""
    stages = run.stages()
    priors = {run.prior_stage(name, level) for name, levels in cell.priors.items() for level in levels}
    return {"codec", "codes", *priors} <= set(stages)


def start_record(
    folder: Path, plan: Plan, before: dict[str, Any] | None, images: Sequence[dict[str, Any]], retry: bool
) -> dict[str, Any]:
    """Write the record of a sweep that begins or goes on: finished cells keep their figures, failed ones their message.

    With ``retry``, cells that failed wait again, and what they had not finished is removed.
    """
    known = {cell["name"]: cell for cell in (before or {}).get("cells", ())}
    cells = []
    for cell in plan.cells:
        run = run_of(folder, cell)
        fresh = {"name": cell.name, "title": cell.title, "run": f"{RUNS}/{cell.name}", "values": dict(cell.values)}
        kept = known.get(cell.name, {})
        state = kept.get("state", WAITING)
        if state == FAILED and retry:
            _forget_unfinished(run)
        kept_as_it_is = is_done(run, cell) if state == DONE else state == FAILED and not retry
        state = state if kept_as_it_is else WAITING
        message, figures = (kept["message"], kept["figures"]) if state != WAITING else (None, {})
        cells.append({**fresh, "state": state, "message": message, "figures": figures})
    seen = {entry["key"]: entry for entry in (*(before or {}).get("images", ()), *images)}
    record = {
        "format": FORMAT,
        "created": (before or {}).get("created") or _now(),
        "updated": _now(),
        "versions": versions(),
        "grid": plan.grid,
        "priors": list(plan.priors),
        "settings": plan.base.model_dump(mode="json", exclude_none=True),
        "images": list(seen.values()),
        "best": None,
        "cells": cells,
    }
    write_json(folder / RECORD, record)
    return record


def _forget_unfinished(run: RunFolder) -> None:
    """Remove what a failed cell had begun and not finished, so that it starts anew there."""
    if not run.exists:
        return
    if not has_codec(run):
        remove_folder(run.path)
        return
    begun = [path.relative_to(run.path).as_posix() for path in run.priors.glob("*/*")]
    run.remove_stages([stage for stage in begun if stage not in run.stages()])


def save_record(folder: Path, record: dict[str, Any]) -> None:
    """Write sweep.json anew."""
    record["updated"] = _now()
    write_json(folder / RECORD, record)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
