"""Errors for the person at the keyboard.

An error of this module is shown as its message and its hint, without a traceback, and ends the command
with ``exit_code``. Anything else that escapes a command is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VqgenError(Exception):
    """Something the user can put right: what was wrong, what was expected, what to do next."""

    exit_code = 2
    said_elsewhere = False
    """Whether another process of the same launcher has the same error, and says it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        between = "\n" if "\n" in self.message else " "  # after a list of problems, the hint is not one more of them
        return f"{self.message}{between}{self.hint}".strip()


class InputError(VqgenError):
    """An argument, a file or a data set that cannot be used."""


class ConfigError(VqgenError):
    """Settings that do not fit; the message lists every problem at once."""


class MismatchError(VqgenError):
    """Parts of a run that do not belong together (codes of another codec, a prior of other codes)."""


class DivergedError(VqgenError):
    """A loss that is no longer a finite number."""


class Interrupted(VqgenError):
    """A run that was stopped by a signal after saving its state."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"Did you mean 'x'?"`` for the nearest of ``known``, or the empty string where none is near."""
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(folded), n=1)
    return f"Did you mean '{folded[near[0]]}'?" if near else ""
