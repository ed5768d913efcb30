"""The report: the tables' figures, order and marks; the page's escaping and self-containment."""

from __future__ import annotations

import io
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.comparison_rows import COLUMNS
from pipelines.report import columns, page, tables
from pipelines.report.figures import Chart, Figure, Section, Sections, Strip, Strips
from pipelines.report.legend import legend
from pipelines.report.page import write_page

KEYS = ("prior", "level", *COLUMNS)
HOSTILE = "\x01\udcff<script>alert('x')</script>|`$\\frac{$\n\"><img src=http://evil.example/x onerror=alert(1)> 漢字"


def row(**figures: Any) -> dict[str, Any]:
    assert set(figures) <= set(KEYS)
    return {key: figures.get(key) for key in KEYS}


def rows() -> list[dict[str, Any]]:
    bits = {"uniform": (9.0, 9.0), "pixelcnn": (5.614, 4.93), "unigram": (6.83, 7.51)}
    bits |= {"transformer": (5.1302, 4.7104), "roundtrip": (6.31, 6.9)}
    made = []
    for prior, (top, bottom) in bits.items():
        for level, cost, codes in (
            ("all", (16 * top + 64 * bottom) / 80, 80),
            ("bottom", bottom, 64),
            ("top", top, 16),
        ):
            figures: dict[str, Any] = {"prior": prior, "level": level, "bits_per_code": cost, "likelihood": "exact"}
            figures |= {"bits_per_image": cost * codes, "standard_error": 0.0123, "samples_per_second": 31.25}
            if prior == "roundtrip":
                figures |= {"likelihood": "bound", "estimator_samples": 64}
            if level == "all":
                figures["bits_per_dim"] = 4.2 + cost * codes / 3072
            made.append(row(**figures))
    return made


def comparison(made: list[dict[str, Any]] | None = None, **provenance: Any) -> dict[str, Any]:
    known = {"vqgen": "0.1.0", "split": "test", "images": 10000, "decoder_bits_per_dim": 4.2, "pixels": ["resized"]}
    return {
        "run": "runs/shapes",
        "rows": rows() if made is None else made,
        "anchors": [],
        "provenance": known | provenance,
    }


def judged() -> dict[str, Any]:
    """A comparison with every block: sample quality, anchors, sizes."""
    made = rows()
    for place, line in enumerate(made):
        if line["level"] == "all":
            line |= {"frechet": 1000.25 - 31.37 * place, "kid": 0.01234 * place, "kid_standard_error": 0.00098}
            line |= {"precision": 0.9 - 0.0123 * place, "cas": 0.5 + 0.01 * place, "cas_standard_error": 0.0123}
            bits = line["bits_per_image"]
            line |= {"bytes_per_image": bits / 8, "bits_per_pixel": bits / 1024, "compression_ratio": 24576 / bits}
            line |= {"samples": 1000, "sample_memory": 812_345_678}
        line |= {"parameters": 812_345, "train_seconds": 700.0, "train_steps": 12000, "train_memory": 1_234_567_890}
    anchors = [
        row(prior="training images", level="all", frechet=3.21, kid=0.0001, kid_standard_error=1e-6, cas=0.987),
        row(prior="reconstructions", level="all", frechet=12.34, kid=0.0023, cas=0.9),
        row(prior="shuffled labels", level="all", cas=0.1023),
    ]
    quality = {"extractor": "classifier", "weights": "ab12" * 16, "samples": 1000, "test_images": 900}
    codes = {"bits_per_image": 720.0, "bytes_per_image": 90.0, "bits_per_pixel": 0.703125, "ratio": 34.1333}
    shown = {"mse": 0.0123, "psnr": 23.456, "ssim": 0.8765, "images": 10000}
    whole = comparison(made, quality=quality) | {"anchors": anchors, "codes": codes, "reconstruction": shown}
    return whole


def curves(prior: str = "pixelcnn") -> list[dict[str, Any]]:
    curve = {"prior": prior, "level": "top", "steps": [0, 100, 200], "seconds": [0.0, 1.5, 3.0]}
    return [curve | {"bits_per_code": [9.0, math.nan, 5.6], "unigram": 6.83}]


def png(width: int = 34, height: int = 17) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 60, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of each Markdown table by its title, split where a renderer would split them, headings first."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("## "):
            own = found.setdefault(line.removeprefix("## "), [])
        elif line.startswith("|") and ":--" not in line:
            own.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return {title: lines for title, lines in found.items() if lines}


UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "s": 1, "min": 60, "h": 3600, "x": 1, "dB": 1, "B": 1, "": 1}
UNITS |= {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def number(cell: str) -> tuple[float, float]:
    """The number that a cell gives, and half a unit of its last digit: what rounding may have taken from it."""
    found = re.fullmatch(r"\W*?(-?[\d,]+(?:\.(\d+))?) ?([A-Za-z]*)", cell.strip("*"))
    assert found, cell
    unit = UNITS[found[3]]
    return float(found[1].replace(",", "")) * unit, 0.5001 * 10 ** -len(found[2] or "") * unit


def check_cell(cell: str, source: dict[str, Any], column: columns.Column) -> None:
    """That a cell says what compare.json holds: its number, its error, its bound."""
    value = source.get(column.key)
    text, _, error = cell.replace("\\", "").partition(" ± ")
    if value is None:
        assert text == "-"
    elif isinstance(value, str):
        assert text == value
    else:
        shown, half = number(text)
        assert abs(shown - value) <= half + 1e-9 * abs(value) or f"{shown:.2e}" == f"{value:.2e}"
    spread = source.get(column.error) if column.error else None
    assert bool(error) == (spread is not None)
    if spread is not None and not error.startswith("<"):
        shown, half = number(error)
        assert abs(shown - spread) <= half


def source_of(whole: dict[str, Any], table: tables.Table, group: str, prior: str) -> dict[str, Any]:
    """The row of compare.json that a line of a table shows."""
    if prior == tables.PLAIN_CODES:
        found = whole["codes"] | {"compression_ratio": whole["codes"]["ratio"]}
    elif group == tables.ANCHORS:
        found = next(line for line in whole["anchors"] if line["prior"] == prior)
    else:
        level = group if table.key in ("likelihood", "cost") else "all"
        found = next(line for line in whole["rows"] if (line["level"], line["prior"]) == (level, prior))
    return found | (whole["reconstruction"] if table.key == "compression" else {})


class Reader(HTMLParser):
    """Collects the tags, attributes and cell texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        """Cell texts of each table of figures."""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(path: Path, *arguments: Any) -> str:
    write_page(path, *arguments)
    return path.read_text(encoding="utf-8")


def sections() -> Sections:
    chart = Chart("top", "", b"<svg/>", b"<svg />", "heat maps")
    strips = Strips("mine", "fast", (Strip("cat", (png(), png()), "cats", "a note"),), ("test images", "samples"))
    grid = Figure("grid", "64 samples", png(), "samples of pixelcnn")
    made = (
        Section("positions", "Bits by position", "how it is read", (chart,), ("roundtrip has no map.",)),
        Section("samples", "Samples", "", (grid, strips)),
    )
    return Sections(made, png())


def test_summary_orders_levels_coarse_to_fine_and_priors_by_bits() -> None:
    (title, titles, lines), *_ = tables.summary(comparison())
    assert title == "Likelihood"
    assert titles[:3] == ["level", "prior", "bits/code"]
    assert all(len(line) == len(titles) for line in lines)
    ranked = ["transformer", "pixelcnn", "roundtrip", "unigram", "uniform"]
    assert [line[:2] for line in lines] == [[level, prior] for level in ("top", "bottom", "all") for prior in ranked]


def test_summary_marks_bounds_and_the_best_and_leaves_out_what_was_not_measured() -> None:
    found = {title: (titles, lines) for title, titles, lines in tables.summary(comparison())}
    assert list(found) == ["Likelihood", "Cost", "Compression"][: len(found)]
    titles, lines = found["Likelihood"]
    cell = {(line[0], line[1], title): text for line in lines for title, text in zip(titles, line, strict=True)}
    assert cell["top", "roundtrip", "bits/code"] == "<= 6.310 ± 0.012"
    assert cell["top", "roundtrip", "draws"] == "64"
    assert cell["top", "pixelcnn", "bits/code"] == "5.614 ± 0.012"
    assert cell["top", "transformer", "bits/code"] == "* 5.130 ± 0.012"
    assert all("<= " in cell["all", prior, "bits/dim"] for prior in ("uniform", "transformer"))
    assert cell["top", "transformer", "bits/dim"] == "-"
    made = rows()
    made[0]["frechet"] = 0.0
    _, titles, lines = next(table for table in tables.summary(comparison(made)) if table[0] == "Sample quality")
    assert titles == ["of", "prior", "Fréchet"]
    assert [line[-1] for line in lines] == ["0.00"]


@pytest.mark.parametrize("bits", [3.0, 8.0])
def test_the_best_is_a_trained_prior_even_below_a_baseline(bits: float) -> None:
    made = [row(prior="unigram", level="top", bits_per_code=5.0), row(prior="mine", level="top", bits_per_code=bits)]
    made.append(row(prior="broken", level="top", bits_per_code=math.nan))
    lines = tables.arrange(comparison(made))[0].lines
    assert [line.prior for line in lines if line.best] == ["mine"]
    assert not any(cell.best for line in lines if line.prior != "mine" for cell in line.cells)
    assert lines[-1].cells[0].text == "nan"


def test_every_column_marks_its_own_best_among_trained_priors_and_ties_alike() -> None:
    made = [
        row(prior="a", level="all", bits_per_code=5.00001, frechet=20.0, cas=0.4, parameters=10),
        row(prior="b", level="all", bits_per_code=5.0, frechet=10.0, cas=0.3, parameters=20),
        row(prior="random", level="all", likelihood="none", frechet=5.0, cas=0.9),
        row(prior="unigram", level="all", bits_per_code=4.0, frechet=5.0, cas=0.9),
    ]
    whole = comparison(made) | {"anchors": [row(prior="training images", level="all", frechet=1.0, cas=0.99)]}
    best = {
        (line.prior, table.columns[at].key)
        for table in tables.arrange(whole)
        for line in table.lines
        for at, cell in enumerate(line.cells)
        if cell.best
    }
    assert best == {("a", "bits_per_code"), ("b", "bits_per_code"), ("b", "frechet"), ("a", "cas")}


def test_sample_quality_stands_in_groups_nearest_first_and_anchors_last() -> None:
    table = next(table for table in tables.arrange(judged()) if table.key == "quality")
    assert [group.title for group in table.groups] == [tables.TRAINED, tables.SCALE, tables.ANCHORS]
    trained, scale, anchors = ([line.prior for line in group.lines] for group in table.groups)
    assert trained == ["roundtrip", "transformer", "pixelcnn"]
    assert scale == ["unigram", "uniform"]
    assert anchors == ["training images", "reconstructions", "shuffled labels"]
    assert not any(cell.best for line in table.groups[2].lines for cell in line.cells)


def test_compression_starts_with_plain_codes_which_stand_for_uniform() -> None:
    table = next(table for table in tables.arrange(judged()) if table.key == "compression")
    assert [line.prior for line in table.lines] == [
        *(tables.PLAIN_CODES, "transformer", "pixelcnn", "roundtrip", "unigram"),
    ]
    cells = {line.prior: dict(zip([c.title for c in table.columns], line.cells, strict=True)) for line in table.lines}
    assert str(cells["roundtrip"]["ratio to raw"]).startswith("≥ ")
    assert str(cells["roundtrip"]["bytes/image"]).startswith("≤ ")
    assert cells[tables.PLAIN_CODES]["PSNR"].text == "23.46 dB"
    without = judged() | {"codes": None, "reconstruction": None}
    table = next(table for table in tables.arrange(without) if table.key == "compression")
    assert "uniform" in [line.prior for line in table.lines]
    assert "PSNR" not in [column.title for column in table.columns]


def test_every_figure_in_markdown_is_that_of_the_comparison() -> None:
    whole = judged()
    found = markdown_tables(tables.to_markdown(whole))
    arranged = tables.arrange(whole)
    assert list(found) == [table.title for table in arranged]
    checked = 0
    for table in arranged:
        titles, *lines = found[table.title]
        assert len(lines) == len(table.lines)
        for group, prior, *cells in lines:
            source = source_of(whole, table, group, prior)
            for title, cell, column in zip(titles[2:], cells, table.columns, strict=True):
                assert title == column.title
                check_cell(cell, source, column)
                checked += cell != "-"
    assert checked > 150


def test_every_figure_on_the_page_is_that_of_the_comparison(tmp_path: Path) -> None:
    whole = judged()
    reader = Reader(written(tmp_path / "report.html", whole))
    arranged = tables.arrange(whole)
    headings = {"all levels": "all", "anchors: no prior's samples": tables.ANCHORS}
    for table, shown in zip(arranged, reader.tables, strict=False):
        titles, *lines = shown
        assert titles == ["prior", *(column.title for column in table.columns)]
        group, seen = table.groups[0].title, []
        for line in lines:
            if len(line) == 1:
                group = headings.get(line[0], line[0])
                continue
            prior, *cells = line
            source = source_of(whole, table, group, prior)
            seen.append((group, prior))
            for cell, column in zip(cells, table.columns, strict=True):
                check_cell(cell.removesuffix(" (best)"), source, column)
        assert seen == [(own.title, line.prior) for own in table.groups for line in own.lines]


def test_markdown_keeps_hostile_names_in_their_cell() -> None:
    made = [*rows(), row(prior=HOSTILE, level="top", bits_per_code=5.9)]
    for cells in markdown_tables(tables.to_markdown(comparison(made))).values():
        assert {len(line) for line in cells} == {len(cells[0])}
        assert not any(re.search(r"(?<!\\)[<`|]", cell) for line in cells for cell in line)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (81_234, "81.2k"),
        (999_960, "1.00M"),
        (8_123_456, "8.12M"),
        (3e9, "3.00G"),
    ],
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert columns._count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 s"), (9.96, "10 s"), (59.6, "1.0 min"), (750, "12.5 min"), (9000, "2.5 h")]
)
def test_times_have_a_fitting_unit(value: float, text: str) -> None:
    assert columns._seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (812, "812 B"), (81_234, "81.2 kB"), (1_234_567_890, "1.23 GB")]
)
def test_memory_is_in_powers_of_1000(value: float, text: str) -> None:
    assert columns._bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3.37140382e14, "3.37e+14"), (-4e9, "-4e+09"), (999_999_999.0, "999,999,999.00")]
)
def test_huge_figures_do_not_stretch_the_table(value: float, text: str) -> None:
    assert columns._fixed(2)(value) == text


def test_a_huge_figure_and_its_error_are_one_cell() -> None:
    column = next(column for column in columns.QUALITY if column.key == "kid")
    row = {"prior": "a", "kid": 3.37e14, "kid_standard_error": 5.79e13}
    assert (column.write(row["kid"]), tables._error(row, column)) == ("3.37e+14", "± 5.79e+13")


def test_the_legend_says_on_what_was_measured_and_only_what_stands_in_the_tables() -> None:
    assert "10,000 images of the test split" in dict(legend(comparison()))["held out"]
    assert "on 10,000 of the 12,345 images of" in dict(legend(comparison(images_available=12345)))["held out"]
    assert "not held out" in dict(legend(comparison(split="train")))["held out"]
    assert "flatter" in dict(legend(comparison(split="validation")))["held out"]
    full = dict(legend(comparison()))
    assert "4.200" in full["bits/dim"]
    assert "resized" in full["bits/dim"]
    plain = dict(legend(comparison([row(prior="unigram", level="top", bits_per_code=2.0)])))
    assert set(full) - set(plain) == {"≤", "±", "bits/dim"}
    whole = dict(legend(judged()))
    new = {"sample quality", "anchors", "memory", "ratio to raw", "PSNR, SSIM", "Fréchet", "KID", "precision", "CAS"}
    assert set(whole) - set(full) == new
    assert "classifier" in whole["sample quality"]
    assert "24,576" in whole["ratio to raw"]


def test_the_page_has_every_section_in_order_and_in_its_contents(tmp_path: Path) -> None:
    everything = comparison(codec_fingerprint="9f2c", seed=0, data=None, notices=["Too few images."])
    text = written(tmp_path / "report.html", everything, sections(), curves(), ["the transformer leads"])
    reader = Reader(text)
    keys = ["figures", "bits", "curves", "samples", "positions", "units", "provenance"]
    assert [heading.get("id") for heading in reader.all("h2")] == keys
    contents = [link["href"] for link in reader.all("a")]
    assert [link for link in contents if link != "#units"] == [f"#{key}" for key in keys if key != "units"]
    known = {attributes.get("id") for _, attributes in reader.tags}
    assert {str(link).removeprefix("#") for link in contents} <= known
    assert {attributes.get("aria-labelledby") for _, attributes in reader.tags} - {None} <= known
    for words in ("the transformer leads", "64 samples", "9f2c", "runs/shapes", "Too few images.", "a note"):
        assert words in reader.text
    assert "roundtrip has no map." in reader.text
    assert all(image["alt"] for image in reader.all("img")[:4])
    assert all(cell.get("scope") for cell in reader.all("th"))
    assert len(reader.all("img")) == 6


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = written(tmp_path / "report.html", judged(), sections(), curves(), [])
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    reader = Reader(text)
    pictures = [image["src"] for image in reader.all("img")] + [source["srcset"] for source in reader.all("source")]
    assert len(pictures) == 9
    assert all(source is not None and source.startswith("data:image/") for source in pictures)
    assert all(str(anchor["href"]).startswith("#") for anchor in reader.all("a"))
    policy = next(tag for tag in reader.all("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_text_is_shown_not_obeyed(tmp_path: Path) -> None:
    bare = Reader(written(tmp_path / "bare.html", judged(), sections(), curves(), ["plain"]))
    whole = judged()
    for line in whole["rows"]:
        line["prior"] = {"pixelcnn": HOSTILE}.get(line["prior"], line["prior"])
        line["likelihood"] = HOSTILE
    whole["anchors"][0]["prior"] = HOSTILE
    whole["provenance"] |= {"data": {HOSTILE: [HOSTILE]}, "pixels": HOSTILE, "created": HOSTILE, HOSTILE: HOSTILE}
    whole["provenance"] |= {"notices": [HOSTILE], "quality": {"extractor": HOSTILE, "weights": HOSTILE, "samples": 9}}
    chart = Chart(HOSTILE, HOSTILE, b"<svg/>", b"<svg/>", HOSTILE)
    strip = Strip(HOSTILE, (png(), png()), HOSTILE, HOSTILE)
    named = Strips(HOSTILE, HOSTILE, (Strip(HOSTILE, (png(),), HOSTILE),), columns=(HOSTILE, HOSTILE))
    parts = (Figure(HOSTILE, HOSTILE, png(), HOSTILE), Strips(HOSTILE, HOSTILE, (strip,), (HOSTILE, "")), named, chart)
    section = Section("samples", HOSTILE, HOSTILE, parts, (HOSTILE,))
    path = tmp_path / "report.html"
    text = written(path, whole | {"run": HOSTILE}, Sections((section,)), curves(HOSTILE), [HOSTILE])
    reader = Reader(text)
    assert {tag for tag, _ in reader.tags} <= {tag for tag, _ in bare.tags}
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert all(str(image["src"]).startswith("data:") for image in reader.all("img"))
    assert len(reader.all("img")) == 7
    assert len(reader.all("a")) == len(bare.all("a")) - 1  # one section fewer
    assert "<script>alert('x')</script>" in unescape(text)
    assert reader.text.count("<script>alert('x')</script>") > 20


def test_the_page_of_a_bare_comparison(tmp_path: Path) -> None:
    bare = {"run": "r", "rows": [row(prior="random", level="all", likelihood="none")], "anchors": [], "provenance": {}}
    reader = Reader(written(tmp_path / "report.html", bare))
    assert not reader.all("img")
    assert not reader.tables
    assert "Where this comes from" not in reader.text


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    first = written(path, comparison())

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(Exception, match="space"):
        write_page(path, comparison([]))
    assert path.read_text(encoding="utf-8") == first
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_provenance_is_lines_of_text_known_keys_first() -> None:
    lines = page._provenance({"mine": {"a": [1, 2]}, "images": 10000, "created": None, "pixels": []})
    assert lines == [("created", ["-"]), ("images measured", ["10,000"]), ("pixels", ["-"]), ("mine", ["a: 1; 2"])]
