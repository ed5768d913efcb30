"""The commands that show what a run can do: sample, reconstruct, compare, diagnose."""

from __future__ import annotations

from pathlib import Path

import click

from pipelines.cli_options import (
    DATA,
    JSON,
    MINUTES,
    PLUGIN,
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
    open_run,
    options,
    print_comparison,
    print_diagnosis,
    record_command,
)


@click.command(
    "sample",
    epilog="""\b
Example: vqgen sample --prior top=transformer,bottom=pixelcnn --label 3 -n 16
         vqgen sample --from test:17 --keep left-half -n 8       extend it to the right
         vqgen sample --from photo.png --keep top -n 8           variations of a picture
         vqgen sample --from test:3 --from test:8 --interpolate -n 9
""",
)
@options(RUN, RUN_OF_PRESET)
@click.option("--prior", metavar="NAME|LEVEL=NAME,...", help="Prior of each level.  [default: the best trained]")
@click.option("--levels", type=click.IntRange(1), help="Sample and decode this many of the coarsest levels.  [all]")
@options(count_option(64, "Images to sample."))
@click.option("--label", "labels", multiple=True, metavar="NAME|INDEX", help="Class; repeatable.  [every class]")
@click.option("--temperature", metavar="T|LEVEL=T,...", help="Below 1 sharpens, 0 takes the most likely.  [1]")
@click.option("--top-k", metavar="K|LEVEL=K,...", help="Draw from the K most likely codes only.")
@click.option("--top-p", metavar="P|LEVEL=P,...", help="Draw from the most likely codes that hold mass P.")
@click.option("--guidance", metavar="G|LEVEL=G,...", help="Classifier-free guidance; 1 is none.  [1]")
@click.option("--keep-best", type=click.IntRange(1), default=1, help="Best of so many by the run's classifier.  [1]")
@click.option(
    "--from",
    "sources",
    multiple=True,
    metavar="IMAGE",
    help="Start from a picture file or the run's own SPLIT:INDEX; repeatable.",
)
@click.option(
    "--keep",
    metavar="LEVEL|REGION|MASK",
    help="What stays of it: a level and the coarser ones; left-half, right-half, top-half, bottom-half, center, "
    "border, nothing; or a picture, white where it stays.",
)
@click.option("--interpolate", is_flag=True, help="Go from the first --from to the second.")
@options(SEED)
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images drawn at once by a process."
)
@click.option("--out", "name", metavar="NAME", help="Folder under samples/ in the run.  [default: from the options]")
@click.option("--data", metavar="SOURCE", help="Where the run's images are now, if a classifier is to be trained.")
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
    keep_best: int,
    sources: tuple[str, ...],
    keep: str | None,
    interpolate: bool,
    seed: int | None,
    batch_size: int,
    name: str | None,
    data: str | None,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Sample images, or a part of given images anew: the priors level by level, then the decoder."""
    from pipelines.sample import SampleRequest, request_from_options, sample

    load_plugins(plugins)
    run = open_run(run_path, config)
    console = make_console(as_json)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}
    draft = SampleRequest(
        {},
        images=images,
        seed=seed or 0,
        batch_size=batch_size,
        sources=sources,
        keep=keep,
        interpolate=interpolate,
        keep_best=keep_best,
    )
    request = request_from_options(run, draft, prior, levels, labels, given)
    if prior is None:
        console.say("priors: " + ", ".join(f"{level} {chosen}" for level, chosen in request.priors.items()))
    record = sample(run, request, name or request.default_name(), console, data=data)
    if not record:
        return  # another process of the launcher writes
    record_command(run)
    finish(console, record, as_json, {"grid": record["grid"]}, next_step(run, run_path or config, plugins, "compare"))


@click.command("reconstruct", epilog="Example: vqgen reconstruct -n 8")
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


@click.command(
    "compare",
    epilog="""\b
Example: vqgen compare --prior transformer --prior top=transformer,bottom=pixelcnn
         vqgen compare --train --minutes 5 --prior pixelcnn --prior transformer
""",
)
@options(RUN, RUN_OF_PRESET)
@click.option(
    "--prior", "priors", multiple=True, metavar="NAME|LEVEL=NAME,...", help="A row each.  [every trained one]"
)
@options(count_option(None, "Test images read.  [all]"))
@click.option("--samples", type=click.IntRange(1), help="Images sampled for each row; 64 are shown.  [1000]")
@click.option(
    "--extractor",
    metavar="NAME",
    help="What sample quality is measured on: classifier, codec or inception.  [classifier; codec without labels]",
)
@click.option(
    "--cas/--no-cas", default=None, help="Classification accuracy score: trains a classifier a row.  [with labels]"
)
@click.option("--no-quality", is_flag=True, help="Measure nothing of the samples.")
@click.option("--train", is_flag=True, help="First train the priors that are missing, for --minutes each.")
@options(MINUTES, SET)
@options(click.option("--data", metavar="SOURCE", help="Where the run's images are now, if they were moved."))
@options(SEED, PLUGIN, JSON)
def compare_command(
    run_path: str | None,
    config: str | None,
    priors: tuple[str, ...],
    images: int | None,
    samples: int | None,
    extractor: str | None,
    cas: bool | None,
    no_quality: bool,
    train: bool,
    minutes: float | None,
    sets: tuple[str, ...],
    data: str | None,
    seed: int | None,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Every trained prior and the baselines: one table, one report."""
    from pipelines.compare import compare
    from pipelines.comparison_quality import QualityRequest
    from pipelines.comparison_training import training_request
    from pipelines.run_codes import open_store
    from pipelines.settings import parse_priors

    load_plugins(plugins)
    training = training_request(train, minutes, sets, again())
    run = open_run(run_path, config)
    console = make_console(as_json)
    levels = [level.name for level in open_store(run).info.levels]
    chosen = [parse_priors(text, levels) for text in priors]
    quality = QualityRequest(samples, extractor, cas, not no_quality)
    result = compare(
        run, chosen, console, images=images, quality=quality, training=training, seed=seed or 0, source=data
    )
    if not result:
        return  # another process of the launcher writes
    if training is not None:
        record_command(run)
    if not as_json:
        print_comparison(console, result)
    files = {"report": result["files"]["report.html"], "figures": result["files"]["compare.csv"]}
    finish(console, result, as_json, files, next_step(run, run_path or config, plugins, "diagnose"))


@click.command("diagnose", epilog="Example: vqgen diagnose --prior top=transformer,bottom=pixelcnn -n 500")
@options(RUN, RUN_OF_PRESET)
@click.option("--prior", metavar="NAME|LEVEL=NAME,...", help="Prior of each level.  [default: the best trained]")
@options(count_option(256, "Test images read, and as many training images."))
@options(click.option("--data", metavar="SOURCE", help="Where the run's images are now, if they were moved."))
@options(SEED, PLUGIN, JSON)
def diagnose_command(
    run_path: str | None,
    config: str | None,
    prior: str | None,
    images: int,
    data: str | None,
    seed: int | None,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Where a run fails, in words and pictures, and what to try."""
    from pipelines.diagnose import diagnose
    from pipelines.run_codes import open_store
    from pipelines.settings import parse_priors

    load_plugins(plugins)
    run = open_run(run_path, config)
    console = make_console(as_json)
    levels = [level.name for level in open_store(run).info.levels]
    chosen = {} if prior is None else parse_priors(prior, levels)
    result = diagnose(run, chosen, console, images=images, seed=seed or 0, source=data, plugins=plugins)
    if not as_json:
        print_diagnosis(console, result)
    finish(console, result, as_json, {"report": result["files"]["report.html"]}, "")
