"""Some cases of `benchmarks.fuzz`, and that its watch would see what it looks for."""

from __future__ import annotations

import pickle
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from random import Random

import pytest

from benchmarks import fuzz, mutations
from pipelines import cli

CASES = 30
"""As many of all kinds as a few seconds allow; the script runs thousands."""


@pytest.fixture(scope="module")
def watch() -> fuzz.Watch:
    # An audit hook stays for the life of the process; it does nothing while no case runs.
    return fuzz.Watch()


@pytest.fixture(scope="module")
def base(finished_run: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copy(tiny_config, folder / "tiny.yaml")
    run = shutil.copytree(finished_run, folder / "run", ignore=shutil.ignore_patterns("previews", "compare"))
    assert cli.call(["train-prior", "--prior", "unigram", "--run", str(run)]) == 0
    for name, prior in (("file", "pixelcnn"), ("short", "unigram")):
        out = str(folder / f"{name}.vqgen")
        assert cli.call(["compress", "-n", "2", "--prior", prior, "--out", out, "--run", str(run)]) == 0
    fuzz.make_sweep(folder)
    return folder


@pytest.mark.parametrize("number", range(CASES))
def test_a_case_ends_well(number: int, base: Path, watch: fuzz.Watch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers out of range, say: what counts is how it ends
        result = fuzz.run_case(number, base, watch)
    assert not result["problem"], result


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 7, 8])
def test_a_number_always_makes_the_same_case(number: int, base: Path, tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        kind = fuzz.KINDS[number % len(fuzz.KINDS)]
        what, commands = fuzz.prepare(kind, Random(number), base, tmp_path / name)
        made.append((what, commands, mutations.digest(tmp_path / name)))
    assert made[0] == made[1]


def test_the_watch_sees_what_it_looks_for(watch: fuzz.Watch, tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    with watch.over(inside) as seen:
        (inside / "fine").write_text("x")
        assert seen == []
        (inside / "fine").rename(inside / "fine too")
        assert seen == []
        outside.write_text("x")
        assert len(seen) == 1
        outside.unlink()
        (inside / "link").symlink_to(tmp_path)
        (inside / "link" / "through").mkdir()
        (tmp_path / "inside").mkdir()  # which only begins like the folder that is allowed
        shutil.rmtree(tmp_path / "inside")
        subprocess.run([sys.executable, "-c", ""], check=True)
        pickle.loads(b"cos\ngetcwd\n.")
        with socket.socket() as one:
            one.settimeout(0.1)
            one.connect_ex(("127.0.0.1", 9))
    text = "\n".join(seen)
    for event in ("open", "os.remove", "os.mkdir", "subprocess.Popen", "pickle.find_class", "socket.connect"):
        assert event in text, event
    for event in ("os.mkdir", "shutil.rmtree"):
        assert f"{event} {tmp_path.resolve() / 'inside'}" in seen
    before = len(seen)
    outside.write_text("x")
    assert len(seen) == before


def test_a_case_that_hangs_is_stopped() -> None:
    with pytest.raises(fuzz.Slow), fuzz.limited(0.05):
        signal.pause()


def test_what_ends_badly_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_(arguments: list[str]) -> int:
        raise KeyError(arguments[0])

    monkeypatch.setattr(cli, "call", raise_)
    assert "KeyError" in fuzz.ended(["info"])[1]
    monkeypatch.setattr(cli, "call", lambda arguments: 1)
    assert "exit code 1" in fuzz.ended(["info"])[1]

    def colour(arguments: list[str]) -> int:
        print("\x1b[31mred")
        return 0

    monkeypatch.setattr(cli, "call", colour)
    assert "printed" in fuzz.ended(["info"])[1]
    monkeypatch.setattr(cli, "call", lambda arguments: 2)
    assert fuzz.ended(["info"]) == (2, "")
