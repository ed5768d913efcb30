from __future__ import annotations

import io
import json
import math

import pytest

from vqgen.console import Console, Progress, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen:
    """A console whose two streams can be read back."""

    def __init__(self, *, terminal: bool = False, quiet: bool = False, silent: bool = False) -> None:
        self.clock = Clock()
        self._out, self._err = io.StringIO(), io.StringIO()
        self.console = Console(
            quiet=quiet, silent=silent, stdout=self._out, stderr=self._err, terminal=terminal, clock=self.clock
        )

    @property
    def out(self) -> str:
        return self._out.getvalue()

    @property
    def err(self) -> str:
        return self._err.getvalue()


def test_messages_go_to_stderr_and_results_to_stdout() -> None:
    screen = Screen()
    screen.console.say("working")
    screen.console.warn("odd")
    screen.console.error("bad")
    screen.console.result("done")
    assert screen.err == "working\nwarning: odd\nerror: bad\n"
    assert screen.out == "done\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_text_is_shown_as_it_is(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(terminal=terminal)
    text = "runs/[bold]x[/bold] [level] :smile: [/] \\[x]"
    screen.console.say(text)
    screen.console.result(text)
    screen.console.table(text, [text], [[text]])
    with screen.console.progress(text, total=2) as progress:
        progress.advance(note=text)
        screen.clock.now += 3
        progress.advance(note=text)
    assert screen.out.count(text) == 4
    assert screen.err.count(text) >= 2


def test_control_characters_do_not_reach_the_terminal() -> None:
    screen = Screen()
    screen.console.say("a\x1b[2Jb\rc\td\ne")
    screen.console.table("", ["x"], [["a\x1b[31m\nb"]])
    assert "\x1b" not in screen.err + screen.out
    assert screen.err.endswith("c\td\ne\n")
    assert len(screen.out.splitlines()) == 3


def test_long_lines_and_wide_tables_are_not_cut() -> None:
    screen = Screen()
    screen.console.result("word " * 100)
    screen.console.table("Table", ["name", "text"], [["n" * 70, "t" * 70]])
    assert screen.out.splitlines()[0] == "word " * 100
    assert screen.out.splitlines()[-1] == "n" * 70 + "  " + "t" * 70


def test_plain_table_is_aligned() -> None:
    screen = Screen()
    rows = [["pixelcnn", 4.25, "<= 4.1", 12000], ["漢字", None, "exact", None], ["x", math.inf, True, 7]]
    screen.console.table("Priors", ["prior", "bits", "kind", "n"], rows)
    assert screen.out.splitlines() == [
        "Priors",
        "prior     bits  kind         n",
        "--------  ----  ------  ------",
        "pixelcnn  4.25  <= 4.1  12,000",
        "漢字         -  exact        -",
        "x            -  yes          7",
    ]


def test_table_without_rows() -> None:
    screen = Screen()
    screen.console.table("", ["a", "bb"], [])
    assert screen.out == "a  bb\n-  --\n"


def test_quiet_leaves_only_results_and_warnings() -> None:
    screen = Screen(quiet=True)
    screen.console.say("message")
    screen.console.table("title", ["column"], [["cell"]])
    with screen.console.progress("work", total=1) as progress:
        screen.clock.now += 60
        progress.advance()
    screen.console.warn("careful")
    screen.console.json({"bits": math.nan, "rows": [1.5, (math.inf, "é")]})
    assert screen.err == "warning: careful\n"
    assert json.loads(screen.out) == {"bits": None, "rows": [1.5, [None, "é"]]}


def test_silent_shows_nothing() -> None:
    screen = Screen(silent=True)
    screen.console.warn("careful")
    screen.console.error("bad")
    screen.console.result("done")
    assert screen.err == screen.out == ""


def test_plain_progress_is_at_most_every_ten_seconds_and_at_the_end() -> None:
    screen = Screen()
    with screen.console.progress("Encoding", total=100, unit="images") as progress:
        for _ in range(100):
            screen.clock.now += 0.5
            progress.advance(note="loss 0.5")
    lines = screen.err.splitlines()
    assert lines[0] == "Encoding: 4 %, 4 images, 2 images/s, 0:48 left, loss 0.5"
    assert lines[1].startswith("Encoding: 24 %, 24 images")
    assert len(lines) == 1 + 4 + 1
    assert lines[-1] == "Encoding: 100 images in 0:50, 2 images/s, loss 0.5"


def test_quick_work_says_nothing() -> None:
    screen = Screen()
    with screen.console.progress("Quick", total=3) as progress:
        for _ in range(3):
            screen.clock.now += 0.5
            progress.advance()
    assert screen.err == ""


def test_work_that_fails_does_not_say_that_it_ended() -> None:
    screen = Screen()

    def fail() -> None:
        with screen.console.progress("Broken", total=3):
            screen.clock.now += 5
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert screen.err == ""
    with screen.console.progress("Next", total=1) as progress:
        screen.clock.now += 5
        progress.advance()
    assert screen.err.splitlines()[-1].startswith("Next: 1 in 0:05")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_inside_progress(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(terminal=terminal)
    for _ in range(2):
        with screen.console.progress("Training", total=2, unit="steps") as outer:
            with screen.console.progress("Evaluating", total=1, unit="images") as inner:
                screen.clock.now += 4
                inner.advance()
            screen.console.say("evaluated")
            outer.advance(2)
    assert "Evaluating: 1 images in" not in screen.err
    assert screen.err.count("2 steps in 0:04") >= 2


def test_share_given_by_the_caller_tells_the_time_left() -> None:
    clock = Clock()
    progress = Progress(None, "images", 0.5, lambda shown: None, clock)
    clock.now += 10
    progress.advance(50, share=0.6)
    assert progress.seconds_left == pytest.approx(40)
    assert progress.describe() == "60 %, 50 images, 5 images/s, 0:40 left"


def test_progress_without_an_end_has_a_rate() -> None:
    clock = Clock()
    progress = Progress(None, "", 0.0, lambda shown: None, clock)
    clock.now += 4
    progress.advance(1)
    assert progress.describe() == "1, 0.25/s"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (725, "12:05"), (10931, "3:02:11")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stream_that_cannot_take_every_character() -> None:
    raw = io.BytesIO()
    console = Console(stdout=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.result("Bär")
    assert raw.getvalue() == b"B?r\n"
