"""The commands that store images as codes: compress, decompress."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from pipelines.cli_options import (
    DATA,
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
)


@click.command(
    "compress",
    epilog="""\b
Example: vqgen compress --prior top=transformer,bottom=pixelcnn -n 1000 --out test.vqgen
         vqgen compress --data my-images/ --split all --out mine.vqgen
""",
)
@options(RUN, RUN_OF_PRESET, DATA)
@click.option("--split", default="test", show_default=True, help="train, validation, test or all.")
@options(count_option(None, "Images, from the first on.  [all]"))
@click.option("--prior", metavar="NAME|LEVEL=NAME,...", help="Prior of each level.  [default: the best trained]")
@click.option("--no-labels", is_flag=True, help="Code without labels; needs priors trained with label dropout.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=64, show_default=True, help="Images coded at once.")
@click.option("--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="File to write.")
@options(PLUGIN, JSON)
def compress_command(
    run_path: str | None,
    config: str | None,
    data: str | None,
    split: str,
    images: int | None,
    prior: str | None,
    no_labels: bool,
    batch_size: int,
    out: Path,
    plugins: tuple[str, ...],
    as_json: bool,
) -> None:
    """Images to one small file of entropy-coded codes."""
    from pipelines.compress import compress
    from pipelines.compression.coder import library
    from pipelines.settings import parse_priors, run_settings
    from vqgen.codes import level_names

    library()
    load_plugins(plugins)
    run = open_run(run_path, config)
    console = make_console(as_json)
    levels = level_names(len(run_settings(run).codec.strides))
    record = compress(
        run,
        out,
        console,
        chosen=None if prior is None else parse_priors(prior, levels),
        source=data,
        split=split,
        images=images,
        labels=not no_labels,
        batch_size=batch_size,
    )
    if not as_json:
        console.table("", ["part", "bytes", "bits/image", "share"], _parts(record))
        console.result(_summary(record))
    restore = f"decompress {shlex.quote(str(out))} --out {shlex.quote(str(out.with_suffix('')) + '-images')}"
    finish(console, record, as_json, {"file": out}, next_step(run, run_path or config, plugins, restore))


def _parts(record: dict[str, Any]) -> list[list[Any]]:
    """What the bytes of the file are for."""
    names = {
        "codes": "codes: " + ", ".join(f"{level} {prior['name']}" for level, prior in record["priors"].items()),
        "labels": "labels",
        "integers": "probabilities as whole numbers",
        "checks": "checksum of each image",
        "coder": "rounding of the coder",
        "header": "header and checksums",
    }
    total, images = 8 * record["bytes"], max(record["images"], 1)
    return [
        [name, _plain(bits / 8, 1), _plain(bits / images, 2), f"{_plain(100 * bits / total, 2)} %"]
        for name, bits in ((name, record["bits"][key]) for key, name in names.items())
    ]


def _plain(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # adding 0 makes of -0 a 0


def _summary(record: dict[str, Any]) -> str:
    if not record["images"]:
        return f"No images; {record['bytes']:,} bytes."
    parts = [
        f"{record['images']:,} images in {record['bytes']:,} bytes: {record['bytes_per_image']:.2f} bytes an image, "
        f"{record['bits_per_pixel']:.4f} bits/pixel, 1/{record['ratio']:.1f} of the 8-bit pixels, "
        f"PSNR {record['psnr']:.2f} dB."
    ]
    if record["overhead"] is not None:
        own = f"{record['prior_bits_per_image']:.2f} bits an image"
        parts.append(
            f"The priors' own bits{' and the labels' if record['bits']['labels'] else ''}: {own}; "
            f"the file is {100 * record['overhead']:.2f} % larger."
        )
    return "\n".join(parts)


@click.command("decompress", epilog="Example: vqgen decompress test.vqgen --out test-images")
@click.argument("file", type=click.Path(path_type=Path))
@options(RUN, RUN_OF_PRESET)
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write.")
@options(PLUGIN, JSON)
def decompress_command(
    file: Path, run_path: str | None, config: str | None, out: Path, plugins: tuple[str, ...], as_json: bool
) -> None:
    """A compressed file back to pictures and their exact codes."""
    from pipelines.compression.coder import library
    from pipelines.decompress import decompress

    library()
    load_plugins(plugins)
    run = open_run(run_path, config)
    console = make_console(as_json)
    record = decompress(file, out, run, console)
    if not as_json:
        console.result(f"{record['images']:,} images, every code as it was written.")
    made = {"images": out, "codes": out / "codes.safetensors"}
    finish(console, record, as_json, made, next_step(run, run_path or config, plugins))
