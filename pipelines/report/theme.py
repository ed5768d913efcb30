"""What all charts share: their colours on a light and a dark ground, their quiet axes, and how they become bytes.

SVG charts have a transparent ground and come in a light and a dark variant; PNG charts are opaque, for files that
are looked at alone. The same figures give the same bytes. Figures are made without pyplot, so that nothing is
left open and no backend is chosen.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

Format = Literal["svg", "png"]


@dataclass(frozen=True)
class Theme:
    """Colours that are readable on one ground."""

    ground: str
    ink: str
    muted: str
    grid: str
    bar: str
    best: str
    on_best: str
    lines: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1f2730", "#5d6873", "#dfe3e8", "#b4c6de", "#2b66ad", "#ffffff",
    ("#2b66ad", "#c2512f", "#2f8057", "#8455a8", "#a5760a", "#2b808c"),
)  # fmt: skip
DARK = Theme(
    "#14181d", "#e4e8ec", "#9aa5b1", "#303841", "#3c5373", "#78aceb", "#10161d",
    ("#78aceb", "#ee8a68", "#6cc296", "#bd92e0", "#dcb04e", "#66bfcb"),
)  # fmt: skip
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)))
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


def theme_for(dark: bool) -> Theme:
    """The colours for a dark ground, or for a light one."""
    return DARK if dark else LIGHT


def layout(gap: float) -> ConstrainedLayoutEngine:
    """Panels as large as their labels allow, ``gap`` of a panel's height apart."""
    return ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05, hspace=gap, wspace=0.04)


def quiet(axis: Axes, theme: Theme) -> None:
    """No frame, no ticks, muted labels, the grid behind the data."""
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(theme.grid)
    axis.tick_params(length=0, labelcolor=theme.muted, labelsize=9)
    axis.tick_params(axis="y", labelcolor=theme.ink)
    axis.set_axisbelow(True)
    axis.patch.set_alpha(0)


def text_label(text: str, most: int) -> str:
    """``text`` for a label: printable, at most ``most`` characters, its dollar signs no formula."""
    text = "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in text)
    if len(text) > most:
        text = f"{text[: most - 1]}…"
    return text.replace("$", r"\$")


def to_bytes(sheet: Figure, kind: Format, theme: Theme) -> bytes:
    """The drawing as SVG whose text is text in the reader's own font, or as PNG at twice the screen's resolution."""
    buffer = io.BytesIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "vqgen"}
    settings |= {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"]}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's font may well have it
        if kind == "png":
            sheet.savefig(buffer, format="png", dpi=192, facecolor=theme.ground, metadata={"Software": None})
            return buffer.getvalue()
        unstamped = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        sheet.savefig(buffer, format="svg", transparent=True, metadata=unstamped)
    return _numbered_clips(buffer.getvalue()).replace(b"'DejaVu Sans', sans-serif", SANS.encode())


def _numbered_clips(svg: bytes) -> bytes:
    """``svg`` with clipping areas named in their order: their own names are hashes of places before rounding, which the
    layout's solver does not give alike each time."""
    names: dict[bytes, bytes] = {}

    def number(found: re.Match[bytes]) -> bytes:
        return names.setdefault(found[0], b"clip-%d" % len(names))

    return re.sub(rb'(?<=url\(#)p[0-9a-f]{10}(?=\))|(?<=<clipPath id=")p[0-9a-f]{10}(?=")', number, svg)
