"""Locks that keep two commands from working on the same thing, and say who holds them.

A lock is a file that the system locks for a process (``flock``) and lets go when the process ends, however it ends: a
lock that was left behind by a killed process holds nobody back. While it is held, the file says by whom. Where a file
system has no such locks, that note alone decides, and only on the machine that wrote it.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from vqgen.errors import InputError
from vqgen.files import disk_errors, is_alive

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_LONGEST = 300
"""Characters that are shown of what a lock file says."""
_LETTING_GO = 200
"""Times, a hundredth of a second apart, that a lock is tried whose holder has ended."""

_held: list[IO[str]] = []
"""The lock files that this process has open."""


@contextmanager
def locked(path: Path, *, wait: bool = False, shared: bool = False, what: str = "") -> Iterator[None]:
    """Hold the lock file ``path``, which the system releases when the process ends, however it ends.

    ``shared`` locks go together, but not with one that is not shared. ``what`` is what the error says is being worked
    on; the lock file's folder by default. Without ``wait``, a lock that another process holds is an error.

    Raises:
        InputError: another process holds the lock, and which; or the lock file cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    with file:
        _held.append(file)
        signed = False
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            try:
                if wait:
                    fcntl.flock(file, kind)
                elif not _locked_now(file, kind):
                    raise _refusal(file, what or str(path.parent))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                if not wait and _alive_here(_note(file)):
                    raise _refusal(file, what or str(path.parent)) from None
            signed = not wait
            if signed:
                with disk_errors(path):
                    _write(file, _own_note())
            yield
        finally:
            _held.remove(file)
            if signed and not shared:  # where others share it, the note may be theirs
                with suppress(OSError):
                    _write(file, "")


def _locked_now(file: IO[str], kind: int) -> bool:
    """Whether the lock could be had without waiting for a process that works."""
    import fcntl

    for _ in range(_LETTING_GO):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            # A holder that has ended was killed in the moment between starting a child and the child's letting go.
            if not _ended_here(_note(file)):
                return False
        time.sleep(0.01)
    return False


def _refusal(file: IO[str], what: str) -> InputError:
    """The error that names the holder, as far as the lock file tells."""
    note = _note(file)
    named = ""
    if note and (note["host"] != platform.node() or _alive_here(note)):
        named = f": process {note['pid']} on {note['host']} since {note['since']}, `{note['command']}`"
    return InputError(
        f"Another process is working in {what}{named}.", "Wait for it to end, stop it, or give another --run."
    )


def _own_note() -> str:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    command = shlex.join(["vqgen", *sys.argv[1:]])
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since, "command": command}) + "\n"


def _write(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()  # nothing is left in the buffer of a forked process


def _note(file: IO[str]) -> dict[str, Any] | None:
    """What the lock file says, made fit for showing; None where it says nothing that can be read."""
    file.seek(0)
    try:
        note = json.loads(file.read(10_000))
        pid = int(note["pid"])
        if not 0 < pid < 2**31:
            return None
        return {
            "pid": pid,
            **{key: re.sub(r"[^\x20-\x7e]", "?", str(note[key]))[:_LONGEST] for key in ("host", "since", "command")},
        }
    except (ValueError, LookupError, TypeError, RecursionError, OSError):
        return None


def _alive_here(note: dict[str, Any] | None) -> bool:
    """Whether the process of a note is one of this machine, not this one, and has not ended."""
    if note is None or note["host"] != platform.node() or note["pid"] == os.getpid() or note["pid"] <= 0:
        return False
    return is_alive(note["pid"])


def _ended_here(note: dict[str, Any] | None) -> bool:
    """Whether the process of a note was one of this machine, and has ended."""
    return note is not None and note["host"] == platform.node() and not is_alive(note["pid"])


def _let_go() -> None:
    # A forked process (a loader of data) has the same open file: it would hold the lock for as long as it lives,
    # even when the process that took the lock was killed.
    while _held:
        with suppress(OSError):
            _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
