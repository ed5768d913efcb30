"""The comparison as one self-contained HTML page: no script, no style, font or picture from elsewhere.

Charts are SVG in a light and a dark variant, sample grids are PNG, both as data URIs. All text goes through Jinja2's
escaping; the page's own content security policy forbids whatever could slip past it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.report import plots
from pipelines.report.columns import figure
from pipelines.report.figures import Chart, Section, Sections
from pipelines.report.legend import held_out, legend
from pipelines.report.tables import ANCHORS, MISSING, Table, arrange, by_bits, levels_of
from vqgen.files import write_text

ORDER = (
    *("bits", "histograms", "curves", "four-way", "samples", "neighbours"),
    *("reconstructions", "code-maps", "code-use", "positions"),
)
"""Sections after the tables, as they are read: what priors know, what they draw, and what they were given."""
_PROVENANCE = {
    "created": "created",
    "command": "command",
    "seed": "seed",
    "data": "data",
    "split": "split",
    "images": "images measured",
    "images_available": "images in the split",
    "pixels": "pixels",
    "data_fingerprint": "data's fingerprint",
    "codec_fingerprint": "codec's fingerprint",
    "decoder_bits_per_dim": "decoder's share, bits/dim",
    "label_bits_per_image": "label, bits/image",
    "quality": "sample quality",
    "budget": "training budget",
    "vqgen": "vqgen",
    "torch": "torch",
    "python": "python",
}


_ELSEWHERE = ("notices", "memory")
"""What the page says beside the figures it is about."""


def write_page(
    path: Path,
    comparison: Mapping[str, Any],
    sections: Sections | None = None,
    curves: Sequence[Mapping[str, Any]] = (),
    highlights: Sequence[str] = (),
) -> None:
    """Write the page to ``path``, whole or not at all.

    Args:
        path: the HTML file; an older one is replaced.
        comparison: the content of compare.json.
        sections: what there is to be seen, as `pipelines.comparison_figures` makes it.
        curves: learning curves, as `plots.learning_curves` takes them; without points the section is left out.
        highlights: sentences at the top of the page.
    """
    provenance = comparison.get("provenance") or {}
    shown = [_bits(comparison["rows"]), _curves(curves), *(sections.sections if sections else ())]
    found = {section.key: section for section in shown if section is not None}
    ordered = [found[key] for key in (*ORDER, *(key for key in found if key not in ORDER)) if key in found]
    tables = arrange(comparison)
    page = (
        Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        .get_template("page.html")
        .render(
            run=str(comparison.get("run") or "run"),
            created=provenance.get("created"),
            statement=held_out(provenance),
            highlights=list(highlights),
            notices=list(provenance.get("notices") or ()),
            tables=[(table, _below(table, comparison)) for table in tables],
            heading={"all": "all levels", ANCHORS: "anchors: no prior's samples"},
            anchors=ANCHORS,
            missing=MISSING,
            sections=ordered,
            notes=legend(comparison),
            provenance=_provenance(provenance),
        )
    )
    # File names may hold what UTF-8 cannot; it becomes a question mark.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


def _below(table: Table, comparison: Mapping[str, Any]) -> str:
    """What stands under a table: how its figures are to be read."""
    provenance = comparison.get("provenance") or {}
    if table.key == "likelihood":
        return (
            "Marked: the best trained prior of each level. Muted: the baselines that set the scale. ≤ is an upper "
            "bound. Fewer bits are better."
        )
    if table.key == "quality":
        return _quality_note(provenance.get("quality") or {}, any(group.title == ANCHORS for group in table.groups))
    if table.key == "cost":
        equal = (provenance.get("budget") or {}).get("equal")
        said = " Every prior had the same budget." if equal else " The priors' budgets differ."
        budget = "" if equal is None else said
        text = "Time is that of training steps alone. On 'all levels', parameters, time and steps are sums."
        return f"{text}{budget}"
    bits, ratio = (figure(comparison.get("codes") or {}, key) for key in ("bits_per_image", "ratio"))
    raw = f" ({bits * ratio:,.0f} bits, 8 for each value)" if bits is not None and ratio is not None else ""
    return (
        f"Ratios are bits of a raw image{raw} over bits of its codes, without any header. All lines give back the same "
        "reconstructions, hence one PSNR and SSIM."
    )


def _quality_note(made: Mapping[str, Any], anchors: bool) -> str:
    parts = ["Marked: the best of the trained priors; nothing else is ranked."]
    if made.get("extractor"):
        weights = f", weights {str(made['weights'])[:12]}" if made.get("weights") else ""
        parts.append(f"Features: {made['extractor']}{weights}.")
    counts = [(figure(made, "samples"), "samples"), (figure(made, "test_images"), "test images")]
    known = [f"{count:,.0f} {what}" for count, what in counts if count is not None]
    if known:
        parts.append(f"Each line holds {' against '.join(known)}.")
    if anchors:
        parts.append(
            "The anchors say how to read a column: training images are as good as samples can be, reconstructions as "
            "good as samples through this codec can be."
        )
    return " ".join(parts)


def _bits(rows: Sequence[Mapping[str, Any]]) -> Section | None:
    rows = [row for row in rows if figure(row, "bits_per_code") is not None]
    if not rows:
        return None
    levels = [
        f"{level}: {', '.join(_words(row) for row in sorted(rows, key=by_bits) if row['level'] == level)}"
        for level in levels_of(rows)
    ]
    chart = Chart(
        "",
        "The dashed line is what position alone explains. How far a bar ends to its left is what the prior has learned "
        "of how codes go together.",
        plots.bits_chart(rows),
        plots.bits_chart(rows, dark=True),
        f"Bar chart of bits per code. {'; '.join(levels)}.",
    )
    return Section("bits", "Bits per code", "", (chart,))


def _words(row: Mapping[str, Any]) -> str:
    return f"{row['prior']} {'at most ' if row['likelihood'] == 'bound' else ''}{figure(row, 'bits_per_code'):.2f}"


def _curves(curves: Sequence[Mapping[str, Any]]) -> Section | None:
    try:
        light, dark = (plots.learning_curves(curves, dark=dark) for dark in (False, True))
    except ValueError:
        return None
    names = ", ".join(dict.fromkeys(str(curve["prior"]) for curve in curves))
    caption = (
        "Bits per code on the validation split, which chooses the checkpoint, against optimiser steps and against "
        "training time. A dot is a prior's lowest point."
    )
    alt = f"Line charts of validation bits per code against steps and against training time, for {names}."
    return Section("curves", "Learning curves", "", (Chart("", caption, light, dark, alt, wide=True),))


def _provenance(provenance: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Names and lines of text, the known ones first and in a fixed order."""
    shown = [key for key in provenance if key not in _ELSEWHERE]
    keys = [key for key in _PROVENANCE if key in shown] + [key for key in shown if key not in _PROVENANCE]
    return [(_PROVENANCE.get(key, key.replace("_", " ")), _lines(provenance[key])) for key in keys]


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        given = {str(key).replace("_", " "): item for key, item in value.items() if item is not None}
        return [f"{key}: {'; '.join(_lines(item))}" for key, item in given.items()] or [MISSING]
    if isinstance(value, (list, tuple)):
        return [line for item in value for line in _lines(item)] or [MISSING]
    if value is None or value == "":
        return [MISSING]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, float):
        return [f"{value:.4f}"]
    if isinstance(value, int) and value >= 10_000:
        return [f"{value:,}"]
    return [str(value)]
