"""A sweep from the command line: what it makes, how it goes on, and what it keeps apart."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines import cli, sweep
from pipelines.run_codes import open_codes
from pipelines.settings import run_settings
from pipelines.sweep_table import columns_of, figure, summary
from pipelines.train_codes import train_codes
from vqgen.config import Config
from vqgen.console import Console
from vqgen.data import load_data
from vqgen.errors import InputError
from vqgen.hub import fingerprint
from vqgen.run_folder import RunFolder
from vqgen.sampler import evaluation_batches
from vqgen.trainer import Trainer
from vqgen.training_log import read_metrics

BETAS, SIZES = ("0.25", "1"), ("16", "32")
CELLS = [f"commitment={beta},codebook_size={size}" for beta in BETAS for size in SIZES]
GRID = ["--grid", f"codec.commitment={','.join(BETAS)}", "--grid", f"codec.codebook_size={','.join(SIZES)}"]


def command(config: Path, out: Path, *more: str, grid: list[str] = GRID) -> list[str]:
    return ["sweep", "--config", str(config), "--out", str(out), *grid, *more]


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "sweep.json").read_text(encoding="utf-8"))


def states(out: Path) -> dict[str, str]:
    return {cell["name"]: cell["state"] for cell in record_of(out)["cells"]}


def prints(out: Path) -> dict[str, str]:
    return {path.name: fingerprint(path / "codec") for path in sorted((out / "runs").iterdir())}


def times(out: Path) -> dict[str, int]:
    return {path.parent.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/codec/model.safetensors")}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A finished sweep of 2 x 2 cells; not to be changed."""
    out = tmp_path_factory.mktemp("swept") / "beta-k"
    assert cli.call(command(tiny_config, out)) == 0
    return out


@pytest.fixture
def swept_copy(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "beta-k"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables alone: most of the time of so small a sweep goes into its pictures."""
    monkeypatch.setattr(sweep, "draw", lambda *arguments: {})


@pytest.fixture
def one_fails(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first cell of the larger beta cannot be trained; the runs that were tried."""
    tried: list[str] = []

    def train(run: RunFolder, config: Config, console: Console, **options: Any) -> dict[str, Any]:
        tried.append(run.name)
        if run.name == CELLS[2]:
            raise InputError("The disk of\nthis test is odd.", "Do *not* | worry.")
        return train_codes(run, config, console, **options)

    monkeypatch.setattr(sweep, "train_codes", train)
    return tried


def test_every_cell_is_a_whole_run_with_its_settings(swept: Path) -> None:
    assert sorted(path.name for path in (swept / "runs").iterdir()) == sorted(CELLS)
    assert states(swept) == dict.fromkeys(CELLS, "done")
    for cell in record_of(swept)["cells"]:
        run = RunFolder(swept / cell["run"])
        assert {"codec", "codes"} <= set(run.stages())
        config = run_settings(run)
        assert config.codec.commitment == cell["values"]["codec.commitment"]
        assert config.codec.codebook_size == cell["values"]["codec.codebook_size"]
        assert run.read()["commands"][-1]["argv"][:2] == ["vqgen", "sweep"]
        open_codes(run)
    assert len(set(prints(swept).values())) == 4


def test_the_table_is_that_of_the_record_and_of_the_runs(swept: Path) -> None:
    record = record_of(swept)
    lines = list(csv.DictReader((swept / "sweep.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["cell"] for line in lines] == CELLS
    for cell, line in zip(record["cells"], lines, strict=True):
        validation = RunFolder(swept / cell["run"]).stage("codec")["validation"]  # type: ignore[index]
        for column in columns_of(record):
            assert float(line[column.key]) == figure(cell, *column.path)
        for key in ("mse", "psnr", "top_perplexity", "bottom_usage", "decoder_bits_per_dim"):
            assert float(line[key]) == pytest.approx(validation[key], rel=1e-12)
        assert line["codec.commitment"] == f"{cell['values']['codec.commitment']:g}"
    best = min(record["cells"], key=lambda cell: cell["figures"]["nmse"])
    assert record["best"] == best["name"]
    text = (swept / "sweep.md").read_text(encoding="utf-8")
    assert all(f"{cell['figures']['nmse']:.4f}" in text for cell in record["cells"])
    assert f"**{best['figures']['nmse']:.4f}**" in text


def test_a_narrow_terminal_gets_fewer_columns_and_never_loses_the_main_ones(swept: Path) -> None:
    record = record_of(swept)
    whole, lines = summary(record)
    assert {"MSE", "NMSE", "top used", "seconds"} <= set(whole)
    assert len(lines) == len(CELLS)
    before = len(whole)
    for width in (200, 120, 100, 80, 60, 10):
        titles, lines = summary(record, width)
        assert len(titles) <= before
        assert {"NMSE", "top perp.", "bottom perp.", "commitment", "codebook_size"} <= set(titles)
        assert all(len(line) == len(titles) for line in lines)
        before = len(titles)
    assert before < len(whole)


def test_nmse_is_the_error_over_the_variance_of_the_same_images(swept: Path) -> None:
    cell = record_of(swept)["cells"][0]
    config = run_settings(RunFolder(swept / cell["run"]))
    validation = load_data(config.data, config.seed).splits["validation"]
    read = evaluation_batches(validation, config.codec.training.evaluate_images, 3)
    values = torch.cat([batch["images"] for batch in read]).double() / 255
    variance = float(values.var(correction=0))
    assert cell["figures"]["pixel_variance"] == pytest.approx(variance)
    assert cell["figures"]["nmse"] == pytest.approx(cell["figures"]["mse"] / variance)


def test_the_pictures_are_there(swept: Path) -> None:
    for name in ("curves", "grid"):
        with Image.open(swept / f"{name}.png") as picture:
            assert min(picture.size) > 200
        text = (swept / f"{name}.svg").read_text(encoding="utf-8")
        assert "commitment" in text
        assert "codebook_size" in text


def test_pictures_that_no_longer_hold_are_removed(swept_copy: Path) -> None:
    from pipelines.sweep_figures import draw

    record = record_of(swept_copy)
    assert set(draw(swept_copy, {**record, "cells": []}, Console(silent=True))) == set()
    assert not list(swept_copy.glob("*.png"))
    assert not list(swept_copy.glob("*.svg"))


@pytest.mark.usefixtures("no_pictures")
def test_the_same_command_again_trains_nothing(
    swept_copy: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = times(swept_copy)
    cells = record_of(swept_copy)["cells"]
    assert cli.call(command(tiny_config, swept_copy)) == 0
    captured = capsys.readouterr()
    table = captured.out.partition("Lowest")[0]
    assert all(f"{cell['figures']['nmse']:.4f}" in table for cell in cells)
    assert table.count("*") == 1
    assert "0 to train" in captured.err
    assert "== cell" not in captured.err
    assert "Lowest normalised MSE" in captured.out
    assert "next: vqgen" in captured.out
    assert times(swept_copy) == before
    assert record_of(swept_copy)["cells"] == cells


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_that_was_removed_is_trained_again(swept_copy: Path, tiny_config: Path) -> None:
    before = times(swept_copy)
    prints_before = prints(swept_copy)
    shutil.rmtree(swept_copy / "runs" / CELLS[1])
    assert cli.call(command(tiny_config, swept_copy)) == 0
    after = times(swept_copy)
    assert [name for name in CELLS if after[name] != before[name]] == [CELLS[1]]
    assert prints(swept_copy) == prints_before


@pytest.mark.usefixtures("no_pictures")
def test_an_extended_grid_keeps_finished_cells_and_is_announced_by_cell(
    swept_copy: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, known = times(swept_copy), prints(swept_copy)
    grid = ["--grid", "codec.codebook_size=8,16,32", "--grid", "codec.commitment=0.25,1"]  # the keys turned round
    assert cli.call(command(tiny_config, swept_copy, grid=grid)) == 0
    said = capsys.readouterr().err
    assert "6 cells: 3 of codec.codebook_size x 2 of codec.commitment; 2 to train." in said
    assert "== cell 1 of 6: commitment=0.25, codebook_size=8" in said
    assert "left" in said.partition("== cell 2 of 6: commitment=1, codebook_size=8")[2].splitlines()[0]
    after, now = times(swept_copy), prints(swept_copy)
    assert {name: after[name] for name in CELLS} == before
    assert {name: now[name] for name in CELLS} == known
    assert set(now) - set(known) == {"commitment=0.25,codebook_size=8", "commitment=1,codebook_size=8"}
    assert states(swept_copy) == dict.fromkeys(now, "done")


@pytest.mark.parametrize(
    ("more", "grid", "differs"),
    [
        (["--set", "codec.width=24"], GRID, "codec.width: was 16, now 24"),
        (["--seed", "1"], GRID, "seed: was 0, now 1"),
        (["--prior", "unigram"], GRID, "--prior: was [], now"),
        ([], [*GRID, "--grid", "codec.decay=0.9,0.99"], "grid.codec.decay: was not set"),
        ([], GRID[:2], "grid.codec.codebook_size"),
        ([], [*GRID[:2], "--grid", "codec.codebook_size=16,64"], 'was ["16", "32"], now ["16", "64"]'),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_another_sweep_in_the_same_folder_is_refused(
    more: list[str], grid: list[str], differs: str, swept: Path, tiny_config: Path, fails: Callable[..., str]
) -> None:
    before = record_of(swept)
    said = fails(*command(tiny_config, swept, *more, grid=grid))
    assert differs in said
    assert "--overwrite" in said
    assert record_of(swept) == before


@pytest.mark.usefixtures("no_pictures")
def test_overwrite_redoes_every_cell(swept_copy: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--grid", "codec.commitment=0.25,2"]
    assert cli.call(command(tiny_config, swept_copy, "--overwrite", "--set", "codec.width=24", grid=grid)) == 0
    assert "removing runs" in capsys.readouterr().err
    assert set(prints(swept_copy)) == {"commitment=0.25", "commitment=2"}
    assert not list(swept_copy.glob("*.png"))


def test_a_folder_of_other_things_is_refused_and_left_alone(
    tmp_path: Path, tiny_config: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear", encoding="utf-8")
    for more in ([], ["--overwrite"]):
        assert "not a sweep" in fails(*command(tiny_config, tmp_path / "mine", *more))
    assert "is a file" in fails(*command(tiny_config, tmp_path / "mine/letter.txt"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    (tmp_path / "mine/letter.txt").rename(tmp_path / "mine/sweep.json")
    assert "damaged" in fails(*command(tiny_config, tmp_path / "mine"))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("images", 0, "key"), []),
        (("images", 0, "pixel_variance"), "1"),
        (("cells", 0), 3),
        (("cells", 0, "name"), []),
        (("cells", 0, "state"), "gone"),
        (("cells", 0, "message"), [[1]]),
        (("cells", 0, "figures", "codec"), []),
        (("cells", 0, "figures", "priors"), 5),
        (("cells", 0, "figures", "priors"), {"pixelcnn": None}),
        (("grid",), {"codec.commitment": 1}),
        (("priors",), [1]),
        (("settings",), []),
    ],
)
def test_a_record_of_other_types_is_one_line(
    place: tuple[Any, ...], value: Any, swept_copy: Path, tiny_config: Path, fails: Callable[..., str]
) -> None:
    record = record_of(swept_copy)
    *above, last = place
    part: Any = record
    for key in above:
        part = part[key]
    part[last] = value
    changed = json.dumps(record)
    (swept_copy / "sweep.json").write_text(changed, encoding="utf-8")
    said = fails(*command(tiny_config, swept_copy))
    assert f"not the record of a sweep (bad or missing: {'.'.join(map(str, place))}" in said
    assert (swept_copy / "sweep.json").read_text(encoding="utf-8") == changed


def test_images_that_cannot_be_used_are_one_line_and_nothing_is_made(
    tmp_path: Path, tiny_config: Path, fails: Callable[..., str]
) -> None:
    assert "nowhere" in fails(*command(tiny_config, tmp_path / "out", "--data", str(tmp_path / "nowhere/")))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_that_fails_is_kept_apart_and_tried_again_on_request(
    tmp_path: Path, tiny_config: Path, one_fails: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "beta-k"
    assert cli.call(command(tiny_config, out)) == 0
    captured = capsys.readouterr()
    assert "warning: commitment=1, codebook_size=16 failed: The disk of this test is odd." in captured.err
    assert "failed: commitment=1, codebook_size=16: The disk of this test is odd." in captured.out
    assert states(out) == {**dict.fromkeys(CELLS, "done"), CELLS[2]: "failed"}
    assert record_of(out)["cells"][2]["figures"] == {}
    text = (out / "sweep.md").read_text(encoding="utf-8")
    assert "| 1 | 16 | - |" in text
    assert r"Do \*not\* \| worry." in text
    line = list(csv.DictReader((out / "sweep.csv").read_text(encoding="utf-8").splitlines()))[2]
    assert (line["state"], line["nmse"]) == ("failed", "")

    one_fails.clear()
    assert cli.call(command(tiny_config, out)) == 0
    assert "1 failed before and is left alone" in capsys.readouterr().err
    assert cli.call(command(tiny_config, out, "--retry")) == 0
    assert one_fails == [CELLS[2]]
    assert states(out)[CELLS[2]] == "failed"


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_that_diverges_does_not_stop_the_others_and_starts_anew_on_retry(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--grid", "training.learning_rate=1e30,1e-3"]
    line = command(tiny_config, tmp_path / "out", grid=grid)
    assert cli.call(line) == 0
    assert list(states(tmp_path / "out").values()) == ["failed", "done"]
    message = record_of(tmp_path / "out")["cells"][0]["message"]
    assert message.startswith("The training diverged")
    assert "--overwrite" not in message  # which would redo the other cell too
    capsys.readouterr()
    assert cli.call([*line, "--retry"]) == 0
    said = capsys.readouterr().err
    assert "resuming" not in said
    assert "The training diverged" in said


@pytest.mark.usefixtures("no_pictures")
def test_a_model_too_large_for_the_memory_fails_its_cell_alone(tmp_path: Path, tiny_config: Path) -> None:
    grid = ["--grid", "codec.width=4000000,16"]  # torch has no class for this error of a CPU
    assert cli.call(command(tiny_config, tmp_path / "out", grid=grid)) == 0
    assert list(states(tmp_path / "out").values()) == ["failed", "done"]
    assert "There is not enough memory" in record_of(tmp_path / "out")["cells"][0]["message"]


def test_a_fault_of_the_program_is_not_taken_for_a_cell_that_failed(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pipelines.sweep.train_codes", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.call(command(tiny_config, tmp_path / "out"))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, tiny_config: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was begun")

    monkeypatch.setattr("pipelines.sweep.measure_images", no_work)
    said = fails(*command(tiny_config, tiny_config / "new"))
    assert "cannot be written" in said
    assert "Wait" not in said
    assert "File name too long" in fails(*command(tiny_config, tmp_path / ("x" * 300)))


def test_when_every_cell_fails_so_does_the_sweep(tmp_path: Path, tiny_config: Path, fails: Callable[..., str]) -> None:
    grid = ["--grid", "training.learning_rate=1e30,1e31"]
    said = fails(*command(tiny_config, tmp_path / "out", grid=grid)).splitlines()[-1]
    assert "None of the 2 cells could be trained; the first one: The training diverged" in said
    assert set(states(tmp_path / "out").values()) == {"failed"}
    assert (tmp_path / "out/sweep.md").is_file()
    assert not (tmp_path / "out/curves.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_data_of_one_cell_that_cannot_be_read_fails_that_cell_alone(tmp_path: Path, tiny_config: Path) -> None:
    grid = ["--grid", f"data.source=shapes,{tmp_path / 'nowhere'}/"]
    assert cli.call(command(tiny_config, tmp_path / "out", grid=grid)) == 0
    assert list(states(tmp_path / "out").values()) == ["done", "failed"]
    assert not any("/" in name or os.sep in name for name in states(tmp_path / "out"))


@pytest.mark.usefixtures("no_pictures")
def test_interrupted_and_gone_on_with_equals_uninterrupted(
    swept: Path,
    tmp_path: Path,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = 0
    step = Trainer.step

    def stopped(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6 + 4:  # in the second cell
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    out = tmp_path / "my sweep"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert cli.call(command(tiny_config, out, "--overwrite", "--retry")) == 130
    said = capsys.readouterr().err
    printed = [line.partition("Go on with: ")[2] for line in said.splitlines() if "Go on with: " in line]
    assert len(printed) == 1
    words = shlex.split(printed[0])
    assert words[:2] == ["vqgen", "sweep"]
    assert not {"--overwrite", "--retry", "--resume"} & set(words)
    assert list(states(out).values()) == ["done", "waiting", "waiting", "waiting"]
    first = times(out)[CELLS[0]]

    assert cli.call(words[1:]) == 0
    assert "resuming at step 4" in capsys.readouterr().err
    assert times(out)[CELLS[0]] == first
    assert prints(out) == prints(swept)
    for cell, other in zip(record_of(out)["cells"], record_of(swept)["cells"], strict=True):
        same = {key: value for key, value in cell["figures"].items() if key != "seconds"}
        assert same == {key: value for key, value in other["figures"].items() if key != "seconds"}


def test_priors_in_the_grid_share_one_codec(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(run: RunFolder, config: Config, console: Console, **options: Any) -> dict[str, Any]:
        trained.append(run.name)
        return train_codes(run, config, console, **options)

    monkeypatch.setattr(sweep, "train_codes", train)
    out = tmp_path / "widths"
    line = command(tiny_config, out, "--prior", "top=unigram", grid=["--grid", "priors.pixelcnn.width=8,12"])
    assert cli.call(line) == 0
    assert "1 codec serves all of them" in capsys.readouterr().err
    assert trained == ["width=8"]
    assert len(set(prints(out).values())) == 1
    record = record_of(out)
    for cell in record["cells"]:
        run = RunFolder(out / cell["run"])
        open_codes(run)
        assert run_settings(run).priors["pixelcnn"]["width"] == cell["values"]["priors.pixelcnn.width"]
        assert set(cell["figures"]["priors"]) == {"pixelcnn", "unigram"}
        for level in ("top", "bottom"):
            stage = run.stage(f"priors/pixelcnn/{level}")
            assert stage is not None
            assert cell["figures"]["priors"]["pixelcnn"][level]["bits_per_code"] == stage["validation"]["bits_per_code"]
    bits = {
        cell["name"]: sum(prior["bits_per_code"] for prior in cell["figures"]["priors"]["pixelcnn"].values())
        for cell in record["cells"]
    }
    assert record["best"] == min(bits, key=bits.__getitem__)
    assert "pixelcnn top bits/code" in (out / "sweep.md").read_text(encoding="utf-8")
    assert "bits/code" in (out / "curves.svg").read_text(encoding="utf-8")
    assert "perplexity" not in (out / "curves.svg").read_text(encoding="utf-8")

    # One cell's run is its own: done again, it changes no other.
    other = fingerprint(out / "runs/width=12/codec")
    assert cli.call(["train-codes", "--run", str(out / "runs/width=8"), "--overwrite", "--seed", "5"]) == 0
    assert fingerprint(out / "runs/width=12/codec") == other
    open_codes(RunFolder(out / "runs/width=12"))


def test_an_interrupt_between_trainings_says_the_command_too(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "measure_images", stopped)
    assert cli.call(command(tiny_config, tmp_path / "out", "--retry")) == 130
    line = command(tiny_config, tmp_path / "out")
    assert f"Go on with: vqgen {shlex.join(line)}\n" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_a_codec_that_fails_is_not_trained_again_for_those_that_would_share_it(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command(tiny_config, tmp_path / "out", "--set", "codec.training.learning_rate=1e30")
    line = [word for word in line if word not in GRID] + ["--grid", "priors.pixelcnn.width=8,12"]
    assert cli.call(line) == 2
    cells = record_of(tmp_path / "out")["cells"]
    assert "its codec is that of width=8, which failed: The training diverged" in cells[1]["message"]
    assert not (tmp_path / "out/runs/width=12").exists()


@pytest.mark.usefixtures("no_pictures")
def test_other_images_than_before_are_refused(
    tmp_path: Path, tiny_config: Path, fails: Callable[..., str], swept_copy: Path
) -> None:
    record = record_of(swept_copy)
    record["images"][0]["fingerprint"] = "another"
    (swept_copy / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    grid = [*GRID[:2], "--grid", "codec.codebook_size=16,32,8"]
    assert "not those that this sweep was started with" in fails(*command(tiny_config, swept_copy, grid=grid))
    assert len(prints(swept_copy)) == 4


def test_under_a_launcher_it_is_refused_in_one_line(
    tmp_path: Path, tiny_config: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    said = fails(*command(tiny_config, tmp_path / "out"))
    assert "not under a launcher" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_pictures")
def test_json_is_the_record_and_only_that(
    swept_copy: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.call(command(tiny_config, swept_copy, "--json")) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.err == ""
    assert printed["cells"] == record_of(swept_copy)["cells"]
    assert all(Path(path).is_file() for path in printed["files"].values())


@pytest.mark.usefixtures("no_pictures")
def test_without_out_the_folder_has_the_presets_name(
    tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, one_fails: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.call(["sweep", "--config", str(tiny_config), "--grid", "seed=0,1"]) == 0
    assert (tmp_path / "sweeps" / tiny_config.stem / "sweep.json").is_file()
    assert one_fails == ["seed=0", "seed=1"]


def test_curves_come_from_the_validation_lines(swept: Path) -> None:
    from pipelines.sweep_figures import curves

    record = record_of(swept)
    panels = curves(swept, record)
    assert [(panel.title, panel.log) for panel in panels] == [("codec", True), ("top", False), ("bottom", False)]
    for cell, curve in zip(record["cells"], panels[0].curves, strict=True):
        lines = read_metrics(swept / cell["run"] / "codec/metrics.jsonl")
        errors = [(line["step"], line["mse"]) for line in lines if line["split"] == "validation"]
        variance = cell["figures"]["pixel_variance"]
        assert [(step, pytest.approx(value / variance)) for step, value in errors] == list(curve.points)
        assert dict(curve.points)[cell["figures"]["kept_step"]] == pytest.approx(cell["figures"]["nmse"])


def test_a_heat_map_ranks_what_the_table_ranks(swept: Path) -> None:
    from pipelines.sweep_figures import heat_maps

    record = record_of(swept)
    for cell in record["cells"]:
        cell["figures"]["priors"] = {"pixelcnn": {"top": {"bits_per_code": 3.0 + len(cell["name"]) / 100}}}
    ranked = {found.title: found.better for found in heat_maps(record)}
    unranked = {"top perplexity": None, "bottom perplexity": None}
    assert ranked == {"NMSE": "low", **unranked, "pixelcnn top bits/code": None}  # of codes that are not the same
    for cell in record["cells"]:
        cell["figures"]["codec"] = "one"
    assert {found.title: found.better for found in heat_maps(record)} == {"pixelcnn top bits/code": "low"}


def test_images_of_one_grey_have_no_curve_of_normalised_error(swept: Path) -> None:
    from pipelines.sweep_figures import curves

    record = record_of(swept)
    for cell in record["cells"]:
        cell["figures"]["pixel_variance"] = 0.0
    assert [panel.title for panel in curves(swept, record)] == ["top", "bottom"]


def test_no_cell_of_the_csv_file_is_a_formula(swept: Path) -> None:
    from pipelines.sweep_table import to_csv

    record = record_of(swept)
    record["cells"][0] |= {"values": {"data.source": "=cmd()", "codec.x": -1}, "message": "@SUM(1)"}
    line = to_csv(record).splitlines()[1].split(",")
    assert "'=cmd()" in line
    assert "-1" in line
    assert line[-1] == "'@SUM(1)"
