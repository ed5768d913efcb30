"""Files that get to disk whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from vqgen.errors import InputError
from vqgen.files import (
    atomic_folder,
    clear_remains,
    csv_text,
    disk_errors,
    read_json,
    remove_folder,
    replace_folder,
    replacing,
    require_writable,
    write_json,
    write_text,
)


def test_write_text_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep/er/x.txt"
    write_text(path, "old é\n")

    def full(self: Path, text: str, encoding: str) -> int:
        self.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"The disk is full: .*x\.txt was not written"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old é\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.inf, 1.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == read_json(tmp_path / "x.json") == {"a": [None, 1.5]}
    with pytest.raises(InputError, match=r"y\.json is missing"):
        read_json(tmp_path / "y.json")
    (tmp_path / "x.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match=r"x\.json is damaged"):
        read_json(tmp_path / "x.json")


def test_atomic_folder_replaces_or_leaves(tmp_path: Path) -> None:
    target = tmp_path / "codes"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with atomic_folder(target) as folder:
        (folder / "b").write_text("2")
    assert [entry.name for entry in target.iterdir()] == ["b"]

    def fail() -> None:
        with atomic_folder(target) as folder:
            (folder / "c").write_text("3")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="disk is full"):
        fail()
    assert [entry.name for entry in target.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["codes"]


def test_disk_errors_of_safetensors_and_permissions(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        with disk_errors(tmp_path):
            raise error

    with pytest.raises(InputError, match="disk is full"):
        fail(SafetensorError("I/O error: No space left on device (os error 28)"))
    with pytest.raises(InputError, match="larger than a file may be here"):
        fail(OSError(errno.EFBIG, "File too large"))
    with pytest.raises(InputError, match="forbidden cannot be written"):
        fail(PermissionError(errno.EACCES, "Permission denied", "forbidden"))
    with pytest.raises(ValueError, match="other"):
        fail(ValueError("other"))


def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine", encoding="utf-8")
    for path in (Path("new"), Path("file"), Path("a/b/c"), Path(), tmp_path / "a", Path("/")):
        require_writable(path)
    for path in (Path("file/new"), tmp_path / "file" / "a" / "b"):
        with pytest.raises(InputError, match="file is a file"):
            require_writable(path)
    for path in (Path("x" * 300), Path("x" * 300) / "y"):
        with pytest.raises(InputError, match="File name too long"):
            require_writable(path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # nothing is forbidden to a superuser
    with pytest.raises(InputError, match=r"no permission in \."):
        require_writable(Path("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_what_a_spreadsheet_would_run_becomes_text(text: str) -> None:
    assert csv_text(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "cat", "a=b", "-1", "+2.5e-3", "<script>"])
def test_other_cells_stay_as_they_are(text: str) -> None:
    assert csv_text(text) == text


def tag(pid: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', platform.node())[:32]}-{pid}"


def test_remains_of_an_earlier_process_of_the_same_number_are_put_right(tmp_path: Path) -> None:
    """In a container that was started anew, the command has the number that it had before."""
    own, alive = tag(os.getpid()), tag(os.getppid())
    (tmp_path / f".codes.{own}.old").mkdir()
    (tmp_path / f".x.{own}.tmp").write_text("half")
    (tmp_path / f".y.{alive}.tmp").write_text("of a process that works")
    with replacing(tmp_path / "z") as mine:
        mine.write_text("of this one")
        clear_remains(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".y.{alive}.tmp", "codes", "z"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_writing_clears_what_a_killed_process_left_of_the_same(kind: str, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".x.{tag(ended.pid)}.tmp").write_text("half")
    (tmp_path / f".other.{tag(ended.pid)}.tmp").write_text("half")
    if kind == "file":
        write_text(tmp_path / "x", "whole")
    else:
        with atomic_folder(tmp_path / "x"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.{tag(ended.pid)}.tmp", "x"]


def test_a_removal_that_is_cut_short_leaves_nothing_by_the_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "codec"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "model").write_text("1")

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists()
    assert list(tmp_path.iterdir())
    clear_remains(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_folder(folder)  # which is no longer there


def test_names_that_are_no_remains_of_anything_are_left_alone(tmp_path: Path) -> None:
    host = re.sub(r"[^A-Za-z0-9]+", "_", platform.node())[:32]
    names = {f"...{host}-999999999.old", f"....{host}-999999999.old", ".x.elsewhere-999999999.old"}
    for name in names:
        (tmp_path / name).write_text("of somebody else")
    clear_remains(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("when", [0, 1])
def test_a_signal_between_the_two_renames_of_a_replacement(
    when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, source = tmp_path / "codes", tmp_path / "new"
    for folder in (target, source):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    real, calls = Path.rename, []

    def stopped(self: Path, other: Path) -> Path:
        renamed = real(self, other)
        calls.append(self)
        if len(calls) == when + 1:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(source, target)
    assert (target / "name").read_text() == ("codes", "new")[when]
