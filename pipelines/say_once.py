"""The last words of the processes of a launcher: what all of them have met alike is said by one of them.

They meet at the store that torchrun and `accelerate launch` keep for them, at any time of a command, whether they have
joined each other or not.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from pipelines.launcher import launched

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

PATIENCE, PATIENCE_AT_FIRST = 3.0, 10.0
"""Seconds that a process waits for the others to come to their own end, as a launcher ends them when it sees the first:
once they have joined each other, and before, when some may still be loading what they need."""


def say_once(text: str, say: Callable[[], None], *, elsewhere: bool = False, interrupted: bool = False) -> None:
    """``say`` what ends this process, unless another one has said the same ``text``; then give the others a moment.

    Args:
        elsewhere: that another process says it is known.
        interrupted: nothing is said of an interrupt where an error has ended another process: the launcher sent it.
    """
    store = _store() if launched() > 1 else None
    if store is None:
        _say_without_store(say, elsewhere)
        return
    try:
        first = not elsewhere and store.add(_key(hashlib.sha256(text.encode()).hexdigest()), 1) == 1
        caused = interrupted and store.add(_key("failed"), 0) > 0
        store.add(_key("failed"), int(not interrupted))
        ended = store.add(_key("ended"), 1)
    except RuntimeError:  # the launcher has gone
        first, caused, ended = not elsewhere, False, launched()
    if first and not caused:
        say()
    until = time.monotonic() + (PATIENCE if _joined() else PATIENCE_AT_FIRST)
    with suppress(RuntimeError, KeyboardInterrupt):
        while ended < launched() and time.monotonic() < until:
            time.sleep(0.05)
            ended = store.add(_key("ended"), 0)


def _say_without_store(say: Callable[[], None], elsewhere: bool) -> None:
    if elsewhere:
        return
    if os.environ.get("RANK", "0") != "0" and not _joined():
        time.sleep(PATIENCE)  # mostly the first one says the same, and the launcher then ends this one
    say()


def _joined() -> bool:
    """Whether this process and the others have joined each other."""
    return bool(getattr(sys.modules.get("torch.distributed"), "is_initialized", bool)())


def _key(name: str) -> str:
    """A name in the store, for this attempt of a launcher that starts its processes again."""
    return f"vqgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _store() -> TCPStore | None:
    """The launcher's own store; None where it has none, or has gone."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    except (RuntimeError, ValueError, KeyError):
        return None
