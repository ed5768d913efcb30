"""Charts of scores: their histograms, and how well they tell two sets apart. The look is `pipelines.report.theme`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.report.theme import DASHES, Theme, layout, quiet, theme_for, to_bytes
from pipelines.scoring.tables import Scores, name_of, score_keys, set_name
from vqgen.detection import RECALL, roc_curve

BINS = 40
_COLUMNS = 3
_TAIL = 0.5
"""Percent of each set that a histogram gathers in its outermost bins, so that one image does not flatten the rest."""


def histograms(scored: Sequence[Scores], detection: Mapping[str, Any] | None) -> bytes:
    """A PNG with a panel for each score, the sets over each other; with ``detection`` its AUROC in the title."""
    theme = theme_for(False)
    keys = score_keys(scored[0].columns)
    rows = math.ceil(len(keys) / _COLUMNS)
    sheet = Figure(figsize=(3.0 * _COLUMNS, 1.95 * rows + 0.5), layout=layout(0.09))
    axes = sheet.subplots(rows, _COLUMNS, squeeze=False).ravel()
    areas = {row["score"]: row["auroc"] for row in detection["rows"]} if detection is not None else {}
    handles = []
    for axis, key in zip(axes, keys, strict=False):
        handles = _panel(axis, scored, key, theme)
        area = f"   AUROC {areas[key]:.3f}" if key in areas else ""
        axis.set_title(f"{name_of(key)}{area}", loc="left", fontsize=9.5, fontweight="bold", color=theme.ink)
        axis.set_xlabel("mean squared error" if key == "mse" else "bits per image", color=theme.muted, fontsize=8)
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    names = [set_name(scores.images) for scores in scored]
    if len(scored) > 1:
        names = [names[0], f"{names[1]} (outliers)"]
    counted = [f"{name}: {len(scores.places):,} images" for name, scores in zip(names, scored, strict=True)]
    sheet.legend(handles, counted, loc="outside upper left", ncols=2, frameon=False, fontsize=9, labelcolor=theme.ink)
    return to_bytes(sheet, "png", theme)


def _panel(axis: Axes, scored: Sequence[Scores], key: str, theme: Theme) -> list[Any]:
    """Histograms of one score; each set's area is 1, so that sets of different sizes can be compared."""
    sets = [scores.columns[key].numpy() for scores in scored]
    low = min(float(np.percentile(values, _TAIL)) for values in sets)
    high = max(float(np.percentile(values, 100 - _TAIL)) for values in sets)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    handles = []
    for number, values in enumerate(sets):
        counts, _ = np.histogram(values.clip(low, high), edges)
        colour = theme.lines[number]
        handle = axis.stairs(counts / len(values), edges, fill=True, color=colour, alpha=0.45, zorder=2 + number)
        axis.stairs(counts / len(values), edges, color=colour, linewidth=1.1, zorder=4 + number)
        handles.append(handle)
    quiet(axis, theme)
    axis.set_yticks([])
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter("{x:,.0f}" if high - low > 20 else "{x:g}")
    return handles


def roc_chart(inliers: Scores, outliers: Scores, detection: Mapping[str, Any]) -> bytes:
    """A PNG of the ROC curves of all scores, the best first in the key; the dotted line is guessing."""
    theme = theme_for(False)
    sheet = Figure(figsize=(7.6, 4.6), layout=layout(0.06))
    axis = sheet.subplots()
    axis.plot([0, 1], [0, 1], color=theme.muted, linewidth=1.0, linestyle=DASHES[2], zorder=1)
    axis.axhline(RECALL, color=theme.grid, linewidth=1.0, zorder=1)
    ranked = sorted(detection["rows"], key=lambda row: -row["auroc"])
    handles = []
    for place, row in enumerate(ranked):
        alarms, caught = roc_curve(inliers.columns[row["score"]].numpy(), outliers.columns[row["score"]].numpy())
        style = {"color": theme.lines[place % len(theme.lines)], "linestyle": DASHES[place // len(theme.lines) % 3]}
        handles += axis.plot(alarms, caught, linewidth=1.7, zorder=len(ranked) - place + 2, clip_on=False, **style)
    quiet(axis, theme)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_aspect("equal")
    axis.set_xlabel(f"share flagged of {set_name(inliers.images)}", color=theme.muted, fontsize=9)
    axis.set_ylabel(f"share caught of {set_name(outliers.images)}", color=theme.muted, fontsize=9)
    labels = [f"{row['name']}  {row['auroc']:.3f}" for row in ranked]
    sheet.legend(
        handles,
        labels,
        title="score, AUROC",
        title_fontproperties={"size": 9, "weight": "bold"},
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        labelcolor=theme.ink,
        alignment="left",
    )
    return to_bytes(sheet, "png", theme)
