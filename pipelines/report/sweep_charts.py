"""Charts of a sweep: the cells' curves over one another, and final figures over a grid of two keys.

How charts look is `pipelines.report.theme`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from pipelines.report.theme import DARK, DASHES, Format, Theme, layout, quiet, text_label, theme_for, to_bytes

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
MOST_MARKS = 9
"""Markers along one curve."""
KEY_COLUMNS = 6
"""Values in one line of the key above the panels."""


@dataclass(frozen=True)
class Curve:
    """One cell: its value of each key of the grid, as text, and its points."""

    values: tuple[str, ...]
    points: Sequence[tuple[float, float]]
    kept: float | None = None
    """Step of the weights that were kept."""


@dataclass(frozen=True)
class Panel:
    """Curves of one measure."""

    title: str
    label: str
    curves: Sequence[Curve]
    log: bool


@dataclass(frozen=True)
class HeatMap:
    """One measure over two keys: rows by the first, columns by the second; cells without a figure are not in it."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Mapping[tuple[str, ...], float]
    write: Callable[[float], str]
    better: Literal["low", "high"] | None
    """None where cells are not to be ranked by it: then it is only shown, the higher the stronger."""
    log: bool = False


@dataclass(frozen=True)
class Style:
    """How a curve is drawn."""

    colour: str
    dashes: Any
    marker: str | None


def overlay_chart(panels: Sequence[Panel], keys: Sequence[str], *, kind: Format = "svg", dark: bool = False) -> bytes:
    """All cells' curves against steps, a panel for each measure.

    Colours tell the values of the first key apart, dashes and markers those of the others. A ring marks the weights
    that were kept.

    Args:
        panels: curves whose ``values`` go with ``keys``; points that a log axis cannot show are left out.
        keys: names of the grid's keys.
        kind: "svg" (transparent) or "png" (opaque).
        dark: colours for a dark ground.

    Raises:
        ValueError: there is no panel, or no curve has a point.
    """
    if not any(curve.points for panel in panels for curve in panel.curves):
        raise ValueError("no curve has a point")
    theme = theme_for(dark)
    every = [curve.values for panel in panels for curve in panel.curves]
    firsts = list(dict.fromkeys(values[0] for values in every))
    others = list(dict.fromkeys(values[1:] for values in every))
    inches = [3.1 if panel.log else 2.2 for panel in panels]
    rows = math.ceil(len(firsts) / KEY_COLUMNS) + (math.ceil(len(others) / KEY_COLUMNS) if len(keys) > 1 else 0)
    sheet = Figure(figsize=(8.2, sum(inches) + 0.22 * rows + 0.5), layout=layout(0.05))
    axes = sheet.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=inches)[:, 0]
    styles = _styles(firsts, others, len(keys) > 1, theme)
    for axis, panel in zip(axes, panels, strict=True):
        if panel.log:
            axis.set_yscale("log")
        for curve in panel.curves:
            _draw(axis, curve, styles[curve.values[0], curve.values[1:]], panel.log, theme)
        quiet(axis, theme)
        axis.grid(color=theme.grid, linewidth=0.8)
        axis.set_title(text_label(panel.title, 40), loc="left", fontsize=10, fontweight="bold", color=theme.ink)
        axis.set_ylabel(panel.label, color=theme.muted, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_formatter(NullFormatter())
        shown = [value for curve in panel.curves for _, value in curve.points if value > 0 or not panel.log]
        axis.yaxis.set_major_locator(_locator(shown, panel.log))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ringed = any(curve.kept is not None for panel in panels for curve in panel.curves)
    steps = "steps (a ring marks the weights that were kept)" if ringed else "steps"
    axes[-1].set_xlabel(steps, color=theme.muted, fontsize=9)
    _key(sheet, keys, firsts, others, styles, theme)
    return to_bytes(sheet, kind, theme)


def _styles(
    firsts: Sequence[str], others: Sequence[tuple[str, ...]], marked: bool, theme: Theme
) -> dict[tuple[str, tuple[str, ...]], Style]:
    """Colour by the first key, dashes and markers by the others; more colours than the theme has come from a scale."""
    if len(firsts) <= len(theme.lines):
        colours = list(theme.lines)
    else:
        start, end = (0.25, 1.0) if theme is DARK else (0.05, 0.9)  # neither the ground's own darkness nor its light
        shares = [start + (end - start) * at / (len(firsts) - 1) for at in range(len(firsts))]
        colours = [to_hex(colormaps["viridis"](share)) for share in shares]
    return {
        (first, other): Style(
            colours[place],
            DASHES[index % len(DASHES)],
            MARKERS[index % len(MARKERS)] if marked else None,
        )
        for place, first in enumerate(firsts)
        for index, other in enumerate(others)
    }


def _draw(axis: Axes, curve: Curve, style: Style, log: bool, theme: Theme) -> None:
    points = [(step, value) for step, value in curve.points if math.isfinite(value) and (value > 0 or not log)]
    if not points:
        return
    marker = style.marker or ("o" if len(points) == 1 else None)
    axis.plot(
        *zip(*points, strict=True),
        color=style.colour,
        linestyle=style.dashes,
        linewidth=1.5,
        marker=marker,
        markersize=4.2,
        markevery=max(1, math.ceil(len(points) / MOST_MARKS)),
        markeredgewidth=0,
        zorder=3,
    )
    kept = [(step, value) for step, value in points if step == curve.kept]
    if kept:
        axis.plot(
            *kept[-1],
            "o",
            markersize=7.5,
            markerfacecolor="none",
            markeredgecolor=style.colour,
            markeredgewidth=1.1,
            zorder=4,
        )


def _locator(values: Sequence[float], log: bool) -> Any:
    """Ticks that a reader can read a value from: on a log axis over less than a decade, round numbers in between."""
    finite = [value for value in values if math.isfinite(value)]
    if log and finite and max(finite) / min(finite) > 8:
        return LogLocator(subs=(1.0, 2.0, 5.0), numticks=12)
    return MaxNLocator(6)


def _key(
    sheet: Figure,
    keys: Sequence[str],
    firsts: Sequence[str],
    others: Sequence[tuple[str, ...]],
    styles: Mapping[tuple[str, tuple[str, ...]], Style],
    theme: Theme,
) -> None:
    """Above the panels, a line of colours for the first key and a line of dashes and markers for the others."""
    lines = [(first, styles[first, others[0]]) for first in firsts]
    groups = [(keys[0], [(name, Style(style.colour, "solid", None)) for name, style in lines])]
    if len(keys) > 1:
        drawn = [(", ".join(other), styles[firsts[0], other]) for other in others]
        plain = [(name, Style(theme.muted, style.dashes, style.marker)) for name, style in drawn]
        groups.append((", ".join(keys[1:]), plain))
    columns = min(KEY_COLUMNS, max(len(entries) for _, entries in groups))
    table: list[list[tuple[str, Style | None]]] = []
    for name, entries in groups:
        for start in range(0, len(entries), columns):
            part: list[tuple[str, Style | None]] = list(entries[start : start + columns])
            part += [("", None)] * (columns - len(part))
            table.append([(name if start == 0 else "", None), *part])
    # The legend of matplotlib fills its columns one after another.
    cells = [row[column] for column in range(columns + 1) for row in table]
    none = Line2D([], [], linestyle="none")
    handles = [
        none
        if style is None
        else Line2D(
            [], [], color=style.colour, linestyle=style.dashes, marker=style.marker, markersize=4.2, linewidth=1.6
        )
        for _, style in cells
    ]
    legend = sheet.legend(
        handles,
        [text_label(name, 30 if style is None else 16) for name, style in cells],
        loc="outside upper left",
        ncols=columns + 1,
        frameon=False,
        fontsize=9,
        labelcolor=theme.ink,
        handlelength=2.6,
        columnspacing=1.1,
        borderpad=0.2,
    )
    for text, (_, style) in zip(legend.get_texts(), cells, strict=True):
        if style is None:
            text.set_color(theme.muted)
            text.set_x(-32)  # where its line would be


def heat_maps_chart(maps: Sequence[HeatMap], keys: Sequence[str], *, kind: Format = "svg", dark: bool = False) -> bytes:
    """Each measure as a table whose cells are the stronger coloured the better; the best one is framed.

    A measure that does not rank cells has no frame, and the higher its values the stronger their colour.

    Args:
        maps: measures over the same two keys.
        keys: names of the two keys: down, and across.
        kind: "svg" (transparent) or "png" (opaque).
        dark: colours for a dark ground.

    Raises:
        ValueError: there is no map.
    """
    if not maps:
        raise ValueError("no map to draw")
    theme = theme_for(dark)
    rows, columns = len(maps[0].rows), len(maps[0].columns)
    wide = 0.9 + 0.82 * columns
    across = max(1, min(len(maps), int(11 // wide)))
    down = math.ceil(len(maps) / across)
    size = (max(across * wide, 3.2), down * (0.95 + 0.36 * rows))
    sheet = Figure(figsize=size, layout=layout(0.08))
    axes = sheet.subplots(down, across, squeeze=False)
    for place, axis in enumerate(axes.flat):
        if place >= len(maps):
            axis.set_visible(False)
            continue
        _heat_map(axis, maps[place], theme)
        axis.set_xlabel(text_label(keys[1], 30), color=theme.muted, fontsize=9)
        if place % across == 0:
            axis.set_ylabel(text_label(keys[0], 30), color=theme.muted, fontsize=9)
    return to_bytes(sheet, kind, theme)


def _heat_map(axis: Axes, shown: HeatMap, theme: Theme) -> None:
    scale = LinearSegmentedColormap.from_list("vqgen", [theme.grid, theme.best])
    strengths = _strengths(shown)
    best = max(strengths.values(), default=0.0)
    for down, row in enumerate(shown.rows):
        for across, column in enumerate(shown.columns):
            strength = strengths.get((row, column))
            colour = "none" if strength is None else scale(0.85 * strength)
            axis.add_patch(Rectangle((across - 0.5, down - 0.5), 1, 1, facecolor=colour, edgecolor=theme.ground, lw=2))
            leads = strength is not None and strength == best and shown.better is not None
            if leads:
                axis.add_patch(
                    Rectangle((across - 0.46, down - 0.44), 0.92, 0.88, facecolor="none", edgecolor=theme.ink, lw=1.3)
                )
            axis.text(
                across,
                down,
                "-" if strength is None else shown.write(shown.values[row, column]),
                ha="center",
                va="center",
                fontsize=9,
                fontweight="bold" if leads else "normal",
                color=theme.ink
                if strength is None
                else max((theme.ink, theme.on_best), key=partial(_contrast, colour)),
            )
    quiet(axis, theme)
    axis.spines["bottom"].set_visible(False)
    axis.set_xlim(-0.5, len(shown.columns) - 0.5)
    axis.set_ylim(len(shown.rows) - 0.5, -0.5)
    axis.set_xticks(range(len(shown.columns)), [text_label(text, 12) for text in shown.columns])
    axis.set_yticks(range(len(shown.rows)), [text_label(text, 16) for text in shown.rows])
    wish = f"{shown.better}er is better" if shown.better else "not ranked"
    axis.set_title(
        f"{text_label(shown.title, 40)}\n", loc="left", fontsize=10, fontweight="bold", color=theme.ink, pad=2
    )
    axis.annotate(
        wish, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", color=theme.muted, fontsize=8.5
    )


def _contrast(ground: Any, text: str) -> float:
    """Contrast ratio of two colours (WCAG 2.1)."""
    low, high = sorted(map(_luminance, (ground, text)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: Any) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _strengths(shown: HeatMap) -> dict[tuple[str, ...], float]:
    """How good each cell is among its neighbours, from 0 to 1; how high, where cells are not ranked."""
    logs = shown.log and all(value > 0 for value in shown.values.values())
    scaled = {place: math.log(value) if logs else value for place, value in shown.values.items()}
    low, high = min(scaled.values()), max(scaled.values())
    span = high - low or 1.0
    return {place: (high - v if shown.better == "low" else v - low) / span for place, v in scaled.items()}
