"""Locks: one holder, who is named; what a killed process leaves holds nobody back."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from vqgen.errors import InputError
from vqgen.locks import locked

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from vqgen.locks import locked
sys.argv = ["vqgen", "train-codes", "--run", "runs/my run\\x1b[31m"]
with locked(Path({path!r}), shared={shared}):
    if {fork} and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(path: Path, *, shared: bool = False, fork: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, perhaps with a child as a loader of data would be; killed at the end."""
    script = HOLD.format(path=str(path), shared=shared, fork=fork)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            with suppress(ProcessLookupError):
                os.killpg(other.pid, 9)


def test_the_holder_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path) as other:
        with pytest.raises(InputError) as refused, locked(path):
            pass
        assert f"Another process is working in {tmp_path}: process {other.pid} on {platform.node()}" in str(
            refused.value
        )
        assert "`vqgen train-codes --run 'runs/my run?[31m'`" in str(refused.value)
        with pytest.raises(InputError, match="working in the codec: process"), locked(path, what="the codec"):
            pass
        assert json.loads(path.read_text())["pid"] == other.pid  # the refused left the holder's note alone


def test_the_lock_of_a_killed_process_holds_nobody_back(tmp_path: Path) -> None:
    with holder(tmp_path / ".lock") as other:
        other.kill()
        other.wait()
        assert (tmp_path / ".lock").read_text()
        with locked(tmp_path / ".lock"):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_a_child_of_the_killed_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path / ".lock", fork=True) as other:
        with pytest.raises(InputError), locked(tmp_path / ".lock"):
            pass
        other.kill()
        other.wait()
        with locked(tmp_path / ".lock"):
            pass


def test_a_lock_whose_holder_has_ended_is_waited_for(tmp_path: Path) -> None:
    """As when the holder was killed and its child has not come to letting go yet."""
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    path.write_text(json.dumps({"pid": ended.pid, "host": platform.node(), "since": "now", "command": "vqgen"}))
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        letting_go = threading.Timer(0.2, file.close)
        letting_go.start()
        with locked(path):
            assert file.closed
        letting_go.join()


def test_shared_locks_go_together_but_not_with_another(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path, shared=True):
        with locked(path, shared=True):
            pass
        with pytest.raises(InputError, match="Another process"), locked(path):
            pass
    with holder(path), pytest.raises(InputError, match="Another process"), locked(path, shared=True):
        pass


@pytest.mark.parametrize(
    "note", ["", "[1]", "{", '{"pid": 1}', "[" * 9999, '{"pid": 9e99, "host": 1, "since": 2, "command": 3}']
)
def test_an_odd_note_names_nobody(tmp_path: Path, note: str) -> None:
    path = tmp_path / ".lock"
    path.write_text(note)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=rf"Another process is working in {tmp_path}\. Wait"), locked(path):
            pass
    with locked(path):
        pass


def test_where_there_are_no_locks_the_note_decides_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / ".lock"
    with holder(path) as other:
        monkeypatch.setattr(fcntl, "flock", none)
        with pytest.raises(InputError, match=f"process {other.pid}"), locked(path):
            pass
        other.kill()
        other.wait()
        with locked(path):
            pass
        with locked(path, wait=True):
            pass


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    with holder(tmp_path / ".lock") as other:
        other.kill()
        started = time.monotonic()
        with locked(tmp_path / ".lock", wait=True):
            assert time.monotonic() - started < 30
