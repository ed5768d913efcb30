"""How the bits of single images are spread under each prior: outlines over one another, one panel per level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipelines.report.columns import BASELINES
from pipelines.report.theme import DASHES, Format, Theme, layout, quiet, text_label, theme_for, to_bytes

BINS = (12, 60)
"""Fewest and most bins; in between, about as many as the root of the number of images."""
TAIL = 0.002
"""Share of the images at either end that may lie outside the panel, counted in its last bin."""

Values = npt.NDArray[np.float64]


def bits_histograms(
    bits: Mapping[str, Mapping[str, Values]], *, names: Sequence[str] = (), kind: Format = "svg", dark: bool = False
) -> bytes:
    """Histograms of bits per image.

    A prior that costs every image the same is a line. The few images beyond the ends of a panel are counted in its
    outermost bins.

    Args:
        bits: by level, then by prior: (B,) bits of each image, finite.
        names: priors in the order of their colours, so that charts agree; default: as they come.
        kind: "svg" (transparent) or "png" (opaque).
        dark: colours for a dark ground.

    Raises:
        ValueError: there are none.
    """
    bits = {level: {name: np.asarray(values) for name, values in of.items()} for level, of in bits.items() if of}
    if not bits:
        raise ValueError("no prior has bits per image")
    theme = theme_for(dark)
    found = dict.fromkeys([*names, *(name for of in bits.values() for name in of)])
    order = [name for name in found if name not in BASELINES]
    styles = {name: _style(place, theme) for place, name in enumerate(order)}
    styles |= {"unigram": (theme.muted, DASHES[1]), "uniform": (theme.muted, DASHES[0])}
    sheet = Figure(figsize=(7.6, 2.0 * len(bits) + 0.6), layout=layout(0.08))
    axes = sheet.subplots(len(bits), 1, squeeze=False)[:, 0]
    for axis, (level, by_prior) in zip(axes, bits.items(), strict=True):
        _panel(axis, by_prior, styles, theme)
        title = "all levels" if level == "all" else text_label(level, 24)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=theme.ink)
    axes[-1].set_xlabel("bits per image (fewer is better)", color=theme.muted, fontsize=9)
    sheet.supylabel("share of test images", color=theme.muted, fontsize=9)
    shown = [name for name in (*order, *BASELINES) if any(name in of for of in bits.values())]
    labels = [text_label(name, 26) for name in shown]
    sheet.legend(
        [Line2D([], [], color=styles[name][0], linestyle=styles[name][1]) for name in shown],
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
    return to_bytes(sheet, kind, theme)


def _style(place: int, theme: Theme) -> tuple[str, Any]:
    return theme.lines[place % len(theme.lines)], DASHES[place // len(theme.lines) % 3]


def _panel(axis: Axes, by_prior: Mapping[str, Values], styles: Mapping[str, tuple[str, Any]], theme: Theme) -> None:
    spread = {name: values for name, values in by_prior.items() if np.ptp(values) > 1e-9 * max(1.0, values.max())}
    ends = [end for values in spread.values() for end in np.quantile(values, (TAIL, 1 - TAIL))]
    ends += [values[0] for name, values in by_prior.items() if name not in spread]
    low, high = min(ends), max(ends)
    margin = 0.02 * (high - low) or 0.5
    bins = int(np.clip(1.6 * max(map(len, by_prior.values())) ** 0.5, *BINS))
    edges = np.linspace(low - margin, high + margin, bins + 1)
    for name, values in by_prior.items():
        colour, dashes = styles[name]
        if name in spread:
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            axis.stairs(counts / len(values), edges, color=colour, linestyle=dashes, linewidth=1.5, zorder=3)
        else:
            axis.axvline(values[0], color=colour, linestyle=dashes, linewidth=1.2, zorder=2)
    quiet(axis, theme)
    axis.grid(axis="y", color=theme.grid, linewidth=0.8)
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if axis.get_ylim()[1] > 0.04 else 1))
