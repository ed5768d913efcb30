"""A grid over settings: a run for each combination, and one table and one picture over all of them.

Each cell is a run as any other, made by the stages that the other commands use. Cells whose codecs would be the same
share one. What was begun goes on where it stopped; what fails is noted and does not stop the rest.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipelines.launcher import launched
from pipelines.settings import save_settings
from pipelines.sweep_figures import draw, figures_of, measure_images
from pipelines.sweep_grid import Cell, Plan
from pipelines.sweep_record import (
    DONE,
    FAILED,
    RECORD,
    WAITING,
    has_codec,
    hold,
    is_done,
    read_record,
    remove_sweep,
    require_same,
    require_same_images,
    run_of,
    save_record,
    start_record,
)
from pipelines.sweep_table import best_cell, to_csv, to_markdown
from pipelines.train_codes import train_codes
from pipelines.train_prior import train_prior
from priors import registry
from vqgen.console import Console, duration
from vqgen.errors import InputError, Interrupted, VqgenError
from vqgen.faults import is_of_memory
from vqgen.files import atomic_folder, clear_remains, require_writable, write_text
from vqgen.run_folder import RunFolder


def sweep(
    out: Path,
    plan: Plan,
    console: Console,
    *,
    overwrite: bool = False,
    retry: bool = False,
    hint: str = "",
    argv: Sequence[str] = (),
) -> dict[str, Any]:
    """Train every cell of ``plan`` below ``out``, skipping what is finished; returns the content of sweep.json.

    A cell that fails is noted with its message and left alone afterwards, unless ``retry``. ``hint`` tells an
    interrupted user how to go on; ``argv`` is noted in each run as the command that made it.

    Raises:
        InputError: a launcher with several processes, a folder that is no sweep or in which another process works,
            images that cannot be used, or every cell failed.
        ConfigError: the folder holds a sweep over another grid or with other settings.
        MismatchError: the images are not those that the sweep was started with.
        Interrupted: the state of the cell that was being trained is saved.
    """
    if launched() > 1:
        raise InputError(
            "vqgen sweep works in one process, not under a launcher.",
            "Start it without one, or train single cells with `train-codes --set` under it.",
        )
    require_writable(out / RECORD)
    before = None if overwrite and (out / RECORD).is_file() else read_record(out)
    if before is not None:
        require_same(before, plan, out)
    states = {cell["name"]: cell["state"] for cell in (before or {}).get("cells", ())}
    pending = [cell for cell in plan.cells if _is_pending(out, cell, states.get(cell.name, WAITING), retry)]
    images = measure_images(pending, console)
    usable = [entry for entry in images.values() if isinstance(entry, dict)]
    require_same_images(before, usable)
    with ExitStack() as stack:
        hold(stack, out)
        clear_remains(out)
        if overwrite:
            remove_sweep(out, console)
        record = start_record(out, plan, before, usable, retry)
        waiting = [cell["name"] for cell in record["cells"] if cell["state"] == WAITING]
        console.say(_opening(plan, record, waiting, retry))
        spent: list[float] = []
        for place, (cell, entry) in enumerate(zip(plan.cells, record["cells"], strict=True), start=1):
            if entry["state"] != WAITING:
                continue
            left = _left([c for c in plan.cells if c.name in waiting[len(spent) :]], spent)
            console.say(f"== cell {place} of {len(plan.cells)}: {cell.title}{f'; about {left} left' if left else ''}")
            start = time.perf_counter()
            message = _attempt(out, plan, record, cell, images.get(cell.images_key), console, hint, argv)
            spent.append(time.perf_counter() - start)
            entry["message"] = message
            entry["state"] = DONE if message is None else FAILED
            if message is None:
                entry["figures"] = figures_of(run_of(out, cell), cell, _variance(record, cell))
            else:
                console.warn(f"{cell.title} failed: {message}")
            _write(out, record)
        pictures = draw(out, record, console)
        _write(out, record, [name for name in pictures if name.endswith(".png")])
    files = {name: str(out / name) for name in ("sweep.md", "sweep.csv", RECORD)}
    failed = [entry for entry in record["cells"] if entry["state"] == FAILED]
    if len(failed) == len(record["cells"]):
        raise InputError(
            f"None of the {len(failed)} cells could be trained; the first one: {failed[0]['message']}",
            f"All are in {out / RECORD}. Try again with --retry, or change the settings and add --overwrite.",
        )
    return {"sweep": str(out), **record, "files": {**pictures, **files}}


def begun_order(out: Path, overwrite: bool) -> list[str]:
    """The keys of the sweep in ``out`` in their order; none where there is none, or it is to be redone."""
    record = None if overwrite else read_record(out)
    return list(record["grid"]) if record else []


def _is_pending(out: Path, cell: Cell, state: str, retry: bool) -> bool:
    if state == DONE:
        return not is_done(run_of(out, cell), cell)
    return state == WAITING or retry


def _attempt(
    out: Path,
    plan: Plan,
    record: dict[str, Any],
    cell: Cell,
    images: dict[str, Any] | VqgenError | None,
    console: Console,
    hint: str,
    argv: Sequence[str],
) -> str | None:
    """Train a cell; None, or in one line why it cannot be trained."""
    if isinstance(images, VqgenError):
        return _line(str(images))
    states = {entry["name"]: entry for entry in record["cells"]}
    alike = [other for other in plan.cells if other.codec_key == cell.codec_key]
    donor = next((other for other in alike if has_codec(run_of(out, other))), None)
    if donor is None:
        lost = [other for other in alike if states[other.name]["state"] == FAILED]
        if lost:
            return f"its codec is that of {lost[0].title}, which failed: {states[lost[0].name]['message']}"
    run = run_of(out, cell)
    try:
        if donor is not None and donor is not cell:
            share_codec(run_of(out, donor), run, cell)
        train_cell(run, cell, console, hint)
    except Interrupted:
        raise
    except VqgenError as error:
        # What such a hint says of --overwrite is meant for one model; here it would redo every cell.
        return _line(error.message if "--overwrite" in error.hint else str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_of_memory(error):
            raise
        return _line(f"There is not enough memory ({error}). Lower the batch size or the model's size.")
    if argv:
        run.record_command(argv)
    return None


def train_cell(run: RunFolder, cell: Cell, console: Console, hint: str) -> None:
    """Make the run of a cell, or go on with it."""
    if not has_codec(run):
        train_codes(run, cell.config, console, resume=run.exists, hint=hint)
    for name, levels in cell.priors.items():
        train_prior(run, cell.config, name, levels, console, resume=(run.priors / name).is_dir(), hint=hint)


def share_codec(donor: RunFolder, run: RunFolder, cell: Cell) -> None:
    """Give ``run`` the codec and the codes of ``donor``; does nothing where it has them.

    The files of the codes, which nothing ever changes, are hard links where the disk has them.
    """
    if has_codec(run):
        return
    run.create()
    save_settings(run, cell.config)
    run.record_data(donor.read()["data"])
    for part, copy in (("codec", shutil.copy2), ("codes", _link)):
        with atomic_folder(run.path / part) as folder:
            ignored = shutil.ignore_patterns("checkpoints")
            shutil.copytree(donor.path / part, folder, copy_function=copy, ignore=ignored, dirs_exist_ok=True)
        run.record_stage(part, donor.stage(part) or {})


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _variance(record: dict[str, Any], cell: Cell) -> float:
    found: float = next(entry["pixel_variance"] for entry in record["images"] if entry["key"] == cell.images_key)
    return found


def _write(out: Path, record: dict[str, Any], pictures: Sequence[str] = ()) -> None:
    """The record and the tables made from it, after every cell, so that a sweep can be looked at while it runs."""
    record["best"] = best_cell(record)
    save_record(out, record)
    write_text(out / "sweep.md", to_markdown(record, pictures))
    write_text(out / "sweep.csv", to_csv(record))


def _opening(plan: Plan, record: dict[str, Any], waiting: Sequence[str], retry: bool) -> str:
    """How many cells there are, of what, and how long they will take as far as their budgets say."""
    count = len(plan.cells)
    sizes = " x ".join(f"{len(axis.values)} of {axis.key}" for axis in plan.axes)
    lines = [f"{count} {'cell' if count == 1 else 'cells'}: {sizes}; {len(waiting)} to train."]
    budget = _budget([cell for cell in plan.cells if cell.name in waiting])
    if budget:
        lines.append(f"About {duration(60 * budget)} of training, and some more for reading, evaluating and encoding.")
    if plan.shared_codecs < count:
        lines.append(
            f"{plan.shared_codecs} {'codec serves' if plan.shared_codecs == 1 else 'codecs serve'} all of them."
        )
    failed = sum(cell["state"] == FAILED for cell in record["cells"])
    if failed and not retry:
        lines.append(f"{failed} failed before and {'is' if failed == 1 else 'are'} left alone; --retry tries again.")
    return " ".join(lines)


def _budget(cells: Sequence[Cell]) -> float | None:
    """Minutes of training that the settings of ``cells`` ask for, codecs that are shared once; None where unknown."""
    budgets = [cell.config.codec.training.minutes for cell in {cell.codec_key: cell for cell in cells}.values()]
    for cell in cells:
        for name, levels in cell.priors.items():
            if registry.get(name).players:
                section = cell.config.priors.get(name, {})
                budgets += [registry.prior_settings(name, section, level).training.minutes for level in levels]
    known = [minutes for minutes in budgets if minutes is not None]
    return sum(known) if len(known) == len(budgets) else None


def _left(cells: Sequence[Cell], spent: Sequence[float]) -> str:
    """Time left for ``cells``, from what those before took, else from the budgets; empty where nothing tells."""
    if spent:
        return duration(len(cells) * sum(spent) / len(spent))
    budget = _budget(cells)
    return duration(60 * budget) if budget else ""


def _line(text: str) -> str:
    return " ".join(text.split())
