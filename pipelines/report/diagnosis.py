"""The diagnosis as one self-contained HTML page: words first, then the pictures, then the figures of each part.

Everything shown is read from the content of diagnose.json, so that page and file agree. Charts are SVG within the page,
in the page's own colours, and so follow a dark ground; panels are PNG as data URIs. All text goes through Jinja2's
escaping, and the page's content security policy forbids whatever could slip past it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.report.figures import Figure
from vqgen.files import write_text

WORDS = {"bad": "fails", "watch": "could be better", "unknown": "cannot tell", "good": "fine"}
"""States as they are shown."""
SCALARS = {"bits_per_code": "bits/code", "mse": "squared error"}
MOST_CELLS = 32
"""Larger maps are drawn with so many cells a side, each the mean of what it covers."""
MOST_BARS = 64
CHART = (360, 150)
"""Width and height of the drawing area of a curve or a histogram, in units of its own."""
EARLY = 0.1
"""Share of a training whose curve may leave the chart: the first losses say nothing."""


@dataclass(frozen=True)
class Row:
    """One figure of a table: name, text, and where it lies between nothing and the largest, in percent."""

    name: str
    text: str
    bar: float | None = None
    kind: str = ""
    note: str = ""


def write_diagnosis_page(path: Path, diagnosis: Mapping[str, Any], pictures: Mapping[str, bytes]) -> None:
    """Write the page to ``path``, whole or not at all.

    Args:
        path: the HTML file; an older one is replaced.
        diagnosis: the content of diagnose.json.
        pictures: PNG files of the panels, by the names that ``diagnosis`` gives them.
    """
    by_place: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for finding in diagnosis["findings"]:
        part = "codec" if finding["part"] == "codebook" else finding["part"]
        by_place.setdefault((part, "all" if part == "codec" else finding["level"]), []).append(finding)
    page = (
        Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        .get_template("diagnosis.html")
        .render(
            diagnosis=diagnosis,
            words=WORDS,
            states=_states(diagnosis["findings"]),
            panels=[
                Figure(
                    panel["title"],
                    panel["caption"],
                    pictures[panel["file"]],
                    f"{panel['title']}: a grid of {panel['pictures']} pictures.",
                )
                for panel in diagnosis["panels"]
            ],
            codec={
                "findings": by_place.get(("codec", "all"), []),
                "rows": codec_rows(diagnosis["codec"]),
                "curve": curve(diagnosis["codec"]["training"]),
                "books": [histogram(book) for book in diagnosis["codebooks"]],
            },
            levels=[
                {
                    "figures": figures,
                    "findings": by_place.get(("prior", figures["level"]), []),
                    "rows": bits_rows(figures),
                    "curve": curve(figures["training"], figures["unigram"]),
                    "maps": heat_maps(figures),
                }
                for figures in diagnosis["levels"]
            ],
            samples=by_place.get(("samples", "all"), []),
            memory=diagnosis["memory"],
            chart=CHART,
        )
    )
    # File names may hold what UTF-8 cannot; it becomes a question mark.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


def _states(findings: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """How many checks came out how, the worst first."""
    return [(state, count) for state in WORDS if (count := sum(f["state"] == state for f in findings))]


def codec_rows(codec: Mapping[str, Any]) -> list[Row]:
    """Errors of the codec beside those of its baselines, on one scale."""
    most = max(codec["mean_image_mse"], codec["flat_mse"], codec["mse"], codec["train_mse"], 1e-12)

    def row(name: str, value: float, kind: str = "", note: str = "") -> Row:
        return Row(name, f"{value:.5f}", 100 * min(value / most, 1), kind, note)

    rows = [
        row("mean training image", codec["mean_image_mse"], "scale", "the same picture for every image"),
        row("each image's mean colour", codec["flat_mse"], "scale", "one colour for each image"),
    ]
    depths = list(codec["depths"].items())
    untrained = "" if codec["depths_trained"] else "; not trained for this"
    rows += [row(f"{levels} alone", error, "", f"finer levels left out{untrained}") for levels, error in depths[:-1]]
    rows.append(row("reconstructions", codec["mse"], "own", f"all levels; {codec['psnr']:.1f} dB"))
    return [*rows, row("reconstructions, training images", codec["train_mse"], "", "images it was trained on")]


def bits_rows(figures: Mapping[str, Any]) -> list[Row]:
    """Bits per code of one level's prior, beside what they are to be held against."""
    sign = "≤ " if figures["likelihood"] == "bound" else ""
    absolute = [
        ("uniform", "uniform", "scale", "every code equally likely"),
        ("unigram", "unigram", "scale", "code frequencies at each position, and class"),
        ("test", f"{figures['prior']}, test images", "own", "what it pays for unseen images"),
        ("train", f"{figures['prior']}, training images", "", "what it pays for images it was trained on"),
        ("expected", "what it expects", "", "its own entropy along the test images"),
        ("sampled", "its own samples", "", "what it pays for what it draws itself"),
    ]
    most = max([figures[key] for key, *_ in absolute if figures[key] is not None], default=1.0) or 1.0
    rows = []
    for key, name, kind, note in absolute:
        value, error = figures[key], figures.get(f"{key}_error")
        if value is not None:
            shown = sign if key in ("test", "train") else ""
            text = f"{shown}{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            rows.append(Row(name, text, 100 * max(value, 0.0) / most, kind, note))
    for key, name, note in (
        ("context", "with other coarser codes", "what test images cost more, given another image's coarser codes"),
        ("label", "with wrong labels", "what test images cost more, given a wrong label"),
    ):
        if figures[key] is not None:
            rows.append(Row(name, f"{figures[key]:+.3f}", None, "more", note))
    return rows


def curve(training: Mapping[str, Any], unigram: float | None = None) -> dict[str, Any] | None:
    """Lines of a training curve within `CHART`; None without two points."""
    lines = {split: [(step, value) for step, value in training[split]] for split in ("train", "validation")}
    if len(lines["validation"]) < 2:
        return None
    late = [v for step, v in lines["train"] if step >= EARLY * training["steps"]]
    values = [value for _, value in lines["validation"]] + late
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 1e-6
    low, high = low - margin, high + margin
    width, height = CHART

    def at(step: float, value: float) -> tuple[float, float]:
        share = (value - low) / (high - low)
        return round(width * step / max(training["steps"], 1), 2), round(height * (1 - min(max(share, 0.0), 1.0)), 2)

    best = training["best_step"]
    return {
        "scalar": SCALARS.get(training["scalar"], training["scalar"]),
        "lines": {
            split: " ".join(f"{x},{y}" for x, y in (at(*point) for point in points))
            for split, points in lines.items()
            if len(points) > 1
        },
        "best": at(best, dict(lines["validation"])[best]),
        "unigram": at(0, unigram)[1] if unigram is not None and low < unigram < high else None,
        "high": f"{high:.2g}",
        "low": f"{low:.2g}",
        "steps": f"{training['steps']:,}",
    }


def histogram(book: Mapping[str, Any]) -> dict[str, Any]:
    """Bars of how often codes are used, the most used first, within `CHART`; the line is equal use."""
    counts, total = book["counts"], max(sum(book["counts"]), 1)
    bars = min(MOST_BARS, len(counts))
    edges = [round(i * len(counts) / bars) for i in range(bars + 1)]
    uses = [sum(counts[a:b]) / (b - a) * len(counts) / total for a, b in pairwise(edges)]
    width, height = CHART
    high = max(uses[0], 1.0)
    return {
        "level": book["level"],
        "verdict": book["verdict"],
        "bars": [
            {
                "x": round(i * width / bars, 2),
                "y": round(height * (1 - use / high), 2),
                "width": round(0.86 * width / bars, 2),
                "height": round(height * use / high, 2),
            }
            for i, use in enumerate(uses)
        ],
        "equal": round(height * (1 - 1 / high), 2),
        "high": f"{high:.1f}",
        "size": f"{book['size']:,}",
        "images": f"{book['images']:,}",
    }


def heat_maps(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cells of the map of bits by position, and of what is saved there against unigram."""
    own, unigram = figures["position_bits"], figures["unigram_position_bits"]
    if own is None or unigram is None:
        return []
    saved = [[theirs - mine for mine, theirs in zip(*rows, strict=True)] for rows in zip(own, unigram, strict=True)]
    return [
        {"title": "bits per code by position", **_cells(own)},
        {"title": "bits saved against unigram", **_cells(saved)},
    ]


def _cells(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    rows, columns = min(MOST_CELLS, len(values)), min(MOST_CELLS, len(values[0]))
    y_edges = [round(i * len(values) / rows) for i in range(rows + 1)]
    x_edges = [round(i * len(values[0]) / columns) for i in range(columns + 1)]
    pooled = [
        [_mean([v for row in values[y:yy] for v in row[x:xx]]) for x, xx in pairwise(x_edges)]
        for y, yy in pairwise(y_edges)
    ]
    low, high = min(map(min, pooled)), max(map(max, pooled))
    span = (high - low) or 1.0
    cells = [
        {"x": x, "y": y, "share": round(0.06 + 0.94 * (value - low) / span, 3), "text": f"{value:.2f}"}
        for y, row in enumerate(pooled)
        for x, value in enumerate(row)
    ]
    return {
        "rows": rows,
        "columns": columns,
        "cells": cells,
        "low": f"{round(low, 1) + 0.0:.1f}",
        "high": f"{round(high, 1) + 0.0:.1f}",
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
