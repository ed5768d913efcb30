"""The vocabulary of the comparison: its baselines and sample sources, and its columns with their titles and formats.

What the lines are and which of them is best is `pipelines.report.tables`, what they mean `pipelines.report.legend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from priors.registry import SOURCES

Row = Mapping[str, Any]
"""A row of compare.json."""

BASELINES = ("uniform", "unigram")
"""Priors without training that set the scale of a likelihood."""


@dataclass(frozen=True)
class Column:
    """One figure of the rows: how it is called, written and judged."""

    key: str
    title: str
    write: Callable[[Any], str]
    better: Literal["low", "high"] | None = None
    meaning: str = ""
    error: str | None = None
    """The column that holds its standard error."""


HUGE = 1e9
"""Figures from here on, such as a distance in the features of a codec that has learned nothing, are short powers."""


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}" if abs(value) < HUGE else f"{value:.3g}"


def _count(value: float) -> str:
    """Three significant digits: 812, 81.2k, 8.12M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0f}"


def _seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 59.5:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _bytes(value: float) -> str:
    """Memory in decimal units: 812 B, 81.2 kB, 1.25 GB."""
    text = _count(value)
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


BITS = Column("bits_per_code", "bits/code", _fixed(3), "low", error="standard_error")
BITS_PER_IMAGE = Column("bits_per_image", "bits/image", _fixed(1), "low")
DIM = Column("bits_per_dim", "bits/dim", _fixed(3), "low")
DRAWS = Column("estimator_samples", "draws", _fixed(0))
KIND = Column("likelihood", "likelihood", str)
SPEED = Column("samples_per_second", "samples/s", _rate, "high")
TRAINING = Column("train_seconds", "training", _seconds)
QUALITY = (
    Column("frechet", "Fréchet", _fixed(2), "low", "distance between feature Gaussians of samples and test images"),
    Column(
        *("kid", "KID", _fixed(4), "low"),
        "kernel distance between their features, unbiased in the number of images",
        "kid_standard_error",
    ),
    Column("precision", "precision", _fixed(3), "high", "share of samples that lie among the test images"),
    Column("recall", "recall", _fixed(3), "high", "share of test images that lie among the samples"),
    Column("density", "density", _fixed(3), "high", "how densely test images surround the samples"),
    Column("coverage", "coverage", _fixed(3), "high", "share of test images with a sample in their neighbourhood"),
    Column(
        "cas", "CAS", _fixed(3), "high", "test accuracy of a classifier trained on samples alone", "cas_standard_error"
    ),
)


@dataclass(frozen=True)
class TableSpec:
    """One of the tables of a comparison: which columns, of which rows."""

    key: Literal["likelihood", "quality", "cost", "compression"]
    title: str
    columns: tuple[Column, ...]
    terminal: tuple[Column, ...]
    """The columns for which a terminal has room."""


TABLES = (
    TableSpec("likelihood", "Likelihood", (BITS, KIND, DRAWS, BITS_PER_IMAGE, DIM), (BITS, DRAWS, DIM)),
    TableSpec("quality", "Sample quality", (*QUALITY, Column("samples", "images", _fixed(0))), QUALITY),
    TableSpec(
        "cost",
        "Cost",
        (
            Column("parameters", "parameters", _count),
            TRAINING,
            Column("train_steps", "steps", _fixed(0)),
            Column("train_memory", "memory, training", _bytes),
            SPEED,
            Column("sample_memory", "memory, sampling", _bytes),
        ),
        (Column("parameters", "parameters", _count), TRAINING, SPEED),
    ),
    TableSpec(
        "compression",
        "Compression",
        (
            BITS_PER_IMAGE,
            Column("bytes_per_image", "bytes/image", _fixed(1), "low"),
            Column("bits_per_pixel", "bits/pixel", _fixed(3), "low"),
            Column("compression_ratio", "ratio to raw", lambda value: f"{value:,.1f}x", "high"),
            Column("psnr", "PSNR", lambda value: f"{value:.2f} dB"),
            Column("ssim", "SSIM", _fixed(3)),
        ),
        (
            Column("bytes_per_image", "bytes/image", _fixed(1), "low"),
            Column("bits_per_pixel", "bits/pixel", _fixed(3), "low"),
            Column("compression_ratio", "ratio to raw", lambda value: f"{value:,.1f}x", "high"),
        ),
    ),
)
"""In the order in which they are read."""


def is_trained(prior: str) -> bool:
    """Whether ``prior`` is a trained one, and neither a baseline nor a source of codes that nothing drew."""
    return prior not in (*BASELINES, *SOURCES)


def figure(row: Row, key: str) -> float | None:
    """The number at ``key``, or None where it is missing or not finite."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
