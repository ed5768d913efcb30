"""Bits by position: for one level, a map of each prior, all on one colour scale."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines.report.theme import Format, layout, text_label, theme_for, to_bytes

MOST_COLUMNS = 5
COLOURS = "cividis"

Values = npt.NDArray[np.float64]


def position_maps(maps: Mapping[str, Values], *, kind: Format = "svg", dark: bool = False) -> bytes:
    """A panel for each prior with its mean in the title, and one colour bar with numbers.

    Args:
        maps: by prior: (h, w) mean bits of the code at each place, all of one shape, finite.
        kind: "svg" (transparent) or "png" (opaque).
        dark: colours for a dark ground.

    Raises:
        ValueError: there are none.
    """
    if not maps:
        raise ValueError("no prior has bits by position")
    theme = theme_for(dark)
    columns = min(MOST_COLUMNS, len(maps))
    rows = math.ceil(len(maps) / columns)
    height, width = next(iter(maps.values())).shape
    across = 1.4
    down = across * min(max(height / width, 0.3), 3.0)
    sheet = Figure(figsize=(across * columns + 1.1, (down + 0.42) * rows + 0.15), layout=layout(0.04))
    axes = sheet.subplots(rows, columns, squeeze=False)
    low = min(float(values.min()) for values in maps.values())
    high = max(float(values.max()) for values in maps.values())
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    for axis in axes.flat:
        axis.set_axis_off()
    drawn = None
    for axis, (name, values) in zip(axes.flat, maps.items(), strict=False):
        # Without resampling a picture keeps one pixel a code, and the page enlarges it with hard edges.
        drawn = axis.imshow(values, cmap=COLOURS, vmin=low, vmax=high, interpolation="none")
        title = f"{text_label(name, 22)}\n{values.mean():.2f}"
        axis.set_title(title, loc="left", fontsize=8.5, color=theme.ink, linespacing=1.3)
    assert drawn is not None
    bar = sheet.colorbar(drawn, ax=axes, shrink=0.9, aspect=18, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=theme.ink, labelsize=8.5)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.set_label("bits per code", color=theme.muted, fontsize=9)
    return to_bytes(sheet, kind, theme)
