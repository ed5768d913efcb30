"""Charts of a codec alone: how often each code of each level is used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from torch import Tensor

from pipelines.report.theme import DASHES, Format, Theme, layout, quiet, text_label, theme_for, to_bytes
from vqgen.metrics import CodeUsage

MOST_STEPS = 512
"""Steps of a curve; a larger codebook is shown by that many of its codes, evenly spread over the sorted ones."""


def use_chart(counts: Mapping[str, Tensor], *, kind: Format = "svg", dark: bool = False) -> bytes:
    """How often each code is used, most used first, one panel per level; equal use is a line across.

    Uses are multiples of what each code would have if all were used equally, on a log axis that the panels share.
    The title of a panel gives the level's perplexity and its codes that were never used, which stand at the right.

    Args:
        counts: by level, (K,) uses of each code.
        kind: "svg" (transparent) or "png" (opaque).
        dark: colours for a dark ground.
    """
    theme = theme_for(dark)
    shown = {level: _multiples(uses) for level, uses in counts.items()}
    used = np.concatenate([*(ratios[ratios > 0] for ratios in shown.values()), [0.1, 10]])
    floor, ceiling = float(used.min()) / 1.4, float(used.max()) * 1.1
    sheet = Figure(figsize=(6.4, 1.75 * len(counts) + 0.35), layout=layout(0.1))
    axes = sheet.subplots(len(counts), 1, sharey=True, squeeze=False)[:, 0]
    for axis, (level, uses) in zip(axes, counts.items(), strict=True):
        _panel(axis, shown[level], floor, theme)
        axis.set_title(text_label(level, 24), loc="left", fontsize=10, fontweight="bold", color=theme.ink)
        axis.set_title(_summary(uses), loc="right", fontsize=9, color=theme.muted)
    axes[0].set_ylim(floor, ceiling)
    axes[-1].set_xlabel("codes, most used first", color=theme.muted, fontsize=9)
    return to_bytes(sheet, kind, theme)


def _multiples(counts: Tensor) -> npt.NDArray[np.float64]:
    """(K,) uses of each code over those of equal use, most used first; zeros where nothing was counted."""
    uses = np.sort(counts.cpu().numpy().astype(np.float64))[::-1]
    return uses * (len(uses) / max(float(uses.sum()), 1.0))


def _summary(counts: Tensor) -> str:
    usage = CodeUsage(len(counts))
    usage.counts = counts.cpu()
    if usage.dead == len(counts):
        return "no codes counted"
    return f"perplexity {usage.perplexity:,.1f} of {len(counts):,}, {usage.dead:,} dead"


def _panel(axis: Axes, ratios: npt.NDArray[np.float64], floor: float, theme: Theme) -> None:
    size, used = len(ratios), int((ratios > 0).sum())
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=5))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}x"))
    axis.minorticks_off()
    quiet(axis, theme)
    axis.grid(axis="y", color=theme.grid, linewidth=0.8)
    axis.set_xlim(0, size)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if used:
        places = np.linspace(0, used - 1, min(used, MOST_STEPS)).round().astype(int)
        axis.stairs(ratios[places], np.append(places, used), baseline=floor, fill=True, color=theme.bar, zorder=2)
    if 0 < used < size:
        axis.axvspan(used, size, color=theme.grid, alpha=0.6, linewidth=0, zorder=1)
        if size - used > 0.1 * size:
            axis.text(
                (used + size) / 2, 0.06, "never used", transform=axis.get_xaxis_transform(),
                ha="center", va="bottom", fontsize=8, color=theme.muted, zorder=4,
            )  # fmt: skip
    axis.axhline(1, color=theme.best, linewidth=1.2, linestyle=DASHES[1], zorder=3)
    axis.annotate(
        "equal use", (1, 1), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=theme.best, zorder=4,
    )  # fmt: skip
