"""The ``vqgen`` command line: parse, call a stage, say what it made and what to do next.

Stages are imported inside the commands, so that ``vqgen --help`` answers without loading torch. Results go to
stdout, progress and errors to stderr. Exit codes: 0 done, 1 an unexpected failure, 2 something the user can put
right, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pipelines.cli_options import (
    CONFIG,
    DATA,
    JSON,
    MINUTES,
    NEW_RUN,
    OVERWRITE,
    PLUGIN,
    RESUME,
    RUN,
    RUN_OF_PRESET,
    SEED,
    SET,
    again,
    count_option,
    finish,
    load_plugins,
    make_console,
    next_step,
    open_new_run,
    open_run,
    options,
    print_comparison,
    record_command,
)
from vqgen import __version__
from vqgen.errors import Interrupted, VqgenError

SHARED = ("run", "train-codes", "train-prior")
"""Commands whose work is shared by all processes of a launcher."""


class Commands(click.Group):
    """Lists the commands in the order in which they are used, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def run() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(call(sys.argv[1:]))


def call(arguments: Sequence[str]) -> int:
    """The exit code of a command line; errors that the user can put right are one line on stderr.

    Under a launcher, what is not training is done by the first process alone.
    """
    if arguments and arguments[0] not in SHARED and os.environ.get("RANK", "0") != "0":
        return 0
    try:
        cli.main(list(arguments), prog_name="vqgen", standalone_mode=False, obj=list(arguments))
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except VqgenError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"Interrupted. {again(arguments) if arguments[0] in SHARED else ''}".rstrip(), err=True)
        return Interrupted.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        place = f" ({error.filename})" if error.filename else ""
        click.echo(f"Error: {error.strerror}{place}. Free some space or choose another folder with --run.", err=True)
        return VqgenError.exit_code
    return 0


@click.group(cls=Commands, epilog="Start with: vqgen run --config shapes", context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="vqgen")
def cli() -> None:
    """Turn images into discrete codes, learn a density over the codes, sample from it, and compare priors."""


@cli.command("run", epilog="Example: vqgen run --config shapes")
@options(CONFIG, DATA, NEW_RUN, SET, SEED, MINUTES, OVERWRITE, PLUGIN, JSON)
def run_command(
    config: str | None,
    data: str | None,
    run_path: str | None,
    sets: tuple[str, ...],
    seed: int | None,
    minutes: float | None,
    overwrite: bool,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """All stages of a preset, ending in the report.

    A stage that is finished is skipped, so that the same command goes on where an earlier one stopped.
    """
    from pipelines.run_all import run_all
    from pipelines.settings import training_minutes

    load_plugins(plugins)
    run, settings = open_new_run(config, data, run_path, sets, seed, None)
    if minutes is not None:
        settings = training_minutes(settings, minutes)
    console = make_console(as_json)
    result = run_all(run, settings, console, overwrite=overwrite, hint=again())
    record_command(run)
    if not result:
        return  # another process of the launcher samples and compares
    if not as_json:
        print_comparison(console, result["comparison"])
        console.result("")
        for stage, seconds in result["seconds"].items():
            console.result(f"{stage:<20} {seconds:8.1f} s")
    finish(console, result, as_json, {"samples": result["grid"], "report": result["report"]}, "")


@cli.command("train-codes", epilog="Example: vqgen train-codes --config cifar10 --set training.steps=600")
@options(CONFIG, DATA, NEW_RUN, SET, SEED, MINUTES, RESUME, OVERWRITE, PLUGIN, JSON)
def train_codes_command(
    config: str | None,
    data: str | None,
    run_path: str | None,
    sets: tuple[str, ...],
    seed: int | None,
    minutes: float | None,
    resume: bool,
    overwrite: bool,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train the codec, then encode the data with it."""
    from pipelines.train_codes import train_codes

    load_plugins(plugins)
    run, settings = open_new_run(config, data, run_path, sets, seed, minutes, short_for="codec")
    console = make_console(as_json)
    record = train_codes(run, settings, console, resume=resume, overwrite=overwrite, hint=again())
    record_command(run)
    finish(
        console,
        {"run": str(run.path), **record},
        as_json,
        {"codec": run.codec, "codes": run.codes},
        next_step(run, run_path or config or data),
    )


@cli.command("encode", epilog="Example: vqgen encode --data my-images/ --out my-codes")
@options(RUN, RUN_OF_PRESET, click.option("--data", required=True, metavar="SOURCE", help="Images to encode."))
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the codes.")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@options(JSON)
def encode_command(
    run_path: str | None, config: str | None, data: str, out: Path, batch_size: int, as_json: bool
) -> None:
    """Encode more images with a trained codec."""
    from pipelines.encode import encode

    run = open_run(run_path, config)
    console = make_console(as_json)
    figures = encode(run, data, out, console, batch_size)
    finish(console, {"out": str(out), **figures}, as_json, {"codes": out}, "")


@cli.command("train-prior", epilog="Example: vqgen train-prior --prior transformer --level top --minutes 5")
@click.option("--prior", required=True, metavar="NAME", help="One of `vqgen priors`.")
@click.option(
    "--level", "levels", multiple=True, metavar="LEVEL", help="top, middle or bottom.  [default: every level]"
)
@options(RUN, RUN_OF_PRESET)
@options(SET, SEED, MINUTES, RESUME, OVERWRITE, PLUGIN, JSON)
def train_prior_command(
    prior: str,
    levels: tuple[str, ...],
    run_path: str | None,
    config: str | None,
    sets: tuple[str, ...],
    seed: int | None,
    minutes: float | None,
    resume: bool,
    overwrite: bool,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a prior over the codes, level by level."""
    from pipelines.settings import prior_settings_of_run
    from pipelines.train_prior import train_prior

    load_plugins(plugins)
    run = open_run(run_path, config)
    settings = prior_settings_of_run(
        run, prior, levels, sets, seed=seed, minutes=minutes, resume=resume and not overwrite
    )
    console = make_console(as_json)
    records = train_prior(run, settings, prior, levels, console, resume=resume, overwrite=overwrite, hint=again())
    record_command(run)
    finish(
        console,
        {"run": str(run.path), "prior": prior, "levels": records},
        as_json,
        {f"{prior}, {level}": run.prior(prior, level) for level in records},
        next_step(run, run_path or config, plugins),
    )


@cli.command("sample", epilog="Example: vqgen sample --prior top=transformer,bottom=pixelcnn --label 3 -n 16")
@options(RUN, RUN_OF_PRESET)
@click.option("--prior", metavar="NAME|LEVEL=NAME,...", help="Prior of each level.  [default: the best trained]")
@click.option("--levels", type=click.IntRange(1), help="Sample and decode this many of the coarsest levels.  [all]")
@options(count_option(64, "Images to sample."))
@click.option("--label", "labels", multiple=True, metavar="NAME|INDEX", help="Class; repeatable.  [every class]")
@click.option("--temperature", metavar="T|LEVEL=T,...", help="Below 1 sharpens, 0 takes the most likely.  [1]")
@click.option("--top-k", metavar="K|LEVEL=K,...", help="Draw from the K most likely codes only.")
@click.option("--top-p", metavar="P|LEVEL=P,...", help="Draw from the most likely codes that hold mass P.")
@click.option("--guidance", metavar="G|LEVEL=G,...", help="Classifier-free guidance; 1 is none.  [1]")
@options(SEED)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--out", "name", metavar="NAME", help="Folder under samples/ in the run.  [default: prior and seed]")
@options(PLUGIN, JSON)
def sample_command(
    run_path: str | None,
    config: str | None,
    prior: str | None,
    levels: int | None,
    images: int,
    labels: tuple[str, ...],
    temperature: str | None,
    top_k: str | None,
    top_p: str | None,
    guidance: str | None,
    seed: int | None,
    batch_size: int,
    name: str | None,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Sample images: the priors level by level, then the decoder."""
    from pipelines.sample import request_from_options, sample

    load_plugins(plugins)
    run = open_run(run_path, config)
    console = make_console(as_json)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    request = request_from_options(run, prior, levels, images, labels, given, seed or 0, batch_size)
    if prior is None:
        console.say("priors: " + ", ".join(f"{level} {chosen}" for level, chosen in request.priors.items()))
    record = sample(run, request, name or request.default_name(), console)
    record_command(run)
    finish(console, record, as_json, {"grid": record["grid"]}, next_step(run, run_path or config, plugins, "compare"))


@cli.command("reconstruct", epilog="Example: vqgen reconstruct -n 8")
@options(
    RUN,
    RUN_OF_PRESET,
    DATA,
    click.option("--split", default="validation", show_default=True, help="train, validation or test."),
)
@options(count_option(8, "Images to draw."))
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder.  [default: reconstruct in the run]"
)
@options(JSON)
def reconstruct_command(
    run_path: str | None, config: str | None, data: str | None, split: str, images: int, out: Path | None, as_json: bool
) -> None:
    """Originals beside their reconstructions, level by level."""
    from pipelines.reconstruct import reconstruct

    run = open_run(run_path, config)
    console = make_console(as_json)
    record = reconstruct(run, data, split, images, out, console)
    if not as_json:
        rows = [[level, f"{f['mse']:.5f}", f"{f['psnr']:.2f}"] for level, f in record["levels"].items()]
        console.table("", ["levels", "mse", "PSNR (dB)"], rows)
    finish(console, record, as_json, {"grid": record["grid"]}, next_step(run, run_path or config))


@cli.command("compare", epilog="Example: vqgen compare --prior transformer --prior top=transformer,bottom=pixelcnn")
@options(RUN, RUN_OF_PRESET)
@click.option(
    "--prior", "priors", multiple=True, metavar="NAME|LEVEL=NAME,...", help="A row each.  [every trained one]"
)
@options(count_option(None, "Test images read.  [all]"))
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="Images sampled for each row.")
@options(click.option("--data", metavar="SOURCE", help="Where the run's images are now, if they were moved."))
@options(SEED, PLUGIN, JSON)
def compare_command(
    run_path: str | None,
    config: str | None,
    priors: tuple[str, ...],
    images: int | None,
    samples: int,
    data: str | None,
    seed: int | None,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Every trained prior and the baselines: one table, one report."""
    from pipelines.compare import compare
    from pipelines.run_codes import open_store
    from pipelines.settings import parse_priors

    load_plugins(plugins)
    run = open_run(run_path, config)
    console = make_console(as_json)
    levels = [level.name for level in open_store(run).info.levels]
    chosen = [parse_priors(text, levels) for text in priors]
    result = compare(run, chosen, console, images=images, samples=samples, seed=seed or 0, source=data)
    if not as_json:
        print_comparison(console, result)
    finish(console, result, as_json, {"report": result["files"]["report.html"]}, "")


@cli.command("info", epilog="Example: vqgen info --run runs/shapes")
@options(RUN, RUN_OF_PRESET, JSON)
def info_command(run_path: str | None, config: str | None, as_json: bool) -> None:
    """What a run holds, and what to do next."""
    from pipelines.info import info

    run = open_run(run_path, config)
    console = make_console(as_json)
    record = info(run)
    if not as_json:
        console.result(f"{record['run']}: {record['data'] or 'no data yet'}")
        console.table("", ["part", "steps", "minutes", "validation"], record["table"])
    finish(console, record, as_json, {}, next_step(run, run_path or config))


@cli.command("priors", epilog="Example: vqgen priors --plugin my_prior.py")
@options(PLUGIN, JSON)
def priors_command(plugins: tuple[str, ...], as_json: bool) -> None:
    """The priors there are, one line each."""
    from priors import registry

    load_plugins(plugins)
    found = [registry.get(name) for name in registry.names()]
    record = [{"name": kind.name, "likelihood": kind.likelihood, "summary": kind.summary} for kind in found]
    console = make_console(as_json)
    if not as_json:
        console.table("", ["prior", "likelihood", ""], [[r["name"], r["likelihood"], r["summary"]] for r in record])
    finish(console, record, as_json, {}, "vqgen train-prior --prior NAME")


@cli.command("presets", epilog="Example: vqgen presets")
@options(JSON)
def presets_command(as_json: bool) -> None:
    """The presets there are, one line each."""
    from vqgen.presets import preset_names, preset_summary

    record = [{"name": name, "summary": preset_summary(name)} for name in preset_names()]
    console = make_console(as_json)
    if not as_json:
        console.table("", ["preset", ""], [[r["name"], r["summary"]] for r in record])
    finish(console, record, as_json, {}, "vqgen run --config NAME")
