"""What a page shows besides text and tables: pictures, charts, and rows of small pictures under one heading.

Everything is bytes that were made before; a page only lays them out. A `Chart` comes for a light and a dark ground. A
`Strips` is rows of pictures whose names are text of the page, so that they follow its colours and its width.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass

_PNG = b"\x89PNG\r\n\x1a\n"
WIDTH = 552
"""Small pictures are enlarged by whole factors up to about this many screen pixels."""
STRIP_WIDTH = 940
"""Strips are enlarged by whole factors up to this many screen pixels."""


@dataclass(frozen=True)
class Figure:
    """A picture of the page, such as a grid of samples.

    Raises:
        ValueError: ``png`` is not a PNG file.
    """

    title: str
    caption: str
    png: bytes
    alt: str
    wide: bool = False
    """Whether it takes the whole width of the page, where others stand side by side."""

    kind = "figure"

    def __post_init__(self) -> None:
        if not _is_png(self.png):
            raise ValueError(f"the picture of figure '{self.title}' is no PNG file")

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return data_uri(self.png, "image/png")

    @property
    def zoom(self) -> int:
        """The whole factor by which the page enlarges the picture, so that pixels stay square."""
        return max(1, WIDTH // max(_size(self.png)))

    @property
    def width(self) -> int:
        return _size(self.png)[0] * self.zoom

    @property
    def height(self) -> int:
        return _size(self.png)[1] * self.zoom


@dataclass(frozen=True)
class Chart:
    """One chart as SVG, for a light and for a dark ground."""

    title: str
    caption: str
    light: bytes
    dark: bytes
    alt: str
    wide: bool = False

    kind = "chart"

    @property
    def light_source(self) -> str:
        return data_uri(self.light, "image/svg+xml")

    @property
    def dark_source(self) -> str:
        return data_uri(self.dark, "image/svg+xml")


@dataclass(frozen=True)
class Strip:
    """One row of pictures: its name, and for each block of the heading a PNG with its pictures side by side."""

    name: str
    pngs: tuple[bytes, ...]
    alt: str
    note: str = ""
    """Under the name."""


@dataclass(frozen=True)
class Strips:
    """Rows of pictures, enlarged alike.

    Raises:
        ValueError: a row has not a PNG file for each of ``blocks``.
    """

    title: str
    caption: str
    rows: tuple[Strip, ...]
    blocks: tuple[str, ...] = ("",)
    """Headings above the pictures of all rows; where all are empty there is no heading."""
    columns: tuple[str, ...] = ()
    """Names of the single pictures, all blocks after each other; none where pictures have no names of their own."""

    kind = "strips"
    wide = True

    def __post_init__(self) -> None:
        if not self.rows or any(len(row.pngs) != len(self.blocks) for row in self.rows):
            raise ValueError(f"the rows of '{self.title}' have not a picture for each of {len(self.blocks)} blocks")
        if not all(_is_png(png) for row in self.rows for png in row.pngs):
            raise ValueError(f"a picture of '{self.title}' is no PNG file")

    @property
    def zoom(self) -> int:
        """The whole factor by which the page enlarges every picture."""
        widest = max(sum(_size(png)[0] for png in row.pngs) for row in self.rows)
        return max(1, STRIP_WIDTH // widest)

    @property
    def pitch(self) -> int:
        """Screen pixels from one picture of a row to the next, where they have names."""
        widest = max(sum(_size(png)[0] for png in row.pngs) for row in self.rows)
        return widest * self.zoom // max(len(self.columns), 1)

    def sources(self, row: Strip) -> list[tuple[str, int, int]]:
        """Data URI, width and height on the page of each block of ``row``."""
        sizes = [_size(png) for png in row.pngs]
        return [
            (data_uri(png, "image/png"), width * self.zoom, height * self.zoom)
            for png, (width, height) in zip(row.pngs, sizes, strict=True)
        ]


Part = Figure | Chart | Strips


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own and a line in the contents.

    ``key`` is a plain word that no other section has; ``text`` stands under the heading.
    """

    key: str
    title: str
    text: str = ""
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences after the parts."""


@dataclass(frozen=True)
class Sections:
    """The sections of a comparison that show pictures, and the four-way picture as a file of its own."""

    sections: tuple[Section, ...] = ()
    four_way: bytes = b""
    """PNG."""

    def get(self, key: str) -> Section | None:
        """The section of that key, if there is one."""
        return next((section for section in self.sections if section.key == key), None)


def data_uri(content: bytes, kind: str) -> str:
    """``content`` of the media type ``kind`` as an address that holds all of it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _is_png(content: bytes) -> bool:
    return len(content) >= 24 and content.startswith(_PNG)


def _size(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return max(width, 1), max(height, 1)
