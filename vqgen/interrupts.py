"""Ctrl-C and SIGTERM as a request: finish the step, save, and stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NOTICE = b"\nStopping after this step; once more (Ctrl-C) to stop at once without saving.\n"


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM, with which clusters and systems end a process, is as Ctrl-C: what is open is put right.

    Only the first one counts, so that the putting right is not itself interrupted. Outside the main thread, nothing
    is watched.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


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
