"""Charts of the comparison: bits per code, and learning curves. How charts look is `pipelines.report.theme`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipelines.report.columns import BASELINES, Row, figure, is_trained
from pipelines.report.tables import by_bits, levels_of
from pipelines.report.theme import DASHES, Format, Theme, layout, quiet, text_label, theme_for, to_bytes


def bits_chart(rows: Sequence[Row], *, kind: Format = "svg", dark: bool = False) -> bytes:
    """Bits per code of every prior, one panel per level; uniform and unigram are lines across the bars.

    Bars start at zero and the panels share one axis. The best trained prior of a level stands out.

    Args:
        rows: rows of compare.json; those without ``bits_per_code`` are left out.
        kind: "svg" (transparent) or "png" (opaque).
        dark: colours for a dark ground.

    Raises:
        ValueError: no row has bits per code.
    """
    rows = [row for row in rows if figure(row, "bits_per_code") is not None]
    levels = levels_of(rows)
    if not levels:
        raise ValueError("no row has bits per code")
    theme = theme_for(dark)
    panels = {level: sorted((row for row in rows if row["level"] == level), key=by_bits) for level in levels}
    bars = {level: [row for row in panels[level] if is_trained(row["prior"])] for level in levels}
    inches = [0.62 + _pitch(bars[level]) * max(len(bars[level]), 1) for level in levels]
    sheet = Figure(figsize=(6.4, sum(inches) + 0.35), layout=layout(0.2))
    axes = sheet.subplots(len(levels), 1, sharex=True, squeeze=False, height_ratios=inches)[:, 0]
    span = 1.16 * max(_bits(row) for row in rows) or 1.0
    for axis, level in zip(axes, levels, strict=True):
        _bars(axis, bars[level], span, theme)
        _references(axis, [row for row in panels[level] if row["prior"] in BASELINES], span, theme)
        title = "all levels" if level == "all" else text_label(level, 24)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=theme.ink, pad=16)
        quiet(axis, theme)
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="x", labelbottom=axis is axes[-1])
        axis.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes[-1].set_xlim(0, span)
    axes[-1].set_xlabel("bits per code (fewer is better)", color=theme.muted, fontsize=9)
    return to_bytes(sheet, kind, theme)


def _pitch(rows: Sequence[Row]) -> float:
    """Inches from bar to bar: names of mixes take a line for each level."""
    return max((0.14 + 0.16 * (1 + _label(row["prior"]).count("\n")) for row in rows), default=0.3)


def _label(prior: str) -> str:
    """A prior's name; that of a mix (``top=...,bottom=...``) on several lines."""
    name = text_label(str(prior), 80)
    return name if len(name) <= 26 else ",\n".join(text_label(part, 26) for part in str(prior).split(",")[:3])


def _bits(row: Row) -> float:
    bits = figure(row, "bits_per_code")
    assert bits is not None
    return bits


def _bars(axis: Axes, rows: Sequence[Row], span: float, theme: Theme) -> None:
    best = min((_bits(row) for row in rows), default=None)
    for place, row in enumerate(rows):
        bits, leads = _bits(row), _bits(row) == best
        axis.barh(place, bits, height=0.68, color=theme.best if leads else theme.bar, zorder=2)
        text = f"{'≤ ' if row.get('likelihood') == 'bound' else ''}{bits:.2f}"
        inside = bits > 0.16 * span
        colour = theme.on_best if leads and inside else theme.ink
        align: Literal["left", "right"] = "right" if inside else "left"
        move = (-5, 0) if inside else (5, 0)
        axis.annotate(
            text, (bits, place), move, textcoords="offset points", ha=align, va="center", color=colour, fontsize=9
        )
    axis.set_yticks(range(len(rows)), [_label(row["prior"]) for row in rows])
    axis.set_ylim(max(len(rows), 1) - 0.42, -0.58)


def _references(axis: Axes, rows: Sequence[Row], span: float, theme: Theme) -> None:
    """Lines of the baselines, their names above the panel: the lower one's to its left, so that they do not meet."""
    for row in rows:
        lower = row is rows[0] and len(rows) > 1 and _bits(row) > 0.2 * span
        dashes = DASHES[1] if row["prior"] == "unigram" else DASHES[0]
        axis.axvline(_bits(row), color=theme.muted, linewidth=1.2, linestyle=dashes, zorder=3)
        axis.annotate(
            f"{row['prior']} {_bits(row):.2f}",
            (_bits(row), 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if lower else "left",
            va="bottom",
            color=theme.muted,
            fontsize=8.5,
        )


def learning_curves(curves: Sequence[Mapping[str, Any]], *, kind: Format = "svg", dark: bool = False) -> bytes:
    """Validation bits per code against steps (left) and against training time (right), one row of panels per level.

    A dot marks each prior's lowest point, a dashed line the unigram baseline.

    Args:
        curves: {"prior", "level", "steps", "seconds", "bits_per_code", "unigram"} each; the three lists go together,
            points that are not finite are left out.
        kind: "svg" (transparent) or "png" (opaque).
        dark: colours for a dark ground.

    Raises:
        ValueError: no curve has a point.
    """
    curves = [curve for curve in curves if _points(curve, "steps") or _points(curve, "seconds")]
    levels = levels_of(curves)
    if not levels:
        raise ValueError("no curve has a point")
    theme = theme_for(dark)
    names = list(dict.fromkeys(str(curve["prior"]) for curve in curves))
    size, unit = _time_unit(max((second for curve in curves for second, _ in _points(curve, "seconds")), default=0.0))
    sheet = Figure(figsize=(7.6, 2.35 * len(levels) + 0.45), layout=layout(0.06))
    axes = sheet.subplots(len(levels), 2, sharey="row", squeeze=False)
    for panels, level in zip(axes, levels, strict=True):
        here = [curve for curve in curves if curve["level"] == level]
        for axis, key, scale in zip(panels, ("steps", "seconds"), (1.0, size), strict=True):
            for curve in here:
                place = names.index(str(curve["prior"]))
                colour, dashes = theme.lines[place % len(theme.lines)], DASHES[place // len(theme.lines) % 3]
                points = [(at / scale, bits) for at, bits in _points(curve, key)]
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1.7, zorder=3)
                    axis.plot(*min(points, key=lambda point: point[1]), "o", color=colour, markersize=4.5, zorder=4)
            unigrams = {value for curve in here if (value := figure(curve, "unigram")) is not None}
            for value in sorted(unigrams):
                axis.axhline(value, color=theme.muted, linewidth=1.1, linestyle=DASHES[1], zorder=2)
            quiet(axis, theme)
            axis.grid(color=theme.grid, linewidth=0.8)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=key == "steps"))
            axis.yaxis.set_major_locator(MaxNLocator(5))
            if key == "steps":
                axis.xaxis.set_major_formatter("{x:,.0f}")
        panels[0].set_title(text_label(level, 24), loc="left", fontsize=10, fontweight="bold", color=theme.ink)
        panels[0].set_ylabel("validation bits/code", color=theme.muted, fontsize=9)
    axes[-1, 0].set_xlabel("steps", color=theme.muted, fontsize=9)
    axes[-1, 1].set_xlabel(f"{unit} of training", color=theme.muted, fontsize=9)
    _key(sheet, names, any(figure(curve, "unigram") is not None for curve in curves), theme)
    return to_bytes(sheet, kind, theme)


def _points(curve: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    pairs = zip(curve.get(key) or (), curve.get("bits_per_code") or (), strict=False)
    return [(float(at), float(bits)) for at, bits in pairs if _finite(at) and _finite(bits)]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def _key(sheet: Figure, names: Sequence[str], unigram: bool, theme: Theme) -> None:
    handles = [
        Line2D([], [], color=theme.lines[place % len(theme.lines)], linestyle=DASHES[place // len(theme.lines) % 3])
        for place in range(len(names))
    ]
    labels = [text_label(name, 26) for name in names]
    if unigram:
        handles.append(Line2D([], [], color=theme.muted, linewidth=1.1, linestyle=DASHES[1]))
        labels.append("unigram")
    sheet.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=4 if max(map(len, labels)) < 18 else 2,
        frameon=False,
        fontsize=9,
        labelcolor=theme.ink,
        handlelength=1.8,
        columnspacing=1.6,
        borderpad=0.2,
    )
