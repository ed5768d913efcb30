"""The command that scores given images: ``vqgen score``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from pipelines.cli_options import (
    JSON,
    PLUGIN,
    RUN,
    RUN_OF_PRESET,
    count_option,
    finish,
    load_plugins,
    make_console,
    next_step,
    open_run,
    options,
    record_command,
)

if TYPE_CHECKING:
    from pipelines.scoring.bits import LabelUse
    from vqgen.console import Console

SHOWN = ("histograms.png", "roc.png", "maps.png", "scores.csv", "against.csv", "scores.json")


@click.command(
    "score",
    epilog="""\b
Example: vqgen score --maps                                   the run's own test images
         vqgen score --data new-images/ --label none -n 500
         vqgen score --against odd-images/                    how well outliers are told from them
""",
)
@options(RUN, RUN_OF_PRESET)
@click.option("--data", metavar="SOURCE", help="Images to score: folder, parquet, .npy, hub name...  [the run's own]")
@click.option("--split", metavar="SPLIT", help="train, validation, test or all.  [test, or all without one]")
@options(count_option(None, "Images of each set.  [all]"))
@click.option("--prior", metavar="NAME|LEVEL=NAME,...", help="Prior of each level.  [default: the best trained]")
@click.option(
    "--label",
    type=click.Choice(["marginal", "given", "none"]),
    help="Sum over classes, take the images' own, or do without.  [marginal up to 20 classes]",
)
@click.option(
    "--baseline", default="unigram", show_default=True, metavar="NAME|...", help="Prior that the ratio is taken to."
)
@click.option("--against", metavar="SOURCE", help="Outliers: AUROC of every score against them.")
@click.option("--maps", is_flag=True, help="Draw the bits of each code over the image.")
@click.option("--out", "name", metavar="NAME", help="Folder under scores/ in the run.  [default: from the options]")
@options(PLUGIN, JSON)
def score_command(
    run_path: str | None,
    config: str | None,
    data: str | None,
    split: str | None,
    images: int | None,
    prior: str | None,
    label: LabelUse | None,
    baseline: str,
    against: str | None,
    maps: bool,
    name: str | None,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """How likely given images are: bits of each level and pixel, corrected scores, and outlier detection."""
    from pipelines.score import ScoreRequest, score

    load_plugins(plugins)
    run = open_run(run_path, config)
    console = make_console(as_json)
    request = ScoreRequest(data, split, against, images, prior, baseline, label, maps)
    record = score(run, request, name or request.default_name(), console)
    if not record:
        return  # another process of the launcher writes
    record_command(run)
    if not as_json:
        print_scores(console, record)
    further = "compare" if maps or against else "score --maps"
    made = {name: path for name, path in record["files"].items() if name in SHOWN}
    finish(console, record, as_json, made, next_step(run, run_path or config, plugins, further))


def print_scores(console: Console, record: Any) -> None:
    """The table of detection, or of the one set's scores."""
    from pipelines.scoring.tables import detection_lines, summary_lines

    titles = [f"{found['source']}, {found['split']}: {found['images']:,} images" for found in record["sets"]]
    if record["detection"] is None:
        console.table(titles[0], *summary_lines(record["sets"][0]))
    else:
        console.table(f"{titles[0]}; outliers: {titles[1]}", *detection_lines(record["detection"]))
    if record["likelihood"] == "bound":
        draws = record["provenance"]["estimator_samples"]
        console.result(f"The bits of the codes are upper bounds (<=), from {draws} draws.")
