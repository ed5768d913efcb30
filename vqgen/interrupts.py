"""Ctrl-C and SIGTERM as a request: finish the step, save, and stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NOTICE = b"\nStopping after this step; once more (Ctrl-C) to stop at once without saving.\n"
_AGAIN = 0.05
"""Seconds after which it is seen whether an import has ended."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM, with which clusters and systems end a process, is as Ctrl-C: what is open is put right.

    Only the first SIGTERM counts, so that the putting right is not itself interrupted. While something is imported,
    the first of both waits for its end: torch's own libraries abort where they are interrupted as they load. Outside
    the main thread, nothing is watched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        first, asked = not asked, True
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if sys.platform != "win32" and (first or number == signal.SIGALRM) and _is_importing(frame):
            handler = signal.signal(signal.SIGALRM, stop)
            before.setdefault(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            return
        raise KeyboardInterrupt

    before: dict[int, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it may be ignored
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if sys.platform != "win32" and signal.SIGALRM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib._bootstrap"):
            return True
        frame = frame.f_back
    return False


class StopSignals:
    """Within the block, ``received`` turns true at the first SIGINT or SIGTERM; a second SIGINT acts at once.

    The handlers from before come back at the end. Outside the main thread, where Python allows no handlers,
    nothing is watched.
    """

    def __init__(self, *, notice: bool = True) -> None:
        self.received = False
        self._notice = notice
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        # A launcher that was interrupted passes SIGTERM on to its processes: not a second wish.
        if not self.received and self._notice:
            os.write(2, _NOTICE)
        self.received = True
