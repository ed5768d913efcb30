"""The comparison as tables: one arrangement of rows, columns and marks, shown on a terminal, in Markdown and on the
page.

``comparison`` is the content of ``compare.json``: ``{"run", "rows", "anchors", "reconstruction", "codes",
"provenance"}``, each row flat, a figure that was not computed ``None``. Likelihoods are in bits, times in seconds,
memory in bytes. Nothing is computed here: figures are only put in order, rounded and marked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.columns import DIM, KIND, TABLES, Column, Row, TableSpec, figure, is_trained
from pipelines.report.legend import legend
from priors.registry import SOURCES

MISSING = "-"
TRAINED, SCALE, ANCHORS = "trained priors", "without training", "anchors"
"""Groups of the table of sample quality: the anchors are figures of data or reconstructions, which no prior made."""
PLAIN_CODES = "codes at log2 K"
"""The line of codes that are stored as they are."""

_LEVELS = ("top", "middle", "bottom", "all")


@dataclass(frozen=True)
class Cell:
    """One figure as text, its standard error apart; ``best`` among the trained priors of its level."""

    text: str
    error: str = ""
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text} {self.error}".strip()


@dataclass(frozen=True)
class Line:
    """One prior at one level; ``best`` where it is the best trained one in the table's first column."""

    prior: str
    level: str
    trained: bool
    best: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Lines that belong together: those of one level, fewest bits per code first, or those of one kind."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Table:
    """One table: columns that have a figure, and groups of lines."""

    key: str
    title: str
    columns: tuple[Column, ...]
    groups: tuple[Group, ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        return tuple(line for group in self.groups for line in group.lines)


def levels_of(rows: Iterable[Row]) -> list[str]:
    """The levels in ``rows``, coarse to fine, ``all`` last."""
    found = dict.fromkeys(str(row["level"]) for row in rows)
    return sorted(found, key=lambda level: _LEVELS.index(level) if level in _LEVELS else len(_LEVELS) - 1.5)


def by_bits(row: Row) -> tuple[bool, float, str]:
    """Sorting key: fewest bits per code first, rows without a likelihood last."""
    bits = figure(row, "bits_per_code")
    return bits is None, bits or 0.0, str(row["prior"])


def arrange(comparison: Mapping[str, Any], *, full: bool = True, at_most: str = "≤") -> list[Table]:
    """The comparison's tables, those with a figure: lines in order, figures rounded and marked.

    Columns stand only where some line has a figure. Only trained priors are held against each other.

    Args:
        comparison: the content of compare.json.
        full: every column; False leaves out what a terminal has no room for.
        at_most: the sign before upper bounds.
    """
    tables = []
    for spec in TABLES:
        grouped = [(title, rows) for title, rows in _grouped(comparison, spec) if rows]
        shown = [row for _, rows in grouped for row in rows]
        columns = tuple(
            column
            for column in (spec.columns if full else spec.terminal)
            if any(row.get(column.key) is not None for row in shown)
        )
        if any(column is not KIND for column in columns):
            groups = tuple(_group(title, rows, columns, at_most) for title, rows in grouped)
            tables.append(Table(spec.key, spec.title, columns, groups))
    return tables


def _grouped(comparison: Mapping[str, Any], spec: TableSpec) -> list[tuple[str, list[Row]]]:
    """The rows of one table under the titles of their groups, in order."""
    rows = [*comparison["rows"]]
    if spec.key in ("likelihood", "cost"):
        # What no prior drew has neither.
        own = [row for row in rows if row["prior"] not in SOURCES]
        return [(level, sorted((row for row in own if row["level"] == level), key=by_bits)) for level in levels_of(own)]
    whole = sorted((row for row in rows if row["level"] == "all"), key=by_bits)
    if spec.key == "compression":
        return [("all", _compressed(comparison, [row for row in whole if figure(row, "bits_per_image") is not None]))]
    judged = [row for row in whole if any(row.get(column.key) is not None for column in spec.columns)]
    trained = sorted((row for row in judged if is_trained(row["prior"])), key=_by_distance)
    others = sorted((row for row in judged if not is_trained(row["prior"])), key=_by_distance)
    return [(TRAINED, trained), (SCALE, others), (ANCHORS, [*(comparison.get("anchors") or ())])]


def _by_distance(row: Row) -> tuple[bool, float, tuple[bool, float, str]]:
    """Sorting key: the smallest Fréchet distance first, rows without one last."""
    distance = figure(row, "frechet")
    return distance is None, distance or 0.0, by_bits(row)


def _compressed(comparison: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Codes as they are, then under each prior, each with what reconstructions of them are like.

    ``uniform`` spends what plain codes take, so that it has no line of its own beside them.
    """
    image = comparison.get("reconstruction") or {}
    quality = {key: image.get(key) for key in ("psnr", "ssim")}
    plain = comparison.get("codes")
    lines = [] if plain is None else [_plain_codes(plain)]
    return [{**row, **quality} for row in [*lines, *(row for row in rows if not plain or row["prior"] != "uniform")]]


def _plain_codes(codes: Mapping[str, Any]) -> Row:
    figures = {key: codes.get(key) for key in ("bits_per_image", "bytes_per_image", "bits_per_pixel")}
    return {"prior": PLAIN_CODES, "level": "all", "compression_ratio": codes.get("ratio"), **figures}


def _group(title: str, rows: Sequence[Row], columns: Sequence[Column], at_most: str) -> Group:
    ranked = [row for row in rows if title != ANCHORS and row["prior"] != PLAIN_CODES and is_trained(row["prior"])]
    best = {column.key: _best(ranked, column) for column in columns}

    def cell(row: Row, column: Column) -> Cell:
        value = row.get(column.key)
        if value is None:
            return Cell(MISSING)
        if isinstance(value, float) and not math.isfinite(value):
            return Cell(str(value))
        text = column.write(value)
        # Figures that print alike are marked alike.
        winner = row in ranked and figure(row, column.key) is not None and text == best[column.key]
        return Cell(_bounded(text, row, column, at_most), _error(row, column), winner)

    lines = []
    for row in rows:
        cells = tuple(cell(row, column) for column in columns)
        lines.append(Line(str(row["prior"]), str(row["level"]), row in ranked, cells[0].best, cells))
    return Group(title, tuple(lines))


def _best(rows: Sequence[Row], column: Column) -> str | None:
    values = [value for row in rows if (value := figure(row, column.key)) is not None]
    if not values or column.better is None:
        return None
    return column.write(min(values) if column.better == "low" else max(values))


def _bounded(text: str, row: Row, column: Column, at_most: str) -> str:
    """``text`` with the sign of a bound: bits are at most so many, and the ratio they give is at least so large."""
    if column is DIM:
        return f"{at_most} {text}"
    if row.get("likelihood") != "bound":
        return text
    if column.key in ("bits_per_code", "bits_per_image", "bytes_per_image", "bits_per_pixel"):
        return f"{at_most} {text}"
    if column.key == "compression_ratio":
        return f"{'≥' if at_most == '≤' else '>='} {text}"
    return text


def _error(row: Row, column: Column) -> str:
    value = figure(row, column.error) if column.error else None
    if value is None:
        return ""
    if value == 0:
        return "± 0"
    text = column.write(value)
    if float(text.replace(",", "")) == 0:
        digits = len(text.partition(".")[2])
        return f"± <{10**-digits:.{digits}f}"
    return f"± {text}"


def summary(comparison: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """For a terminal: title, column titles and text cells of each table, ``*`` before a figure that is the best.

    Bounds are written with ``<=``, which every terminal can print. Lines without a figure are left out.
    """
    tables = []
    for table in arrange(comparison, full=False, at_most="<="):
        first = "of" if table.key == "quality" else "level"
        cells = [
            [group.title, line.prior, *(f"* {cell}" if cell.best else str(cell) for cell in line.cells)]
            for group in table.groups
            for line in group.lines
            if any(cell.text != MISSING for cell in line.cells)
        ]
        titles = [first, "prior", *(column.title for column in table.columns)]
        if cells:
            tables.append((table.title, titles, cells))
    return tables


def to_markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown tables, the best trained prior's figures bold, and a legend of their units."""
    parts = []
    for table in arrange(comparison):
        first = "of" if table.key == "quality" else "level"
        lines = [[first, "prior", *(column.title for column in table.columns)]]
        lines.append([":--", ":--", *("--:" for _ in table.columns)])
        for group in table.groups:
            for line in group.lines:
                figures = [f"**{escaped(str(cell))}**" if cell.best else escaped(str(cell)) for cell in line.cells]
                lines.append([escaped(group.title), escaped(line.prior), *figures])
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {table.title}\n\n{body}")
    notes = "\n".join(f"- {name}: {escaped(text)}" for name, text in legend(comparison))
    return "\n\n".join([*parts, f"## Units and terms\n\n{notes}"]) + "\n"


def escaped(text: str) -> str:
    """``text`` as Markdown shows it: no markup, no new cell, no new line."""
    text = " ".join(text.split())
    return "".join(f"\\{mark}" if mark in "\\`*_[]|<>" else mark for mark in text)
