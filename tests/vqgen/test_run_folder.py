from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vqgen import run_folder
from vqgen.errors import InputError
from vqgen.files import write_json
from vqgen.run_folder import RunFolder, find_run, plain_name, run_for, versions


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/shapes")
    folder.create()
    return folder


def make(name: str) -> None:
    RunFolder(f"runs/{name}").create()


def test_paths(run: RunFolder) -> None:
    assert run.prior("pixelcnn", "top") == Path("runs/shapes/priors/pixelcnn/top")
    assert run.samples("first") == Path("runs/shapes/samples/first")
    assert (run.name, run.codec.name, run.codes.name, run.compare.name) == ("shapes", "codec", "codes", "compare")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "c:x", ".hidden", "a\nb", "x" * 101])
def test_names_that_are_no_plain_names_are_refused(run: RunFolder, name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name of a prior"):
        run.prior(name, "top")
    with pytest.raises(InputError, match="cannot be the name of a level"):
        run.prior("pixelcnn", name)
    with pytest.raises(InputError, match="cannot be the name of a sample set"):
        run.samples(name)


def test_plain_names_pass() -> None:
    for name in ("pixelcnn", "top=a,bottom=b", "2024-01-01 first", "v1.2"):
        assert plain_name(name, "thing") == name


def test_records_survive(run: RunFolder) -> None:
    run.record_data({"fingerprint": "abc"})
    run.record_command(["vqgen", "train-codes"])
    run.record_stage("codec", {"best": 0.5, "bad": math.nan})
    run.record_stage("priors/pixelcnn/top", {})
    again = RunFolder(run.path)
    again.create()
    saved = again.read()
    assert saved["format"] == 1
    assert saved["data"] == {"fingerprint": "abc"}
    assert saved["commands"][0]["argv"] == ["vqgen", "train-codes"]
    assert list(again.stages()) == ["codec", "priors/pixelcnn/top"]
    stage = again.stage("codec")
    assert stage is not None
    assert (stage["best"], stage["bad"], stage["versions"]) == (0.5, None, versions())
    assert again.require_stage("codec", "vqgen train-codes") == stage
    with pytest.raises(InputError, match=r"no codes yet\. Make it with `vqgen encode --run"):
        again.require_stage("codes", "encode")


def test_removed_stages_are_forgotten_with_their_files(run: RunFolder) -> None:
    for name in ("codec", "codes"):
        (run.path / name).mkdir()
        run.record_stage(name, {})
    (run.path / "priors/pixelcnn/top").mkdir(parents=True)
    run.remove_stages(["codes", "priors/pixelcnn/top", "never"])
    assert list(run.stages()) == ["codec"]
    assert run.codec.is_dir()
    assert not run.codes.exists()
    assert not (run.path / "priors/pixelcnn/top").exists()


def test_data_description(run: RunFolder) -> None:
    assert run.data_description() == ""
    run.record_data({"description": "shapes: 20,000 train"})
    assert run.data_description() == "shapes: 20,000 train"


def test_versions_name_what_decides_results() -> None:
    assert {"vqgen", "python", "torch", "numpy"} <= versions().keys()


def test_a_run_can_be_moved(run: RunFolder, tmp_path: Path) -> None:
    run.record_stage("codec", {})
    run.path.rename(tmp_path / "elsewhere")
    assert RunFolder(tmp_path / "elsewhere").stage("codec") is not None
    assert str(tmp_path) not in (tmp_path / "elsewhere/run.json").read_text()


def test_create_refuses_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and not a run"):
        RunFolder(tmp_path).create()
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "notes.txt").create()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": 1}', '{"data": 3, "stages": {}, "commands": []}'])
def test_damaged_record_is_one_clear_line(run: RunFolder, text: str) -> None:
    run.record.write_text(text)
    with pytest.raises(InputError, match=r"run\.json"):
        run.read()


def test_record_of_a_newer_version(run: RunFolder) -> None:
    write_json(run.record, {**run.read(), "format": 9})
    with pytest.raises(InputError, match=r"format 9; this vqgen reads 1\. Upgrade"):
        run.read()


def test_find_run_prefers_the_run_then_the_config_then_the_only_one(run: RunFolder) -> None:
    assert find_run(None) == Path("runs/shapes")
    make("cifar10")
    assert find_run(None, "cifar10") == Path("runs/cifar10")
    assert find_run(None, "my/cifar10.yaml") == Path("runs/cifar10")
    assert find_run("runs/shapes", "cifar10") == Path("runs/shapes")
    with pytest.raises(InputError, match=r"Several runs in 'runs/': cifar10, shapes.*--run runs/cifar10"):
        find_run(None)


def test_find_run_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"No run in 'runs/'\. Train one first: vqgen train-codes"):
        find_run(None)
    with pytest.raises(InputError, match=r"No run at 'runs/cifar10'\. .*train-codes --config cifar10"):
        find_run(None, "cifar10")
    make("shapes")
    with pytest.raises(InputError, match=r"No run at 'runs/shape'\. Did you mean 'runs/shapes'"):
        find_run("runs/shape")
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="photos is not a run"):
        find_run("photos")


def test_run_for() -> None:
    assert run_for(None, None) == Path("runs/shapes")
    assert run_for(None, "configs/mine.yaml") == Path("runs/mine")
    assert run_for("here", "cifar10") == Path("here")
    assert run_for(None, None, "uoft-cs/cifar10") == Path("runs/cifar10")
    assert run_for(None, None, "../my photos!/") == Path("runs/my-photos")
    assert run_for(None, None, "..") == Path("runs/images")
    assert run_for(None, "mnist", "photos") == Path("runs/mnist")


def test_a_record_that_another_command_makes_at_the_same_time_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunFolder(tmp_path / "run")

    @contextmanager
    def overtaken(path: Path, **given: Any) -> Iterator[None]:
        monkeypatch.undo()
        other.create()
        other.record_command(["first"])
        with run_folder.locked(path, **given):
            yield

    monkeypatch.setattr(run_folder, "locked", overtaken)
    RunFolder(tmp_path / "run").create()
    assert [command["argv"] for command in other.read()["commands"]] == [["first"]]
