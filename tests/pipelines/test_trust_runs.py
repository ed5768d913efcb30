"""A stranger's run: nothing in it leads elsewhere, runs, hangs or takes over the terminal."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.fuzz import limited
from pipelines import cli
from pipelines.begun import Begun
from vqgen.errors import InputError
from vqgen.hub import fingerprint

Fails = Callable[..., str]

COMMANDS = (
    ("info",),
    ("sample", "-n", "1"),
    ("reconstruct",),
    ("compare",),
    ("train-prior", "--prior", "pixelcnn", "--overwrite"),
    ("train-codes", "--resume"),
    ("train-codes", "--overwrite"),
)


class Payload:
    """What an unpickler would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder of the user's own, which nobody may touch."""
    folder = tmp_path / "own"
    (folder / "top").mkdir(parents=True)
    (folder / "thesis.txt").write_text("ten years of work")
    (folder / "top" / "more.txt").write_text("more")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("place", "to"),
    [
        ("samples", "."),
        ("samples/best", "."),
        ("reconstruct", "."),
        ("compare", "."),
        ("codec", "."),
        ("codec/checkpoints", "."),
        ("priors/pixelcnn", "."),
        (".lock", "thesis.txt"),
        ("run.json.tmp", "thesis.txt"),
        ("codec/metrics.jsonl", "thesis.txt"),
        ("priors/pixelcnn/top/metrics.jsonl", "thesis.txt"),
        ("codec/checkpoints/.lock", "thesis.txt"),
        ("codec/checkpoints/latest", "no-such-file"),
        (".codec.lock", "thesis.txt"),
        (".priors-pixelcnn-top.lock", "thesis.txt"),
        ("codec/wandb", "."),
        ("wandb/out", "."),
        ("priors/wandb/top", "."),
    ],
)
def test_a_link_out_of_the_run(place: str, to: str, fails: Fails, run_copy: Path, beside: Path) -> None:
    path = run_copy / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to((beside / to).resolve())
    before = contents(beside)
    for command in COMMANDS:
        message = fails(*command, "--run", str(run_copy))
        assert "leads out of the run" in message or "is not a run" in message
        assert place in message or "is not a run" in message
    assert contents(beside) == before
    assert path.is_symlink()


def test_a_relative_link_out_of_the_run_and_a_loop(fails: Fails, run_copy: Path, beside: Path) -> None:
    for target in ("../own", "loop", "codec/../../own/top"):
        (run_copy / "loop").symlink_to(target)
        assert "leads out of the run, or nowhere" in fails("info", "--run", str(run_copy))
        (run_copy / "loop").unlink()


def test_links_within_the_run_and_to_the_run_are_fine(run_copy: Path, tmp_path: Path) -> None:
    (run_copy / "best").symlink_to("samples/best")
    (run_copy / "codec/wandb").mkdir()
    (run_copy / "codec/wandb/debug.log").symlink_to(tmp_path / "no-such-cache")
    (tmp_path / "elsewhere").symlink_to(run_copy)
    assert cli.call(["info", "--run", str(tmp_path / "elsewhere")]) == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    "place", [".lock", "run.json", "config.yaml", "codec/metrics.jsonl", "codec/model.safetensors"]
)
def test_a_pipe_does_not_hold_a_command(place: str, fails: Fails, run_copy: Path) -> None:
    (run_copy / place).unlink(missing_ok=True)
    os.mkfifo(run_copy / place)
    for command in COMMANDS:
        with limited(20):
            fails(*command, "--run", str(run_copy))


@pytest.mark.parametrize(
    "stage",
    [
        "../own",
        "priors/../../own",
        "priors/pixelcnn/..",
        "/etc",
        "priors/a/b/c",
        "",
        "priors//top",
        "codec\x1b[2J",
        "priors/.hidden/top",
        "a\\b",
        "C:x",
        "wandb/out/top",
        "samples/best",
        "priors/it's/top",
        "priors/x; reboot/top",
        "priors/pixelcnn/first",
    ],
)
def test_a_stage_that_is_no_folder_of_a_run(stage: str, fails: Fails, run_copy: Path, beside: Path) -> None:
    edit(run_copy / "run.json", lambda saved: saved["stages"].update({stage: {"steps": 1}}))
    before = contents(beside)
    for command in COMMANDS:
        assert "run.json" in fails(*command, "--run", str(run_copy))
    assert contents(beside) == before


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("stages", "codec"), [1]),
        (("stages", "codec", "seconds"), "long"),
        (("stages", "codec", "steps"), None),
        (("stages", "codec", "validation"), [0.1]),
        (("stages", "codec", "validation", "mse"), {"a": 1}),
        (("stages", "codes", "images", "train"), "many"),
        (("stages", "codes", "images"), 7),
        (("stages", "codec", "fingerprint"), 7),
        (("data", "description"), ["\x1b"]),
        (("data",), None),
        (("commands",), {}),
        (("stages",), []),
        (("format",), 2),
        (("format",), "1"),
    ],
)
def test_a_record_of_other_things(keys: tuple[str, ...], value: Any, fails: Fails, run_copy: Path) -> None:
    def change(saved: Any) -> None:
        for key in keys[:-1]:
            saved = saved[key]
        saved[keys[-1]] = value

    edit(run_copy / "run.json", change)
    for command in (("info",), ("info", "--json"), ("sample", "-n", "1")):
        assert "run.json" in fails(*command, "--run", str(run_copy))


def test_what_samples_say_of_themselves_removes_nothing_else(run_copy: Path, beside: Path) -> None:
    """Training a prior anew removes samples that were made with it: by their place, not by what they say."""
    edit(run_copy / "samples/best/sample.json", lambda saved: saved.update(name="../../own", folder=str(beside)))
    before = contents(beside)
    assert (
        cli.call(["train-prior", "--prior", "pixelcnn", "--level", "top", "--overwrite", "--run", str(run_copy)]) == 0
    )
    assert contents(beside) == before


HOSTILE = (
    "\x1b[2J\x1b[31mred",
    "\u202egnp",
    "<script>alert(1)</script>",
    "$\\frac{",
    "a|b",
    "=1+1",
    "%s{0}",
    "[bold]b",
)


def rename_classes(run: Path, names: tuple[str, ...]) -> None:
    edit(run / "codes/codes.json", lambda saved: saved.update(class_names=names))
    for path in run.glob("priors/*/*/config.json"):
        edit(path, lambda saved: saved["spec"].update(class_names=names))


@pytest.fixture
def hostile_run(run_copy: Path) -> Path:
    rename_classes(run_copy, HOSTILE)
    return run_copy


@pytest.mark.parametrize(
    "command",
    [
        ["compare"],
        ["sample", "-n", "2"],
        pytest.param(["diagnose"], marks=pytest.mark.slow),
        pytest.param(["evaluate"], marks=pytest.mark.slow),
        pytest.param(["score", "-n", "2"], marks=pytest.mark.slow),
    ],
)
def test_class_names_are_shown_and_not_obeyed(
    command: list[str], hostile_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(hostile_run.rglob("*"))
    capfd.readouterr()
    assert cli.call([*command, "--run", str(hostile_run)]) == 0
    said = capfd.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\u202e" not in said.out + said.err
    for path in set(hostile_run.rglob("*.html")) | (set(hostile_run.rglob("*")) - before):
        if path.suffix in (".html", ".svg"):
            assert "<script>alert" not in path.read_text(encoding="utf-8")


def test_class_names_in_an_error(fails: Fails, hostile_run: Path) -> None:
    message = fails("sample", "--label", "redd", "--run", str(hostile_run))
    assert "redd" in message
    assert not {"\x1b", "\u202e"} & set(message)


def test_keys_of_a_config_in_an_error(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('codec: {"\\e[2Jwidth": 1}\n"\\e]0;title\\a": 2\n', encoding="utf-8")
    message = fails("train-codes", "--config", str(path), "--run", str(tmp_path / "run"))
    assert "width" in message
    assert not {"\x1b", "\x07"} & set(message)


def test_codes_of_other_sizes_than_the_codec(fails: Fails, run_copy: Path) -> None:
    for key, value in (("codebook_size", 2**19), ("code_dim", 4), ("codebook_size", 2**30), ("height", -1)):
        whole = (run_copy / "codes/codes.json").read_text()
        edit(run_copy / "codes/codes.json", lambda saved, key=key, value=value: saved["levels"][0].update({key: value}))
        assert "codes" in fails("train-prior", "--prior", "unigram", "--run", str(run_copy))
        assert "codes" in fails("sample", "-n", "1", "--run", str(run_copy))
        (run_copy / "codes/codes.json").write_text(whole)


def test_a_prior_in_the_place_of_another(fails: Fails, run_copy: Path) -> None:
    for source, target in (("transformer/top", "pixelcnn/top"), ("pixelcnn/top", "pixelcnn/bottom")):
        kept = {
            name: (run_copy / "priors" / target / name).read_bytes() for name in ("config.json", "model.safetensors")
        }
        for name in kept:
            shutil.copy(run_copy / "priors" / source / name, run_copy / "priors" / target / name)
        assert "holds no pixelcnn prior" in fails("sample", "-n", "1", "--prior", "pixelcnn", "--run", str(run_copy))
        for name, content in kept.items():
            (run_copy / "priors" / target / name).write_bytes(content)


def test_a_codec_that_grew(fails: Fails, run_copy: Path) -> None:
    """Its fingerprint is right, since the stranger wrote that too."""
    edit(run_copy / "codec/config.json", lambda saved: saved["config"].update(width=10**6))
    known = fingerprint(run_copy / "codec")
    edit(run_copy / "codes/codes.json", lambda saved: saved.update(codec_fingerprint=known))
    message = fails("sample", "-n", "1", "--run", str(run_copy))
    assert "config.json" in message


def test_pickles_for_data_are_not_unpickled(fails: Fails, run_copy: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(pickle.dumps(Payload(made)))
    np.save(tmp_path / "objects.npy", np.array([Payload(made)] * 3, dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", images=np.array([Payload(made)] * 3, dtype=object))
    for source in ("images", "objects.npy", "objects.npz"):
        fails("score", "--data", str(tmp_path / source), "--run", str(run_copy))
        fails("train-codes", "--data", str(tmp_path / source), "--run", str(tmp_path / "new"))
    for name in ("codes/test/data-00000-of-00001.arrow", "config.yaml", "run.json"):
        (run_copy / name).write_bytes(pickle.dumps(Payload(made)))
        fails("compare", "--run", str(run_copy))
    assert not made.exists()
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_names_a_file_of_another_folder(fails: Fails, run_copy: Path) -> None:
    from vqgen import checkpoint

    edit(run_copy / "run.json", lambda saved: saved["stages"].pop("priors/pixelcnn/top"))
    for state in (run_copy / "priors/pixelcnn/top/checkpoints").glob("*/state.json"):
        body = json.loads(state.read_text())
        del body["checksum"]
        body["files"]["../../../../../run.json"] = [1, 1]
        state.write_text(json.dumps({**body, "checksum": checkpoint._text_checksum(body)}))
    message = fails("train-prior", "--prior", "pixelcnn", "--level", "top", "--resume", "--run", str(run_copy))
    assert "state.json" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made | {"images": made["images"].float()},
        lambda made: made | {"labels": made["labels"] + 100},
        lambda made: made | {"codes.0": made["codes.0"] + 1000},
        lambda made: made | {"codes.1": made["codes.1"] - 1000},
        lambda made: {name: torch.cat([value] * 5) for name, value in made.items()},
    ],
    ids=["images", "labels", "codes", "negative", "more"],
)
def test_a_sampling_that_somebody_else_began(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    run_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What cannot be of this sampling is not gone on with: the samples are those of an unbroken one."""
    command = ["sample", "-n", "8", "--batch-size", "4", "--prior", "pixelcnn", "--run", str(run_copy)]
    assert cli.call(command) == 0
    made = run_copy / "samples/pixelcnn-2-levels-seed-0"
    before = load_file(made / "codes.safetensors")
    shutil.rmtree(made)
    add = Begun.add

    def begin(self: Begun, series: str, tensors: Any, note: Any = None) -> None:
        add(self, series, change(dict(tensors)), note)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.begun.SHARD_SECONDS", 0.0)
        patch.setattr(Begun, "add", begin)
        assert cli.call(command) == 130
    assert list(made.parent.glob(".*.begun/*.safetensors"))
    assert cli.call(command) == 0
    after = load_file(made / "codes.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "change",
    [lambda codes: codes > 0, lambda codes: codes + 1000, lambda codes: torch.cat([codes] * 5)],
    ids=["type", "range", "more"],
)
def test_an_encoding_that_somebody_else_began(
    change: Callable[[torch.Tensor], torch.Tensor], run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["encode", "--data", "shapes", "--run", str(run_copy), "--out"]
    assert cli.call([*command, str(tmp_path / "whole")]) == 0
    add = Begun.add

    def begin(self: Begun, series: str, tensors: Any, note: Any = None) -> None:
        add(self, series, {name: change(value) for name, value in tensors.items()}, note)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.begun.SHARD_SECONDS", 0.0)
        patch.setattr(Begun, "add", begin)
        assert cli.call([*command, str(tmp_path / "again")]) == 130
    assert cli.call([*command, str(tmp_path / "again")]) == 0
    whole, again = ((tmp_path / name / "codes.json").read_text() for name in ("whole", "again"))
    assert whole == again


def test_a_link_out_of_a_sweep(beside: Path, tmp_path: Path) -> None:
    from pipelines.sweep_record import hold, read_record

    (tmp_path / "sweep/runs/a").mkdir(parents=True)
    for place in (".lock", "runs/a/.lock", "runs/b"):
        (tmp_path / "sweep" / place).symlink_to(beside / "thesis.txt")
        before = contents(beside)
        with pytest.raises(InputError, match="leads out of"):
            read_record(tmp_path / "sweep")
        with ExitStack() as stack, pytest.raises(InputError, match="leads out of"):
            hold(stack, tmp_path / "sweep")
        assert contents(beside) == before
        (tmp_path / "sweep" / place).unlink()
