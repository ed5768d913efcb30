"""The command line: the main job as typed, what it prints, and where it puts things."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from pipelines import cli

ROOT = Path(__file__).resolve().parents[2]
PRIORS = ("pixelcnn", "transformer")
STAGES = ["codec", "codes", *(f"priors/{name}/{level}" for level in ("top", "bottom") for name in PRIORS)]


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    assert cli.call([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_four_lines_as_typed_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes_made_tiny = ["--config", str(tiny_config), "--run", "runs/shapes"]
    assert cli.call(["train-codes", *shapes_made_tiny]) == 0
    assert cli.call(["train-prior", "--prior", "transformer"]) == 0
    assert cli.call(["sample", "--levels", "2"]) == 0
    assert cli.call(["compare"]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "runs/shapes/compare/report.html").is_file()
    for expected in ("next: vqgen train-prior", "next: vqgen sample", "next: vqgen compare", "report.html", "unigram"):
        assert expected in out
    grids = list((tmp_path / "runs/shapes/samples").glob("*/grid.png"))
    assert len(grids) == 1
    assert np.asarray(Image.open(grids[0])).std() > 0


def test_every_stage_of_run_is_recorded_and_its_files_are_there(finished_run: Path) -> None:
    record = json.loads((finished_run / "run.json").read_text())
    assert list(record["stages"]) == STAGES
    for stage in ("codec", *STAGES[2:]):
        for name in ("config.json", "model.safetensors", "metrics.jsonl", "metrics.json"):
            assert (finished_run / stage / name).is_file(), f"{stage}/{name}"
    for name in ("compare/report.html", "compare/compare.json", "compare/compare.md", "samples/best/grid.png"):
        assert (finished_run / name).is_file()
    assert not [path for path in finished_run.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".tmp")]


def test_run_again_skips_what_is_finished(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_copy / "codec/model.safetensors").stat().st_mtime_ns
    assert cli.call(["run", "--run", str(run_copy)]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert (run_copy / "codec/model.safetensors").stat().st_mtime_ns == before


def test_samples_are_a_function_of_seed_and_index(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = []
    for batch_size in ("1", "5", "16"):
        made = json_of(
            capsys, "sample", "--run", str(finished_run), "--prior", "pixelcnn", "-n", "16", "--batch-size", batch_size
        )
        codes.append(load_file(Path(made["folder"]) / "codes.safetensors"))
    for other in codes[1:]:
        for level in ("top", "bottom"):
            assert (codes[0][level] != other[level]).float().mean() < 0.02
    assert codes[0]["label"].tolist() == codes[1]["label"].tolist()


def test_fewer_levels_sample_the_coarsest_ones_alone(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json_of(capsys, "sample", "--run", str(finished_run), "--levels", "1", "-n", "4", "--prior", "transformer")
    assert set(load_file(Path(made["folder"]) / "codes.safetensors")) == {"top", "label"}
    both = json_of(capsys, "sample", "--run", str(finished_run), "-n", "4", "--prior", "transformer")
    first, second = (load_file(Path(record["folder"]) / "codes.safetensors")["top"] for record in (made, both))
    assert first.equal(second)


def test_sampling_without_a_prior_takes_the_best_and_says_so(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = json.loads((finished_run / "run.json").read_text())["stages"]
    assert cli.call(["sample", "--run", str(finished_run), "-n", "2", "--out", "chosen"]) == 0
    said = capsys.readouterr().err
    for level in ("top", "bottom"):
        bits = {
            name: stages[f"priors/{name}/{level}"]["validation"]["bits_per_code"]
            for name in ("pixelcnn", "transformer")
        }
        assert f"{level} {min(bits, key=bits.__getitem__)}" in said


def test_labels_by_name_and_by_index(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json_of(capsys, "sample", "--run", str(finished_run), "-n", "4", "--out", "one")
    name = made["class_names"][2]
    by_name = json_of(capsys, "sample", "--run", str(finished_run), "-n", "4", "--label", f"{name},0", "--out", "two")
    assert by_name["labels"] == [2, 0, 2, 0]


def test_options_per_level(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", "--run", str(finished_run), "-n", "2", "--temperature", "top=0,bottom=0.5", "--top-k", "3"]
    made = json_of(capsys, *arguments, "--out", "cold")
    assert made["options"]["top"]["temperature"] == 0
    assert made["options"]["bottom"] == {"temperature": 0.5, "top_k": 3, "top_p": None, "guidance": 1.0}


def test_a_mix_of_priors_samples_and_is_compared(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = "top=transformer,bottom=pixelcnn"
    assert cli.call(["sample", "--run", str(run_copy), "--prior", mix, "-n", "2"]) == 0
    result = json_of(capsys, "compare", "--run", str(run_copy), "--prior", mix, "-n", "4", "--samples", "2")
    rows = {(row["prior"], row["level"]): row for row in result["rows"]}
    parts = [rows["transformer", "top"]["bits_per_image"], rows["pixelcnn", "bottom"]["bits_per_image"]]
    assert rows[mix, "all"]["bits_per_image"] == pytest.approx(sum(parts))


def test_comparison_has_every_column_and_honest_anchors(finished_run: Path) -> None:
    result = json.loads((finished_run / "compare/compare.json").read_text())
    rows = {(row["prior"], row["level"]): row for row in result["rows"]}
    priors = ("uniform", "unigram", "pixelcnn", "transformer")
    sources = {("neighbour", "all"), ("random", "all")}
    assert set(rows) == sources | {(prior, level) for prior in priors for level in ("top", "bottom", "all")}
    columns = {"bits_per_code", "likelihood", "bits_per_dim", "frechet", "cas", "parameters", "samples_per_second"}
    assert all(columns <= set(row) for row in rows.values())
    assert rows["uniform", "top"]["bits_per_code"] == pytest.approx(4.0)
    everything = rows["pixelcnn", "all"]
    dims = 16 * 16 * 3
    decoder, label = (result["provenance"][key] for key in ("decoder_bits_per_dim", "label_bits_per_image"))
    assert 2.5 < label < 4  # eight classes, about equally frequent
    assert everything["bits_per_dim"] == pytest.approx((everything["bits_per_image"] + label) / dims + decoder)
    assert everything["bits_per_code"] == pytest.approx(everything["bits_per_image"] / 20)


def test_reconstruct_draws_every_level(finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = json_of(capsys, "reconstruct", "--run", str(finished_run), "-n", "3", "--out", str(tmp_path / "out"))
    assert set(made["levels"]) == {"top", "top+bottom"}
    assert Path(made["grid"]).is_file()


def test_encode_other_images(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (30, 20, 20, 3), dtype=np.uint8))
    out = tmp_path / "codes"
    made = json_of(
        capsys, "encode", "--run", str(finished_run), "--data", str(tmp_path / "mine.npy"), "--out", str(out)
    )
    assert sum(made["images"].values()) == 30
    assert (out / "codes.json").is_file()


def test_info_priors_and_presets(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(json_of(capsys, "info", "--run", str(finished_run))["stages"]) == STAGES
    assert cli.call(["info", "--run", str(finished_run)]) == 0
    priors = {row["name"] for row in json_of(capsys, "priors")}
    assert priors >= {"pixelcnn", "pixelsnail", "roundtrip", "transformer", "uniform", "unigram"}
    assert {row["name"] for row in json_of(capsys, "presets")} >= {"shapes", "mnist", "cifar10"}


def test_a_run_can_be_moved(run_copy: Path, tmp_path: Path) -> None:
    moved = run_copy.rename(tmp_path / "elsewhere")
    assert cli.call(["compare", "--run", str(moved), "-n", "4", "--samples", "2"]) == 0


def test_help_answers_without_loading_torch() -> None:
    code = "import sys; from pipelines import cli; cli.call(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    listed = [line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line.startswith("  ")]
    assert listed[:4] == ["run", "train-codes", "encode", "train-prior"]


@pytest.mark.parametrize("command", list(cli.cli.commands))
def test_every_command_has_an_example_in_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call([command, "--help"]) == 0
    assert f"Example: vqgen {command}" in capsys.readouterr().out


def test_a_decoy_package_is_named_and_never_imported(tmp_path: Path) -> None:
    for name in ("priors", "pipelines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the decoy was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "vqgen", "presets"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert str(tmp_path / "priors") in done.stderr
    assert "the decoy was imported" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "goes_on"), [((), False), (("--train", "--minutes", "1", "--prior", "pixelcnn"), True)]
)
def test_an_interrupt_says_how_to_go_on_where_there_is_a_way(
    arguments: tuple[str, ...],
    goes_on: bool,
    finished_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.compare.compare", stop)
    assert cli.call(["compare", "--run", str(finished_run), *arguments]) == 130
    assert ("Go on with: vqgen compare" in capsys.readouterr().err) == goes_on
