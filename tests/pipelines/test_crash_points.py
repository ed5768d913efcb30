"""A command killed before each single change that it makes on disk: from every such state it goes on to the same bits.

Changes are seen by Python's audit events; the state of the disk before each of them is what a SIGKILL would leave.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree")
OF_TIMES = ("run.json", "state.json", "sample.json")
"""Files with seconds or dates in them."""
BEGUN = 'half a line {"step": 2'


class Watcher:
    """Copies ``folder`` before each change below it, each state once, while ``watching``."""

    def __init__(self) -> None:
        self.watching = False

    def watch(self, folder: Path, copies: Path, work: Callable[[], int]) -> list[Path]:
        """The copies, in order, of what was there while ``work``, which must end well, was done."""
        self.folder, self.copies, self.seen = folder, copies, set[int]()
        copies.mkdir()
        self.watching = True
        try:
            assert work() == 0
        finally:
            self.watching = False
        return sorted(copies.iterdir())

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching or not (event in CHANGES or (event == "open" and self._is_writing(arguments))):
            return
        path = arguments[0] if isinstance(arguments[0], (str, os.PathLike)) else ""
        if os.path.isabs(path) and not os.path.abspath(path).startswith(str(self.folder)):
            return  # within a removal, paths are relative
        self.watching = False
        try:
            self._copy()
            if event == "open" and str(path).endswith(".jsonl") and Path(path).exists():
                before = Path(path).read_bytes()
                Path(path).write_bytes(before + BEGUN.encode())
                self._copy()
                Path(path).write_bytes(before)
        finally:
            self.watching = True

    @staticmethod
    def _is_writing(arguments: tuple[Any, ...]) -> bool:
        return isinstance(arguments[0], str) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))

    def _copy(self) -> None:
        state = hash(tuple((name, content) for name, content in sorted(everything(self.folder).items())))
        if state not in self.seen:
            self.seen.add(state)
            shutil.copytree(self.folder, self.copies / f"{len(self.seen):04d}")


@pytest.fixture(scope="module")
def watcher() -> Watcher:
    """One for all tests: such a hook stays for as long as the process lives."""
    hook = Watcher()
    sys.addaudithook(hook)
    return hook


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every file by name, and folders as None."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def results(folder: Path) -> dict[str, Any]:
    """What must be the same in the end: every byte but times, and nothing hidden but locks."""
    found: dict[str, Any] = {}
    for name, content in everything(folder).items():
        path = folder / name
        if path.suffix == ".lock" or path.name == ".lock" or content is None:
            continue
        found[name] = "there" if path.name in OF_TIMES else content
        if path.name == "run.json":
            found[name] = list(json.loads(content)["stages"])
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-codes", "train-codes --overwrite", "train-prior", "encode", "sample"])
def test_killed_at_any_change_and_gone_on_with_is_the_whole(
    command: str, watcher: Watcher, finished_run: Path, tiny_config: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pipelines.begun.SHARD_IMAGES", 16)
    work = tmp_path / "work"
    name, *more = command.split()
    options = {
        "train-codes": ["--config", str(tiny_config), *([] if more else ["--set", "training.checkpoint_every=1"])],
        "train-prior": ["--prior", "pixelcnn", "--level", "top", "--overwrite"],
        "encode": ["--data", "shapes", "--out", str(work / "out"), "--batch-size", "8"],
        "sample": ["-n", "24", "--batch-size", "8", "--prior", "pixelcnn"],
    }[name]
    arguments = [name, "--run", str(work / "run"), *options, *more]
    going_on = [word for word in arguments if word != "--overwrite"] + ["--resume"] * name.startswith("train")
    work.mkdir()
    if command != "train-codes":
        shutil.copytree(finished_run, work / "run")
        shutil.rmtree(work / "run/compare")
    states = watcher.watch(work, tmp_path / "states", lambda: cli.call(arguments))
    expected = results(work)
    assert len(states) > 10
    for state in states[:: max(len(states) // 30, 1)]:
        if command == "train-codes --overwrite" and (state / "run/priors").exists():
            continue  # killed before it had removed what was made from the codec: that is there still
        if (state / "out").exists():
            continue  # what was asked for is there
        shutil.rmtree(work)
        shutil.copytree(state, work)
        assert cli.call(going_on) == 0, state.name
        found = results(work)
        assert found.keys() == expected.keys(), state.name
        assert [key for key in expected if found[key] != expected[key]] == [], state.name
