"""Bad input: one clear line that says what was wrong and what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import cli
from vqgen.codec import HierarchicalVQVAE

Fails = Callable[..., str]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--config", "shape"], ["'shape'", "Did you mean 'shapes'?"]),
        (["run", "--config", "nowhere/file.yaml"], ["nowhere/file.yaml"]),
        (["train-codes", "--set", "codec.widht=3"], ["codec.widht", "Did you mean 'width'?"]),
        (["train-codes", "--set", "codec"], ["KEY=VALUE"]),
        (["train-codes", "--set", "priors.pixelcn.width=3"], ["pixelcn", "pixelcnn"]),
        (["train-codes", "--set", "priors.pixelcnn.levels.botom.width=8"], ["botom", "bottom"]),
        (["run", "--set", "training.steps=3"], ["training.steps"]),
        (["train-codes", "--data", "./no-such-folder"], ["no-such-folder"]),
        (["train-prior", "--prior", "pixelcnn"], ["vqgen train-codes"]),
        (["sample"], ["vqgen train-codes"]),
        (["sample", "--run", "nothing-here"], ["nothing-here", "vqgen train-codes"]),
        (["sample", "-n", "0"], ["-n"]),
        (["sampel"], ["No such command 'sampel'"]),
    ],
)
def test_before_there_is_a_run(
    arguments: list[str], said: list[str], fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = fails(*arguments)
    for part in said:
        assert part in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train-prior", "--prior", "pixelcn"], ["'pixelcn'", "Did you mean 'pixelcnn'?", "--plugin"]),
        (["train-prior", "--prior", "pixelcnn", "--level", "botom"], ["botom", "top, bottom"]),
        (["train-prior", "--prior", "pixelcnn"], ["already", "--overwrite"]),
        (["train-prior", "--prior", "unigram", "--set", "codec.width=3"], ["codec.width", "was 16, now 3"]),
        (["train-prior", "--prior", "pixelcnn", "--overwrite", "--set", "priors.pixelcnn.depth=1"], ["pixelcnn.depth"]),
        (["sample", "--levels", "3"], ["--levels 3", "top, bottom"]),
        (["sample", "--prior", "unigram"], ["no trained unigram", "pixelcnn", "vqgen train-prior --prior unigram"]),
        (["sample", "--prior", "top=pixelcnn"], ["bottom"]),
        (["sample", "--prior", "topp=pixelcnn"], ["topp", "top, bottom"]),
        (["sample", "--label", "circel"], ["circel", "Did you mean 'circle'?"]),
        (["sample", "--label", "99"], ["99"]),
        (["sample", "--temperature", "hot"], ["hot"]),
        (["sample", "--temperature", "middle=1"], ["middle", "top, bottom"]),
        (["sample", "--temperature", "-1"], ["temperature"]),
        (["sample", "--top-p", "1.5"], ["top_p"]),
        (["sample", "--top-k", "0"], ["top_k"]),
        (["sample", "--guidance", "2"], ["label dropout", "label_dropout"]),
        (["sample", "--out", "../escape"], ["../escape"]),
        (["reconstruct", "--split", "tset"], ["tset", "test"]),
        (["compare", "--prior", "unknown"], ["'unknown'"]),
    ],
)
def test_on_a_finished_run(arguments: list[str], said: list[str], fails: Fails, finished_run: Path) -> None:
    before = contents(finished_run)
    message = fails(*arguments, "--run", str(finished_run))
    for part in said:
        assert part in message
    assert contents(finished_run) == before


def test_all_problems_at_once_with_file_and_key_path(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("codec: {strides: [4, 8], width: wide}\ndata: {channels: 7}\npriors: {pixelcnn: {blokcs: 2}}\n")
    message = fails("train-codes", "--config", str(path), "--run", str(tmp_path / "run"))
    for part in (str(path), "codec.width", "data.channels", "priors.pixelcnn.blokcs", "blocks"):
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_run_that_already_holds_the_stage(fails: Fails, finished_run: Path) -> None:
    message = fails("train-codes", "--run", str(finished_run), "--config", "shapes")
    assert "already holds" in message
    assert "--overwrite" in message


def test_several_runs_and_none_named(
    fails: Fails, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text((finished_run / "run.json").read_text())
    message = fails("sample")
    assert "one" in message
    assert "two" in message
    assert "--run" in message


@pytest.mark.parametrize("content", ["nothing", "text"])
def test_a_data_folder_without_images(content: str, fails: Fails, tmp_path: Path, tiny_config: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if content == "text":
        (data / "notes.txt").write_text("no image")
    message = fails("train-codes", "--config", str(tiny_config), "--data", str(data), "--run", str(tmp_path / "run"))
    assert str(data) in message
    assert not (tmp_path / "run").exists()


def test_a_label_where_there_are_none(fails: Fails, tmp_path: Path, tiny_config: Path) -> None:
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8))
    run = str(tmp_path / "run")
    assert (
        cli.call(["train-codes", "--config", str(tiny_config), "--data", str(tmp_path / "grey.npy"), "--run", run]) == 0
    )
    assert cli.call(["train-prior", "--prior", "transformer", "--run", run]) == 0
    assert cli.call(["sample", "-n", "2", "--run", run]) == 0
    assert "no labels" in fails("sample", "--label", "3", "--run", run)


def test_codes_of_another_codec(fails: Fails, run_copy: Path) -> None:
    codec = HierarchicalVQVAE.from_pretrained(run_copy / "codec")
    with torch.no_grad():
        next(codec.parameters()).add_(1)
    codec.save_pretrained(run_copy / "codec")
    for command in (["sample"], ["compare"], ["train-prior", "--prior", "unigram"]):
        message = fails(*command, "--run", str(run_copy))
        assert "another codec" in message


def test_a_prior_of_another_codec(fails: Fails, run_copy: Path) -> None:
    path = run_copy / "priors/pixelcnn/top/config.json"
    saved = json.loads(path.read_text())
    saved["spec"]["codec_fingerprint"] = "0" * 64
    path.write_text(json.dumps(saved))
    message = fails("sample", "--prior", "pixelcnn", "--run", str(run_copy))
    assert "another codec" in message
    assert "--overwrite" in message


@pytest.mark.parametrize("part", ["codec", "priors/pixelcnn/top"])
@pytest.mark.parametrize("damage", ["weights", "config", "missing"])
def test_a_damaged_model(part: str, damage: str, fails: Fails, run_copy: Path) -> None:
    weights, config = run_copy / part / "model.safetensors", run_copy / part / "config.json"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        config.write_text(config.read_text()[:-20])
    else:
        weights.unlink()
    message = fails("sample", "--prior", "pixelcnn", "--run", str(run_copy))
    assert (config.name if damage == "config" else weights.name) in message


@pytest.mark.parametrize("name", ["run.json", "codes/codes.json", "config.yaml"])
def test_a_damaged_record(name: str, fails: Fails, run_copy: Path) -> None:
    path = run_copy / name
    path.write_text(path.read_text()[: len(path.read_text()) // 2] + "}{")
    assert path.name in fails("compare", "--run", str(run_copy))


def test_a_full_disk(fails: Fails, tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vqgen.hub.save_file", full)
    run = tmp_path / "run"
    message = fails("train-codes", "--config", str(tiny_config), "--run", str(run))
    assert "disk is full" in message
    assert not (run / "codec/model.safetensors").exists()
    assert not list(run.rglob("*.tmp"))


def test_a_loss_that_is_not_finite(fails: Fails, tmp_path: Path, tiny_config: Path) -> None:
    run = tmp_path / "run"
    message = fails(
        "train-codes", "--config", str(tiny_config), "--run", str(run), "--set", "training.learning_rate=1e30"
    )
    assert "step" in message
    assert "learning rate" in message
