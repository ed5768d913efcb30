"""``vqgen evaluate``: the codec alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.cli_options import (
    JSON,
    RUN,
    RUN_OF_PRESET,
    count_option,
    finish,
    make_console,
    next_step,
    open_run,
    options,
)

if TYPE_CHECKING:
    from vqgen.console import Console


@click.command(
    "evaluate",
    epilog="""\b
Example: vqgen evaluate -n 2000
         vqgen evaluate --data photos/ --extractor codec --out photos-evaluated
""",
)
@options(RUN, RUN_OF_PRESET)
@click.option("--data", metavar="SOURCE", help="Other images, resized; or where the run's own are now.")
@click.option("--split", default="test", show_default=True, help="train, validation or test.")
@options(count_option(None, "Images measured.  [all]"))
@click.option(
    "--extractor",
    metavar="NAME",
    help="Features of the Frechet distance: classifier, codec or inception.  [classifier where labelled, else codec]",
)
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Folder.  [default: evaluate in the run]")
@options(JSON)
def evaluate_command(
    run_path: str | None,
    config: str | None,
    data: str | None,
    split: str,
    images: int | None,
    extractor: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """The codec alone: how near reconstructions come, how its codes are used."""
    from pipelines.evaluate import evaluate

    run = open_run(run_path, config)
    console = make_console(as_json)
    result = evaluate(run, console, source=data, split=split, images=images, extractor=extractor, out=out)
    if not result:
        return  # another process of the launcher writes
    if not as_json:
        print_evaluation(console, result)
    made = {name.partition(".")[0].replace("_", " "): path for name, path in result["files"].items()}
    finish(console, result, as_json, made, next_step(run, run_path or config))


def print_evaluation(console: Console, result: Mapping[str, Any]) -> None:
    """The figures as two tables and a few lines."""
    title = f"{result['images']:,} {result['split']} images"
    rows = [
        [levels, f"{found['mse']:.5f}", found["nmse"], f"{found['psnr']:.2f}", f"{found['ssim']:.4f}"]
        for levels, found in result["reconstruction"].items()
    ]
    console.table(title, ["levels", "mse", "normalised mse", "PSNR (dB)", "SSIM"], rows)
    console.table(
        "codes",
        ["level", "codes", "perplexity", "never used", "entropy (bits)", "log2 K"],
        [_code_row(level, found) for level, found in result["codes"].items()],
    )
    for found in result["codes"].values():
        console.result(found["verdict"])
    for line in summary(result):
        console.result(line)


def _code_row(level: str, found: Mapping[str, Any]) -> list[Any]:
    from math import log2

    size = found["codebook_size"]
    return [level, size, f"{found['perplexity']:.1f}", found["dead"], found["entropy_bits"], log2(size)]


def summary(result: Mapping[str, Any]) -> list[str]:
    """The figures that are one number, a sentence each."""
    lines = []
    bits = result["bits"]
    uniform, entropy = bits["uniform"], bits["entropy"]
    ratio = f", {uniform['ratio']:.1f} times fewer than raw" if uniform["ratio"] else ""
    lines.append(
        f"An image's codes take {uniform['bits_per_image']:,.0f} bits at log2 K{ratio}; "
        f"{entropy['bits_per_image']:,.0f} at the entropy of their use."
    )
    if result["decoder_bits_per_dim"] is not None:
        lines.append(f"The decoder leaves {result['decoder_bits_per_dim']:.3f} bits/dim, given the codes.")
    frechet = result["frechet"]
    if frechet is not None:
        anchor = ""
        if frechet["training_images"] is not None:
            anchor = f"; {frechet['training_images_count']:,} training images: {frechet['training_images']:.4g}"
        lines.append(
            f"Frechet distance of the reconstructions: {frechet['reconstructions']:.4g} "
            f"(features: {frechet['extractor']}, {frechet['images']:,} images{anchor})."
        )
    return lines
