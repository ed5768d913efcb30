"""Where in an image the bits are: each level's bits per code, enlarged to the image and beside it.

One colour scale serves every level and image of the picture, so that a bright cell means as many bits anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import repeat
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from pipelines.report.theme import layout, text_label, theme_for, to_bytes
from pipelines.scoring.tables import Scores, set_name
from vqgen.codec import HierarchicalVQVAE
from vqgen.image_split import spread
from vqgen.images import to_array, to_pil

ROWS = 8
COLOURS = "magma"
_BRIGHTEST = 0.995
"""Quantile of the bits shown that has the brightest colour."""


def enlarged(bits: Tensor, codec: HierarchicalVQVAE, level: int) -> Tensor:
    """Bits (h, w) of a level's codes on the pixels (H, W) that each one's cell covers."""
    stride = codec.config.strides[level]
    pixels = repeat(bits, "h w -> (h r) (w s)", r=stride, s=stride)
    return pixels[: codec.spec.height, : codec.spec.width]


def shown_rows(scores: Scores, count: int) -> list[int]:
    """At most ``count`` of the scored images, from the fewest total bits to the most, evenly spread over the ranks."""
    order = np.argsort(scores.columns["total_bits"].numpy(), kind="stable")
    return spread(order.astype(np.int64), count)


def map_pictures(scored: Sequence[Scores], codec: HierarchicalVQVAE) -> bytes:
    """A PNG with images and their maps, fewest total bits at the top: two sets side by side, or one in two halves."""
    theme = theme_for(False)
    names = [level.name for level in codec.levels if all(level.name in scores.maps for scores in scored)]
    blocks = [(scores, rows) for scores in scored for rows in _halves(scores, len(scored))]
    longest = max(len(rows) for _, rows in blocks)
    every = torch.cat([scores.maps[name][rows].flatten() for scores, rows in blocks for name in names])
    scale = Normalize(0.0, max(float(every.quantile(_BRIGHTEST)), 1e-9))
    across = 1 + len(names)
    cell = 1.05
    widths = [across * cell + 0.9] * len(blocks) + [0.75]
    sheet = Figure(figsize=(sum(widths), longest * cell + 0.6), layout=layout(0.02))
    halves = sheet.subfigures(1, len(blocks) + 1, squeeze=False, width_ratios=widths)[0]
    last = None
    for half, (scores, rows) in zip(halves, blocks, strict=False):
        axes = half.subplots(longest, across, squeeze=False)
        half.suptitle(set_name(scores.images), fontsize=10, fontweight="bold", color=theme.ink)
        pictures = _pictures(scores, rows)
        for place in range(longest):
            for axis in axes[place]:
                axis.set_axis_off()
            if place >= len(rows):
                continue
            row = rows[place]
            axes[place, 0].imshow(pictures[place], cmap="gray", vmin=0, vmax=255)
            axes[place, 0].text(
                -0.08, 0.5, _caption(scores, row), transform=axes[place, 0].transAxes, ha="right", va="center",
                fontsize=7.5, color=theme.ink,
            )  # fmt: skip
            for column, name in enumerate(names, 1):
                level = [spec.name for spec in codec.levels].index(name)
                bits = enlarged(scores.maps[name][row], codec, level).numpy()
                last = axes[place, column].imshow(bits, cmap=COLOURS, norm=scale, interpolation="nearest")
        for column, name in enumerate(["image", *names]):
            axes[0, column].set_title(name, fontsize=8.5, color=theme.muted)
    assert last is not None
    place_of_bar = halves[-1].add_axes((0.12, 0.2, 0.16, 0.6))
    bar = halves[-1].colorbar(last, cax=place_of_bar, extend="max")
    bar.set_label("bits per code", color=theme.muted, fontsize=9)
    bar.ax.tick_params(labelsize=8, labelcolor=theme.muted, length=0)
    bar.outline.set_visible(False)
    return to_bytes(sheet, "png", theme)


def _halves(scores: Scores, sets: int) -> list[list[int]]:
    """The rows of each block of a set: one block beside another set's, else two where there are enough images."""
    rows = shown_rows(scores, ROWS if sets > 1 else 2 * ROWS)
    middle = (len(rows) + 1) // 2
    return [rows] if sets > 1 or len(rows) < 4 else [rows[:middle], rows[middle:]]


def _pictures(scores: Scores, rows: Sequence[int]) -> list[npt.NDArray[Any]]:
    """The images of some rows as arrays to be drawn, alpha laid over white."""
    places = sorted(scores.places[row] for row in rows)
    kept, images = scores.images.read(places)
    by_place = dict(zip(kept, images, strict=True))
    drawn = []
    for row in rows:
        image = by_place[scores.places[row]]
        pixels = to_array(to_pil(image), 1 if len(image) <= 2 else 3)
        drawn.append(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return drawn


def _caption(scores: Scores, row: int) -> str:
    place = scores.places[row]
    names = scores.images.names
    label = "" if names is None else f"\n{text_label(names[place], 12)}"
    return f"{place}{label}\n{float(scores.columns['total_bits'][row]):,.0f} bits"
