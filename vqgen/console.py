"""What the person at the keyboard sees: progress, messages, tables and results.

Results and tables go to stdout, progress and messages to stderr, so that output can be piped. On a terminal
they are drawn with rich; elsewhere they are plain lines, progress at most every ten seconds. Text is always
shown as it is: markup, emoji names and control characters in a class name or a path have no effect.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.text import Text

from vqgen.files import finite
from vqgen.parsing import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

FIRST_LINE = 2.0
"""Seconds after which anything that takes time has shown its progress."""
LINE_EVERY = 10.0
"""Seconds between plain progress lines."""

_NUMBER = re.compile(r"(\*\s*)?(<=|>=|<|>|~)?\s*[-+]?[\d,]*\.?\d+(e[-+]?\d+)?\s*%?(\s*±\s*[\d.]+)?", re.IGNORECASE)


def first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """One running piece of work: how much is done, how fast, and how long it will take.

    Made by `Console.progress`. ``total`` is in units of ``unit``; where the end is not known in units (a
    budget in minutes), the caller gives the share that is done with each `advance`.
    """

    def __init__(
        self,
        total: float | None,
        unit: str,
        share: float,
        show: Callable[[Progress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.share: float | None = share if share or total else None
        self.note = ""
        self._first_share = share
        self._show = show
        self._clock = clock
        self._start = clock()

    def advance(self, count: float = 1, *, share: float | None = None, note: str | None = None) -> None:
        """Add ``count`` units; ``share`` of the whole that is done, in [0, 1]; ``note`` to show beside it."""
        self.done += count
        if share is not None:
            self.share = min(share, 1.0)
        elif self.total:
            self.share = min(self._first_share + self.done / self.total, 1.0)
        if note is not None:
            self.note = note
        self._show(self)

    @property
    def seconds(self) -> float:
        return self._clock() - self._start

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end at the mean pace so far; None while there is nothing to tell it from."""
        gained = (self.share or 0.0) - self._first_share
        return self.seconds * (1 - (self.share or 0.0)) / gained if gained > 0 else None

    def describe(self) -> str:
        """``"42 %, 12,800 images, 305 images/s, 3:12 left, loss 0.12"``, as far as known."""
        parts = [] if self.share is None else [f"{100 * self.share:.0f} %"]
        parts.append(f"{self.done:,.0f} {self.unit}".strip())
        if self.done:
            parts.append(f"{_rate(self.rate)} {self.unit}/s" if self.unit else f"{_rate(self.rate)}/s")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join([*parts, self.note] if self.note else parts)

    def summary(self) -> str:
        """``"12,800 images in 0:42, 305 images/s"``: what is said at the end."""
        rate = f", {_rate(self.rate)} {self.unit or ''}/s".replace(" /s", "/s") if self.done else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.done:,.0f} {self.unit}".strip() + f" in {duration(self.seconds)}{rate}{note}"


class Console:
    """Where commands and training loops write.

    ``quiet`` is for ``--json``: no messages, progress or tables, so that stdout holds only what `result` and
    `json` print; warnings still go to stderr. ``silent`` shows nothing at all: it is for the processes of
    a distributed run other than the first.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        silent: bool = False,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet or silent
        self.silent = silent
        self._out = RichConsole(file=stdout or sys.stdout, force_terminal=terminal)
        self._err = RichConsole(file=stderr or sys.stderr, force_terminal=terminal)
        self._clock = clock
        self._live: RichProgress | None = None
        self._depth = 0

    def say(self, text: str) -> None:
        """A message on stderr."""
        if not self.quiet:
            _print(self._err, text)

    def warn(self, text: str) -> None:
        """A warning on stderr, shown even when quiet."""
        if not self.silent:
            _print(self._err, f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """An error on stderr, shown even when quiet."""
        if not self.silent:
            _print(self._err, f"error: {text}", "bold red")

    def result(self, text: str) -> None:
        """A line of the result, on stdout, printed even when quiet."""
        if not self.silent:
            _print(self._out, text)

    def json(self, value: Any) -> None:
        """``value`` as JSON on stdout, printed even when quiet; a number that is not finite becomes null."""
        self.result(json.dumps(finite(value), indent=2))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table on stdout. None shows as ``-``; a column that holds only numbers is aligned to the right."""
        if self.quiet:
            return
        cells = [[_cell(value) for value in row] for row in rows]
        right = [_is_numeric([row[column] for row in cells]) for column in range(len(columns))]
        if _draws(self._out):
            from rich import box
            from rich.table import Table

            table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
            for name, numeric in zip(columns, right, strict=True):
                table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
            for row in cells:
                table.add_row(*(Text(cell) for cell in row))
            self._out.print(table)
        else:
            _print(self._out, _plain_table(title, [printable(name) for name in columns], cells, right))

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = "", *, share: float = 0.0
    ) -> Iterator[Progress]:
        """A running `Progress`; ``share`` in [0, 1] of the work was done before (a resumed training).

        One may run inside another (an evaluation inside a training); then nothing is left of it at its end.
        """
        if self.quiet:
            yield Progress(total, unit, share, lambda progress: None, self._clock)
            return
        shown = self._drawn if _draws(self._err) else self._printed
        self._depth += 1
        try:
            with shown(printable(description), total, unit, share) as progress:
                yield progress
        finally:
            self._depth -= 1

    @contextmanager
    def _printed(self, description: str, total: float | None, unit: str, share: float) -> Iterator[Progress]:
        due = FIRST_LINE

        def show(progress: Progress) -> None:
            nonlocal due
            if progress.seconds >= due:
                due = progress.seconds + LINE_EVERY
                self.say(f"{description}: {progress.describe()}")

        progress = Progress(total, unit, share, show, self._clock)
        yield progress
        if progress.seconds >= FIRST_LINE and self._depth == 1:
            self.say(f"{description}: {progress.summary()}")

    @contextmanager
    def _drawn(self, description: str, total: float | None, unit: str, share: float) -> Iterator[Progress]:
        # rich has one live display at a time: progress inside progress is a second line of the same display.
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        if self._live is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[detail]}", markup=False),
            )
            self._live = RichProgress(*columns, console=self._err)
            self._live.start()
        live = self._live
        known = total is not None or share > 0
        bar = live.add_task(description, total=1000 if known else None, completed=round(1000 * share), detail="")

        def show(progress: Progress) -> None:
            detail = printable(progress.describe())
            if progress.share is None:
                live.update(bar, detail=detail)
            else:
                live.update(bar, total=1000, completed=round(1000 * progress.share), detail=detail)

        progress = Progress(total, unit, share, show, self._clock)
        try:
            yield progress
            if progress.seconds >= FIRST_LINE and self._depth == 1:
                live.update(bar, total=1000, completed=1000, detail=printable(progress.summary()))
            else:
                live.remove_task(bar)
        finally:
            if self._depth == 1:
                live.stop()
                self._live = None


def duration(seconds: float) -> str:
    """``"0:42"``, ``"12:05"``, ``"3:02:11"``."""
    whole = max(round(seconds), 0)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return printable(f"{value:,}" if isinstance(value, int) else str(value)).replace("\n", " ")


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", "-")]
    return bool(filled) and all(_NUMBER.fullmatch(cell.strip()) for cell in filled)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    widths = [max(cell_len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for cell, width, numeric in zip(cells, widths, right, strict=True):
            space = " " * (width - cell_len(cell))
            padded.append(space + cell if numeric else cell + space)
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join(([printable(title)] if title else []) + [line(columns), rule, *(line(row) for row in rows)])


def _draws(console: RichConsole) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _print(console: RichConsole, text: str, style: str = "") -> None:
    text = printable(text)
    if _draws(console):
        console.print(Text(text, style=style), soft_wrap=True)
        return
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    # A pipe in an old locale cannot take every character; a question mark is better than a traceback.
    console.file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    console.file.flush()
