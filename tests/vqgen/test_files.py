"""Files that get to disk whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from vqgen.errors import InputError
from vqgen.files import (
    atomic_folder,
    csv_text,
    disk_errors,
    read_json,
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
