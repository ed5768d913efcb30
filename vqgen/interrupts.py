"""Ctrl-C and SIGTERM as a request: finish the step, save, and stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_NOTICE = b"\nStopping after this step; once more (Ctrl-C) to stop at once without saving.\n"


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
