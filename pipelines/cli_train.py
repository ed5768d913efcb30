"""The commands that make a run: all of it, its codec, its codes, its priors."""

from __future__ import annotations

from pathlib import Path

import click

from pipelines.cli_options import (
    AUTO_BATCH,
    COMPILE,
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
    STREAMING,
    again,
    finish,
    load_plugins,
    make_console,
    next_step,
    open_new_run,
    open_run,
    options,
    print_comparison,
    record_command,
    with_flags,
)


@click.command(
    "run",
    epilog="""\b
Example: vqgen run --config shapes
         vqgen run --data my-images/ --run runs/mine
         vqgen run --streaming --data my-shards/ --run runs/large
""",
)
@options(CONFIG, DATA, STREAMING, NEW_RUN, SET, SEED, MINUTES, OVERWRITE, COMPILE, AUTO_BATCH, PLUGIN, JSON)
def run_command(
    config: str | None,
    data: str | None,
    streaming: bool,
    run_path: str | None,
    sets: tuple[str, ...],
    seed: int | None,
    minutes: float | None,
    overwrite: bool,
    compiled: bool,
    auto_batch: bool,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """All stages of a preset, ending in the report.

    A stage that is finished is skipped, so that the same command goes on where an earlier one stopped.
    """
    from pipelines.run_all import run_all
    from pipelines.settings import every_training, training_minutes

    load_plugins(plugins)
    run, settings = open_new_run(config, data, run_path, with_flags(sets, streaming=streaming), seed, None)
    if flags := with_flags((), compiled=compiled, auto_batch=auto_batch):
        settings = every_training(settings, flags, sets)
    if minutes is not None:
        settings = training_minutes(settings, minutes)
    console = make_console(as_json)
    result = run_all(run, settings, console, overwrite=overwrite, hint=again())
    record_command(run)
    if not result:
        return  # another process of the launcher writes
    if not as_json:
        print_comparison(console, result["comparison"])
        console.result("")
        for stage, seconds in result["seconds"].items():
            console.result(f"{stage:<20} {seconds:8.1f} s")
    finish(console, result, as_json, {"samples": result["grid"], "report": result["report"]}, "")


@click.command(
    "train-codes",
    epilog="""\b
Example: vqgen train-codes --config cifar10 --set training.steps=600
         vqgen train-codes --config imagenet128 --auto-batch --compile --set training.mixed_precision=bf16
""",
)
@options(CONFIG, DATA, STREAMING, NEW_RUN, SET, SEED, MINUTES, RESUME, OVERWRITE, COMPILE, AUTO_BATCH, PLUGIN, JSON)
def train_codes_command(
    config: str | None,
    data: str | None,
    streaming: bool,
    run_path: str | None,
    sets: tuple[str, ...],
    seed: int | None,
    minutes: float | None,
    resume: bool,
    overwrite: bool,
    compiled: bool,
    auto_batch: bool,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train the codec, then encode the data with it."""
    from pipelines.train_codes import train_codes

    load_plugins(plugins)
    sets = with_flags(sets, streaming=streaming, compiled=compiled, auto_batch=auto_batch)
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


@click.command(
    "encode",
    epilog="""\b
Example: vqgen encode --data my-images/ --out my-codes
         vqgen encode --streaming --data my-shards/ --out my-codes
""",
)
@options(RUN, RUN_OF_PRESET, click.option("--data", required=True, metavar="SOURCE", help="Images to encode."))
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the codes.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Images encoded at once by a process."
)
@options(STREAMING, JSON)
def encode_command(
    run_path: str | None, config: str | None, data: str, out: Path, batch_size: int, streaming: bool, as_json: bool
) -> None:
    """Encode more images with a trained codec."""
    from pipelines.encode import encode

    run = open_run(run_path, config)
    console = make_console(as_json)
    figures = encode(run, data, out, console, batch_size, streaming=streaming)
    finish(console, {"out": str(out), **figures}, as_json, {"codes": out}, "")


@click.command("train-prior", epilog="Example: vqgen train-prior --prior transformer --level top --minutes 5")
@click.option(
    "--prior", required=True, metavar="NAME|LEVEL=NAME,...", help="One of `vqgen priors`, or one for each level named."
)
@click.option(
    "--level", "levels", multiple=True, metavar="LEVEL", help="top, middle or bottom.  [default: every level]"
)
@options(RUN, RUN_OF_PRESET)
@options(SET, SEED, MINUTES, RESUME, OVERWRITE, COMPILE, AUTO_BATCH, PLUGIN, JSON)
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
    compiled: bool,
    auto_batch: bool,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a prior over the codes, level by level."""
    from pipelines.settings import prior_mix, prior_settings_of_run
    from pipelines.train_prior import Job, train_priors

    load_plugins(plugins)
    run = open_run(run_path, config)
    going_on = resume and not overwrite
    sets = with_flags(sets, compiled=compiled, auto_batch=auto_batch)
    jobs = [
        Job(name, prior_settings_of_run(run, name, own, sets, seed=seed, minutes=minutes, resume=going_on), own)
        for name, own in prior_mix(run, prior, levels, sets).items()
    ]
    console = make_console(as_json)
    records = train_priors(run, jobs, console, resume=resume, overwrite=overwrite, hint=again())
    record_command(run)
    trained = {level: job.name for level in records for job in jobs if not job.levels or level in job.levels}
    finish(
        console,
        {"run": str(run.path), "prior": prior, "levels": records},
        as_json,
        {f"{name}, {level}": run.prior(name, level) for level, name in trained.items()},
        next_step(run, run_path or config, plugins),
    )
