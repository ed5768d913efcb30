"""The cells of a sweep as a table: one arrangement of columns, shown on a terminal, in Markdown and as CSV.

``record`` is the content of sweep.json. Nothing is computed here: figures are put in order, rounded and marked.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.report.tables import escaped
from pipelines.sweep_grid import short_keys, text_of
from pipelines.sweep_record import DONE, FAILED
from vqgen.codes import MAX_LEVELS, level_names
from vqgen.files import csv_text

Record = Mapping[str, Any]

BROKEN_TITLE = 8
"""Characters of a title after which a terminal may break it."""
GAP = 3
"""Characters between two columns of a terminal's table."""


@dataclass(frozen=True)
class Column:
    """One figure of a cell: where it is in ``figures``, and how it is called, written and judged."""

    path: tuple[str, ...]
    title: str
    write: Callable[[float], str]
    better: Literal["low", "high"] | None = None
    short: str = ""
    """Its title on a terminal, where it is another one."""
    spare: int = 0
    """On a terminal that is too narrow, columns with the largest number are left out first; never those with 0."""

    @property
    def key(self) -> str:
        """Its name in a CSV file."""
        return ".".join(self.path)


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.995 else f"{value:.1%}"


NMSE = Column(("nmse",), "NMSE", _fixed(4), "low")
CODEC = (
    NMSE,
    Column(("mse",), "MSE", _fixed(5), "low", spare=6),
    Column(("psnr",), "PSNR", _fixed(2), "high", spare=1),
    Column(("decoder_bits_per_dim",), "decoder bits/dim", _fixed(3), "low", "bits/dim", spare=4),
)
COST = (
    Column(("steps",), "steps", _fixed(0), spare=2),
    Column(("seconds",), "seconds", _fixed(1), spare=5),
)


def perplexity(level: str) -> Column:
    """Perplexity of the codes of a level; cells of other codebook sizes are not ranked by it."""
    return Column((f"{level}_perplexity",), f"{level} perplexity", _fixed(1), short=f"{level} perp.")


def usage(level: str) -> Column:
    """Share of the codes of a level that are used."""
    return Column((f"{level}_usage",), f"{level} used", _percent, spare=3)


def bits(name: str, level: str, ranked: bool = False) -> Column:
    """Bits/code of a prior; cells are ranked by it where they share one codec."""
    path = ("priors", name, level, "bits_per_code")
    return Column(path, f"{name} {level} bits/code", _fixed(3), "low" if ranked else None)


def figure(cell: Record, *path: str) -> float | None:
    """The number at ``path`` of a cell's figures; None where it is missing or not finite."""
    value: Any = cell["figures"]
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def levels_of(cells: Sequence[Record]) -> list[str]:
    """Levels that some cell's codec has, coarse to fine."""
    return [
        level
        for level in level_names(MAX_LEVELS)
        if any(figure(cell, f"{level}_perplexity") is not None for cell in cells)
    ]


def priors_of(cells: Sequence[Record]) -> list[tuple[str, str]]:
    """(prior, level) of which some cell has bits/code."""
    trained = {
        (name, level): None
        for cell in cells
        for name, levels in (cell["figures"].get("priors") or {}).items()
        for level in levels
    }
    return [place for place in trained if any(figure(cell, *bits(*place).path) is not None for cell in cells)]


def same_codec(cells: Sequence[Record]) -> bool:
    """Whether all finished cells have one codec, so that bits of their codes can be compared."""
    return len({cell["figures"].get("codec") for cell in cells if cell["state"] == DONE}) == 1


def columns_of(record: Record) -> list[Column]:
    """The columns of the table, those without a figure left out."""
    cells = [cell for cell in record["cells"] if cell["state"] == DONE]
    shared = same_codec(cells)
    priors = [bits(name, level, ranked=shared) for name, level in priors_of(cells)]
    use = [column for level in levels_of(cells) for column in (perplexity(level), usage(level))]
    every = [*CODEC[:3], *use, CODEC[3], *priors, *COST]
    return [column for column in every if any(figure(cell, *column.path) is not None for cell in cells)]


def best_cell(record: Record) -> str | None:
    """Name of the finished cell with the lowest normalised MSE; with one codec and priors, with the fewest bits.

    Bits are the sum over the trained priors and levels.
    """
    cells = [cell for cell in record["cells"] if cell["state"] == DONE]
    priors = [bits(name, level).path for name, level in priors_of(cells)]
    paths = priors if priors and same_codec(cells) else [NMSE.path]
    scores: dict[str, float] = {}
    for cell in cells:
        values = [figure(cell, *path) for path in paths]
        if None not in values:
            scores[cell["name"]] = math.fsum(value for value in values if value is not None)
    return min(scores, key=scores.__getitem__) if scores else None


def _texts(record: Record, columns: Sequence[Column]) -> list[tuple[Record, list[str], list[bool]]]:
    """Per cell, its figures as text, and which of them are the best of their columns; what prints alike is alike."""
    best = [_best(record, column) for column in columns]
    rows = []
    for cell in record["cells"]:
        values = [figure(cell, *column.path) for column in columns]
        texts = ["-" if value is None else column.write(value) for column, value in zip(columns, values, strict=True)]
        rows.append((cell, texts, [text == top for text, top in zip(texts, best, strict=True)]))
    return rows


def _best(record: Record, column: Column) -> str | None:
    values = [value for cell in record["cells"] if (value := figure(cell, *column.path)) is not None]
    if not values or column.better is None:
        return None
    return column.write(min(values) if column.better == "low" else max(values))


def summary(record: Record, width: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Titles and text cells for a terminal of ``width`` characters, or for lines of any length; ``*`` is the best cell.

    What has no room is left out; it is in the other tables.
    """
    columns = columns_of(record)
    made = _lines(record, columns)
    while width is not None and _width(*made) > width and any(column.spare for column in columns):
        last = max(column.spare for column in columns)
        columns = [column for column in columns if column.spare != last]
        made = _lines(record, columns)
    return made


def _lines(record: Record, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    several = any(cell["state"] != DONE for cell in record["cells"])
    titles = ["", *short_keys(list(record["grid"])).values(), *(column.short or column.title for column in columns)]
    lines = [
        [
            "*" if cell["name"] == record["best"] else "",
            *(text_of(value) for value in cell["values"].values()),
            *texts,
            *[cell["state"]] * several,
        ]
        for cell, texts, _ in _texts(record, columns)
    ]
    return [*titles, *["state"] * several], lines


def _width(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> int:
    """Characters that the table needs at least, with long titles broken."""
    broken = [min(max(map(len, title.split()), default=0), BROKEN_TITLE) for title in titles]
    cells = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return sum(max(pair) + GAP for pair in zip(broken, cells, strict=True))


def sentences(record: Record) -> list[str]:
    """What the table says, and which cells failed of what."""
    cells = record["cells"]
    done = [cell for cell in cells if cell["state"] == DONE]
    said = []
    best = next((cell for cell in done if cell["name"] == record["best"]), None)
    if best is not None:
        if priors_of(done) and same_codec(done):
            parts = [f"{name} {level} {_bits(best, name, level)}" for name, level in priors_of(done)]
            said.append(f"Fewest bits: {best['title']} ({', '.join(parts)} bits/code).")
        else:
            said.append(f"Lowest normalised MSE: {best['title']} ({figure(best, 'nmse'):.4f}).")
    failed = [cell for cell in cells if cell["state"] == FAILED]
    said += [f"failed: {cell['title']}: {cell['message']}" for cell in failed]
    return said


def _bits(cell: Record, name: str, level: str) -> str:
    value = figure(cell, *bits(name, level).path)
    return "-" if value is None else f"{value:.3f}"


def to_markdown(record: Record, pictures: Sequence[str] = ()) -> str:
    """The table with the best of each column bold, what it says, its terms, and the pictures beside it."""
    columns = columns_of(record)
    keys = short_keys(list(record["grid"]))
    several = any(cell["state"] != DONE for cell in record["cells"])
    titles = [*keys.values(), *(column.title for column in columns), *["state"] * several]
    lines = [titles, [*(":--" for _ in keys), *("--:" for _ in columns), *[":--"] * several]]
    for cell, texts, best in _texts(record, columns):
        figures = [f"**{escaped(text)}**" if top else escaped(text) for text, top in zip(texts, best, strict=True)]
        values = [escaped(text_of(value)) for value in cell["values"].values()]
        lines.append([*values, *figures, *[cell["state"]] * several])
    lines[0] = [escaped(title) for title in lines[0]]
    parts = ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += [escaped(sentence) for sentence in sentences(record)]
    parts += [f"![{name.partition('.')[0]}]({name})" for name in pictures]
    parts.append("\n".join(f"- {escaped(note)}" for note in notes(record)))
    return "# Sweep over " + " and ".join(map(escaped, record["grid"])) + "\n\n" + "\n\n".join(parts) + "\n"


def notes(record: Record) -> list[str]:
    """What the figures mean."""
    cells = [cell for cell in record["cells"] if cell["state"] == DONE]
    found = [
        "All figures are of validation images and of the weights that were kept, those with the least validation loss.",
        "NMSE: the mean squared error over the variance of these images' values about their one mean; 0 is perfect, "
        "1 is the mean grey. MSE on the scale of 0 to 1, PSNR in dB.",
        "perplexity: the number of codes that, used equally, would say as much; used: the share of codes in use.",
        "decoder bits/dim: what the decoder's Gaussian needs for the pixels, given the codes.",
        "seconds: of the codec's training steps.",
    ]
    if priors_of(cells):
        alike = (
            "one codec, so bits/code can be compared"
            if same_codec(cells)
            else ("several codecs: bits/code of different codes are not comparable, and no best one is marked")
        )
        found.append(f"bits/code: of the priors, on validation images. The cells have {alike}.")
    return found


def to_csv(record: Record) -> str:
    """One line per cell: its name, state, values by full key, and every figure unrounded; empty where there is none."""
    columns = columns_of(record)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["cell", "state", *record["grid"], *(column.key for column in columns), "message"])
    for cell in record["cells"]:
        figures = [figure(cell, *column.path) for column in columns]
        values = [csv_text(text_of(value)) for value in cell["values"].values()]
        writer.writerow([cell["name"], cell["state"], *values, *figures, csv_text(cell["message"] or "")])
    return text.getvalue()
