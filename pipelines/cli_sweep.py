"""The command that trains a grid of runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from pipelines.cli_options import (
    CONFIG,
    DATA,
    JSON,
    MINUTES,
    PLUGIN,
    SEED,
    SET,
    again,
    finish,
    load_plugins,
    make_console,
    next_step,
    options,
)

SWEEPS = Path("sweeps")


@click.command("sweep", epilog="Example: vqgen sweep --grid codec.commitment=0.25,1 --grid codec.codebook_size=64,128")
@click.option(
    "--grid",
    "grid",
    multiple=True,
    required=True,
    metavar="KEY=VALUE,...",
    help="A setting and its values; repeatable. Lists as values stand in brackets.",
)
@options(CONFIG, DATA)
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Sweep folder.  [default: sweeps/<preset>]")
@click.option(
    "--prior",
    "priors",
    multiple=True,
    metavar="NAME|LEVEL=NAME,...",
    help="Train this prior in every cell; repeatable.",
)
@options(SET, SEED, MINUTES)
@click.option("--overwrite", is_flag=True, help="Redo all cells.")
@click.option("--retry", is_flag=True, help="Try failed cells again.")
@options(PLUGIN, JSON)
def sweep_command(
    grid: tuple[str, ...],
    config: str | None,
    data: str | None,
    out: Path | None,
    priors: tuple[str, ...],
    sets: tuple[str, ...],
    seed: int | None,
    minutes: float | None,
    overwrite: bool,
    retry: bool,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a grid over any settings, ending in a table and pictures of all runs.

    Cells that are finished are skipped, so that the same command goes on where an earlier one stopped. A cell that
    fails is noted, and the rest go on.
    """
    from pipelines.sweep import begun_order, sweep
    from pipelines.sweep_grid import make_plan
    from pipelines.sweep_table import sentences, summary
    from vqgen.run_folder import RunFolder, run_for

    load_plugins(plugins)
    folder = out or SWEEPS / run_for(None, config, data).name
    order = begun_order(folder, overwrite)
    plan = make_plan(grid, config, data, sets, priors=priors, seed=seed, minutes=minutes, order=order)
    console = make_console(as_json)
    argv = ["vqgen", *click.get_current_context().obj]
    record = sweep(folder, plan, console, overwrite=overwrite, retry=retry, hint=again(), argv=argv)
    if not as_json:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None  # a pipe takes lines of any length
        console.table("", *summary(record, width))
        for sentence in sentences(record):
            console.result(sentence)
    runs = {cell["name"]: folder / cell["run"] for cell in record["cells"]}
    best = RunFolder(runs[record["best"]]) if record["best"] else None
    made = {"table": record["files"]["sweep.md"], "curves": record["files"].get("curves.png", "")}
    finish(
        console,
        record,
        as_json,
        {name: path for name, path in made.items() if path},
        next_step(best, str(best.path), plugins) if best else "",
    )
