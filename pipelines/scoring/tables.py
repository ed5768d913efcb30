"""Scores of a set as columns, what they are in short, and how well each tells two sets apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.report.theme import text_label
from pipelines.scoring.bits import CodeBits
from pipelines.scoring.images import ScoredSet
from vqgen.codes import LevelSpec
from vqgen.detection import RECALL, RESAMPLES, detection

NO_SCORES = ("bits_per_dim", "label_bits", "baseline_bits")
"""Columns that say what others say, or that are no score of an image by themselves."""

NAMES = {
    "code_bits": "all codes",
    "total_bits": "total",
    "decoder_bits": "decoder",
    "complexity_bits": "complexity alone",
    "complexity_corrected": "complexity-corrected",
    "ratio": "ratio to baseline",
    "mse": "reconstruction MSE",
}


@dataclass(frozen=True)
class Scores:
    """The scores of M images."""

    images: ScoredSet
    places: Sequence[int]
    """Where in the split each image is."""
    columns: Mapping[str, Tensor]
    """(M,) float64 each."""
    maps: Mapping[str, Tensor]
    """(M, h, w) float64 bits of each code, for each level that has them."""


def maps_of(levels: Sequence[LevelSpec], parts: Sequence[CodeBits]) -> dict[str, Tensor]:
    """The maps of all batches, by level."""
    found = {}
    for number, level in enumerate(levels):
        maps = [part.maps[number] for part in parts]
        if maps and all(one is not None for one in maps):
            found[level.name] = torch.cat([one for one in maps if one is not None])
    return found


def score_keys(columns: Iterable[str]) -> list[str]:
    """Columns that are scores: higher means less like the training images."""
    return [key for key in columns if key not in NO_SCORES]


def name_of(key: str) -> str:
    """A column's name for people."""
    return NAMES.get(key, key.removesuffix("_bits").replace("_", " "))


def summary(scores: Scores) -> dict[str, Any]:
    """Which images were scored, and of each column mean, spread and quantiles."""
    figures = {}
    for key, values in scores.columns.items():
        low, middle, high = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
        deviation = float(values.std()) if len(values) > 1 else None
        figures[key] = {"mean": float(values.mean()), "deviation": deviation, "p5": low, "median": middle, "p95": high}
    images = scores.images
    return {
        "source": images.source,
        "split": images.split,
        "own": images.own,
        "images": len(scores.places),
        "images_available": images.total,
        "unreadable": len(images.indices) - len(scores.places),
        "labelled": images.names is not None,
        "pixels": list(images.notes),
        "scores": figures,
    }


def detections(inliers: Scores, outliers: Scores) -> dict[str, Any]:
    """How well each score tells the second set, the outliers, from the first."""
    rows = [
        {
            "score": key,
            "name": name_of(key),
            "median": float(inliers.columns[key].median()),
            "median_of_outliers": float(outliers.columns[key].median()),
            **detection(inliers.columns[key].numpy(), outliers.columns[key].numpy())._asdict(),
        }
        for key in score_keys(inliers.columns)
    ]
    counts = {"inliers": len(inliers.places), "outliers": len(outliers.places)}
    return {**counts, "recall": RECALL, "resamples": RESAMPLES, "rows": rows}


def detection_lines(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of detection, a line for each score."""
    head = [
        "score",
        "median",
        "of outliers",
        "AUROC",
        "average precision",
        f"FPR at {100 * found['recall']:.0f} % recall",
    ]
    keys = ("auroc", "average_precision", "fpr_at_recall")
    lines = []
    for row in found["rows"]:
        medians = [_shown(row["score"], row[key]) for key in ("median", "median_of_outliers")]
        lines.append([row["name"], *medians, *(_figure(row[key], row[f"{key}_standard_error"]) for key in keys)])
    return head, lines


def _shown(key: str, value: float) -> str:
    return f"{value:,.{5 if key == 'mse' else 3 if key == 'bits_per_dim' else 1}f}"


def _figure(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def summary_lines(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of one set's scores."""
    head = ["score", "mean", "5 %", "median", "95 %"]
    lines = []
    for key, figures in found["scores"].items():
        if key == "label_bits" and not figures["mean"]:
            continue  # only given labels cost bits
        name = name_of(key) if key not in NO_SCORES else key.removesuffix("_bits").replace("_", " ")
        lines.append([name, *(_shown(key, figures[part]) for part in ("mean", "p5", "median", "p95"))])
    return head, lines


def set_name(images: ScoredSet, most: int = 28) -> str:
    """A set's name for a chart: the last part of its source, and the split."""
    last = images.source.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return text_label(f"{last}, {images.split}", most)
