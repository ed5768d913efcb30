"""What a sweep measures: the figures of a cell, the curves of all cells, and the pictures made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.report.sweep_charts import Curve, HeatMap, Panel, heat_maps_chart, overlay_chart
from pipelines.report.theme import Format
from pipelines.sweep_grid import Cell, short_keys, text_of
from pipelines.sweep_record import DONE
from pipelines.sweep_table import NMSE, Column, bits, figure, levels_of, perplexity, priors_of, same_codec
from vqgen.config import Config
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.errors import VqgenError
from vqgen.files import write_bytes
from vqgen.metrics import nmse, pixel_variance
from vqgen.run_folder import RunFolder
from vqgen.sampler import evaluation_batches
from vqgen.training_log import read_metrics

BATCH = 128
KINDS: tuple[Format, ...] = ("png", "svg")


def measure_images(cells: Iterable[Cell], console: Console) -> dict[str, dict[str, Any] | VqgenError]:
    """Variance of the validation images that each cell's codec is measured on, by the cell's ``images_key``.

    Images that cannot be used are an error in the place of figures.

    Raises:
        VqgenError: none of the cells has images that can be used.
    """
    found: dict[str, dict[str, Any] | VqgenError] = {}
    for key, config in {cell.images_key: cell.config for cell in cells}.items():
        try:
            found[key] = {"key": key, **_measured(config, console)}
        except VqgenError as error:
            found[key] = error
    errors = [entry for entry in found.values() if isinstance(entry, VqgenError)]
    if errors and len(errors) == len(found):
        raise errors[0]
    return found


def _measured(config: Config, console: Console) -> dict[str, Any]:
    data = load_data(config.data, config.seed, notify=console.say, splits=("train", "validation"))
    validation = data.splits["validation"]
    batches = evaluation_batches(validation, config.codec.training.evaluate_images, BATCH)
    images = []
    with console.progress("validation images", min(len(validation), config.codec.training.evaluate_images)) as progress:
        for batch in batches:
            images.append(batch["images"])
            progress.advance(len(batch["images"]))
    return {
        "source": config.data.source,
        "fingerprint": data.fingerprint,
        "validation_images": sum(map(len, images)),
        "pixel_variance": pixel_variance(torch.cat(images)),
    }


def figures_of(run: RunFolder, cell: Cell, variance: float) -> dict[str, Any]:
    """The figures of a finished cell, of the weights that were kept: errors and bits on validation images.

    ``variance`` is that of these images. ``nmse`` and ``mse`` are on the scale of [0, 1], ``psnr`` in dB, ``seconds``
    those of training steps; ``kept_step`` is the step of the weights kept.
    """
    codec = run.stage("codec") or {}
    validation = codec.get("validation", {})
    shares = {key: value for key, value in validation.items() if key.endswith(("_perplexity", "_usage"))}
    return {
        "mse": validation.get("mse"),
        "nmse": nmse(validation["mse"], variance) if validation.get("mse") is not None else None,
        "pixel_variance": variance,
        "psnr": validation.get("psnr"),
        **shares,
        "decoder_bits_per_dim": validation.get("decoder_bits_per_dim"),
        "steps": codec.get("steps"),
        "kept_step": validation.get("step"),
        "seconds": codec.get("seconds"),
        "parameters": codec.get("parameters"),
        "codec": codec.get("fingerprint"),
        "priors": {
            name: {level: _prior_figures(run, name, level) for level in levels} for name, levels in cell.priors.items()
        },
    }


def _prior_figures(run: RunFolder, name: str, level: str) -> dict[str, Any]:
    record = run.stage(run.prior_stage(name, level)) or {}
    figures = {"bits_per_code": record.get("validation", {}).get("bits_per_code")}
    return figures | {key: record.get(key) for key in ("steps", "seconds", "parameters", "fingerprint")}


def draw(folder: Path, record: Mapping[str, Any], console: Console) -> dict[str, str]:
    """Write the pictures of the finished cells; returns their paths by name. Older pictures are replaced or removed."""
    made: dict[str, bytes] = {}
    keys = list(short_keys(list(record["grid"])).values())
    panels = curves(folder, record)
    maps = heat_maps(record)
    with console.progress("charts", 2 * len(KINDS), "charts") as progress:
        for kind in KINDS:
            if panels:
                made[f"curves.{kind}"] = overlay_chart(panels, keys, kind=kind)
            progress.advance()
            if maps:
                made[f"grid.{kind}"] = heat_maps_chart(maps, keys, kind=kind)
            progress.advance()
    for name in [f"{stem}.{kind}" for stem in ("curves", "grid") for kind in KINDS]:
        if name in made:
            write_bytes(folder / name, made[name])
        else:
            (folder / name).unlink(missing_ok=True)
    return {name: str(folder / name) for name in made}


def curves(folder: Path, record: Mapping[str, Any]) -> list[Panel]:
    """Validation figures of the finished cells against steps: the codec's, and bits/code of the priors.

    The codec's are left out where priors were trained on one codec: they would be one line.
    """
    cells = [cell for cell in record["cells"] if cell["state"] == DONE]
    panels = []
    if not (priors_of(cells) and same_codec(cells)):
        lines = {cell["name"]: _validation(folder / cell["run"] / "codec") for cell in cells}
        errors = []
        for cell in cells:
            variance = figure(cell, "pixel_variance") or 0.0
            points = _points(lines[cell["name"]], "mse")
            relative = [(step, nmse(error, variance)) for step, error in points] if variance else []
            errors.append(Curve(_texts(cell), relative, _kept(cell)))
        panels.append(Panel("codec", "normalised MSE", errors, log=True))
        panels += [
            Panel(
                level,
                "perplexity",
                [
                    Curve(_texts(cell), _points(lines[cell["name"]], f"{level}_perplexity"), _kept(cell))
                    for cell in cells
                ],
                log=False,
            )
            for level in levels_of(cells)
        ]
    for name, level in priors_of(cells):
        found = [
            Curve(_texts(cell), _points(_validation(folder / cell["run"] / "priors" / name / level), "bits_per_code"))
            for cell in cells
        ]
        panels.append(Panel(f"{name}, {level}", "bits/code", found, log=False))
    return [panel for panel in panels if any(curve.points for curve in panel.curves)]


def heat_maps(record: Mapping[str, Any]) -> list[HeatMap]:
    """Final figures over a grid of two keys, None where a cell has none; empty for other grids."""
    if len(record["grid"]) != 2:
        return []
    cells = [cell for cell in record["cells"] if cell["state"] == DONE]
    columns: list[Column] = []
    if not (priors_of(cells) and same_codec(cells)):
        columns += [NMSE, *(perplexity(level) for level in levels_of(cells))]
    columns += [bits(name, level, ranked=same_codec(cells)) for name, level in priors_of(cells)]
    rows, across = ([text_of(value) for value in values] for values in record["grid"].values())
    maps = []
    for column in columns:
        values = {_texts(cell): value for cell in cells if (value := figure(cell, *column.path)) is not None}
        if values:
            maps.append(HeatMap(column.title, rows, across, values, column.write, column.better, log=column is NMSE))
    return maps


def _texts(cell: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(text_of(value) for value in cell["values"].values())


def _kept(cell: Mapping[str, Any]) -> float | None:
    return figure(cell, "kept_step")


def _validation(stage: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(stage / "metrics.jsonl") if line["split"] == "validation"]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have a finite number there."""
    values = [(line["step"], line.get(key)) for line in lines]
    return [(float(step), float(value)) for step, value in values if value is not None and math.isfinite(value)]
