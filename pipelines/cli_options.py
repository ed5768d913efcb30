"""What the commands share: options, finding the run, and saying what was made and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipelines.launcher import launched
from vqgen.errors import InputError

if TYPE_CHECKING:
    from vqgen.config import Config
    from vqgen.console import Console
    from vqgen.run_folder import RunFolder

F = TypeVar("F", bound=Callable[..., Any])


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in the order given."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


RUN = click.option("--run", "run_path", metavar="DIR", help="Run folder.  [default: the only one in runs/]")
NEW_RUN = click.option("--run", "run_path", metavar="DIR", help="Run folder.  [default: runs/<preset>]")
CONFIG = click.option("--config", metavar="NAME|FILE", help="Preset or YAML file.  [default: shapes]")
RUN_OF_PRESET = click.option("--config", metavar="NAME", help="Preset that names the run in runs/.")
DATA = click.option("--data", metavar="SOURCE", help="Folder, parquet, .tar, .npy, .npz, saved set, or hub name.")
SET = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a setting; repeatable.")
SEED = click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of everything random.  [default: 0]")
MINUTES = click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), help="Training budget of each model, in minutes."
)
COMPILE = click.option(
    "--compile", "compiled", is_flag=True, help="Compile what is trained (torch.compile); slow to start, may be faster."
)
STREAMING = click.option(
    "--streaming", is_flag=True, help="Read shards, here or on the hub, as they are needed; nothing is copied."
)
AUTO_BATCH = click.option(
    "--auto-batch", is_flag=True, help="Where a batch does not fit into memory, work through it in parts that do."
)
RESUME = click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Redo the stage, and remove what was made from it.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and only that.")
PLUGIN = click.option("--plugin", "plugins", multiple=True, metavar="FILE.py", help="Load a prior; repeatable.")


def count_option(default: int | None, text: str) -> Callable[[F], F]:
    return click.option("-n", "images", type=click.IntRange(1), default=default, show_default=True, help=text)


def with_flags(
    sets: Sequence[str], *, streaming: bool = False, compiled: bool = False, auto_batch: bool = False
) -> tuple[str, ...]:
    """The assignments given, and before them those that flags stand for, so that ``--set`` has the last word."""
    flags = {"data.streaming": streaming, "training.compile": compiled, "training.auto_batch": auto_batch}
    return (*(f"{key}=true" for key, given in flags.items() if given), *sets)


def load_plugins(plugins: Sequence[str]) -> None:
    from priors import registry

    for path in plugins:
        registry.load_plugin(Path(path))


def open_new_run(
    config: str | None,
    data: str | None,
    run_path: str | None,
    sets: Sequence[str],
    seed: int | None,
    minutes: float | None,
    short_for: str | None = None,
) -> tuple[RunFolder, Config]:
    """The run of a command that may make it, and its settings: its own where it is there and no preset is named."""
    from pipelines.settings import changed_run_settings, new_run_settings
    from vqgen.run_folder import RunFolder, run_for

    run = RunFolder(run_for(run_path, config, data))
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"{run.path} is a file.", "Name a folder with --run.")
    if run.config.is_file() and config is None:
        return run, changed_run_settings(run, sets, source=data, seed=seed, minutes=minutes, short_for=short_for)
    return run, new_run_settings(config, data, sets, seed=seed, minutes=minutes, short_for=short_for)


def open_run(run_path: str | None, config: str | None = None) -> RunFolder:
    from vqgen.run_folder import RunFolder, find_run

    return RunFolder(find_run(run_path, config))


def record_command(run: RunFolder) -> None:
    """Note the command line in the run's record."""
    from vqgen.console import first_process

    if first_process():
        run.record_command(["vqgen", *click.get_current_context().obj])


def make_console(as_json: bool) -> Console:
    from vqgen.console import Console, first_process

    # Under a launcher every process runs the command; the first one speaks.
    return Console(quiet=as_json, silent=not first_process())


def again(arguments: Sequence[str] | None = None) -> str:
    """The sentence that says how to go on after an interrupt: the same command line, resumed."""
    typed = click.get_current_context().obj if arguments is None else arguments
    kept = [argument for argument in typed if argument not in ("--overwrite", "--retry")]
    resume = [] if kept[0] in ("run", "sweep", "compare", "encode", "sample") or "--resume" in kept else ["--resume"]
    launcher = f"the same launcher, {launched()} processes, and " if launched() > 1 else ""
    return f"Go on with: {launcher}vqgen {shlex.join([*kept, *resume])}"


def next_step(run: RunFolder, named: str | None, plugins: Sequence[str] = (), command: str = "") -> str:
    """The next command as it is to be typed: ``--run`` where this one named its run or there are several."""
    from pipelines.info import next_command

    several = len(list(run.path.parent.glob("*/run.json"))) > 1
    text = command or next_command(run)
    line = run.command(text) if named or several else f"vqgen {text}"
    return shlex.join([*shlex.split(line), *(part for plugin in plugins for part in ("--plugin", plugin))])


def print_comparison(console: Console, result: Any) -> None:
    from pipelines.comparison_rows import highlights
    from pipelines.report.tables import summary

    for title, columns, cells in summary(result):
        console.table(title, columns, cells)
        console.result("")
    for sentence in highlights(result["rows"]):
        console.result(sentence)


def print_diagnosis(console: Console, result: Any) -> None:
    from pipelines.report.diagnosis import WORDS

    lines = []
    for found in result["findings"]:
        part = found["part"] if found["level"] == "all" else f"{found['part']}, {found['level']}"
        lines.append([part, found["check"], WORDS[found["state"]]])
    console.table("", ["part", "check", "verdict"], lines)
    console.result(result["summary"])
    for cure in result["cures"]:
        console.result(f"try: {cure['text']} (Because {cure['fault']}.)")
        if cure["command"]:
            console.result(f"  {cure['command']}")


def finish(console: Console, record: Any, as_json: bool, made: dict[str, Any], next_step: str) -> None:
    """Print the record as JSON, or where the output is and the next command to run."""
    if as_json:
        console.json(record)
        return
    for name, path in made.items():
        console.result(f"{name}: {path}")
    if next_step:
        console.result(f"next: {next_step}")
