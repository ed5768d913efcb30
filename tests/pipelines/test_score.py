"""``vqgen score``: what it writes agrees with itself and with the comparison, and bad requests leave nothing behind."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox
from PIL import Image
from safetensors.torch import load_file

from pipelines import cli
from pipelines.likelihood import code_density, read_held_out
from pipelines.run_codes import open_codes
from pipelines.run_priors import fit_baseline, load_priors
from pipelines.score import ScoreRequest
from pipelines.scoring.map_pictures import enlarged, shown_rows
from priors.transformer import Transformer
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.detection import auroc
from vqgen.run_folder import RunFolder

LN2 = float(np.log(2))


@pytest.fixture(scope="module")
def scored_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run that only ever gains folders in scores/."""
    import shutil

    return Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("scored") / "run"))


@pytest.fixture
def score(scored_run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def call(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.call(["score", "--run", str(scored_run), "--json", *arguments]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record == json.loads(Path(record["files"]["scores.json"]).read_text())
        return record  # type: ignore[no-any-return]

    return call


@pytest.fixture(scope="module")
def speckles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures of noise, of another size than the run's."""
    path = tmp_path_factory.mktemp("odd") / "speckles.npy"
    np.save(path, Generator(Philox(1)).integers(0, 256, (7, 20, 20), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def judged(scored_run: Path, speckles: Path) -> dict[str, Any]:
    """The record of scores against noise, with maps; made without a draw from the global generators."""
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    arguments = ["--prior", "top=transformer,bottom=pixelcnn", "--against", str(speckles), "--maps", "--out", "judged"]
    assert cli.call(["score", "--run", str(scored_run), "--json", *arguments]) == 0
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    record: dict[str, Any] = json.loads((scored_run / "scores/judged/scores.json").read_text())
    return record


def columns(path: str) -> dict[str, list[Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = ("index", "label")
    return {key: [row[key] if key in texts else float(row[key]) for row in rows] for key in rows[0]}


def test_the_columns_add_up(score: Callable[..., dict[str, Any]], scored_run: Path) -> None:
    record = score("--prior", "transformer")
    found = columns(record["files"]["scores.csv"])
    assert list(found) == [
        *("index", "label", "top_bits", "bottom_bits", "code_bits", "decoder_bits", "label_bits", "total_bits"),
        "bits_per_dim",
        *("complexity_bits", "complexity_corrected", "baseline_bits", "ratio", "mse"),
    ]
    assert found["index"] == [str(place) for place in range(6)]
    assert found["label"] == ["circle", "square", "triangle", "star", "cross", "ring"]
    for row in range(6):
        at = {key: values[row] for key, values in found.items() if key not in ("index", "label")}
        rate = at["code_bits"]
        assert rate == pytest.approx(at["top_bits"] + at["bottom_bits"])
        assert at["label_bits"] == 0  # a sum over classes needs no label
        assert at["total_bits"] == pytest.approx(rate + at["decoder_bits"])
        assert at["bits_per_dim"] == pytest.approx(at["total_bits"] / (3 * 16 * 16))
        assert at["complexity_corrected"] == pytest.approx(at["total_bits"] - at["complexity_bits"], abs=1e-4)
        assert at["ratio"] == pytest.approx(rate - at["baseline_bits"], abs=1e-4)
    means = record["sets"][0]["scores"]
    assert means["total_bits"]["mean"] == pytest.approx(np.mean(found["total_bits"]))
    assert record["label"] == "marginal"
    assert record["likelihood"] == "exact"
    assert record["detection"] is None
    assert sum(record["provenance"]["class_shares"]) == pytest.approx(1)
    assert {level["name"] for level in record["priors"].values()} == {"transformer"}


def test_with_labels_given_it_is_the_comparisons_likelihood(
    score: Callable[..., dict[str, Any]], scored_run: Path
) -> None:
    found = columns(score("--prior", "top=pixelcnn,bottom=transformer", "--label", "given")["files"]["scores.csv"])
    run = RunFolder(scored_run)
    codec, store = open_codes(run)
    held_out = read_held_out(run, codec, store, Console(silent=True), pictures=1)
    priors = load_priors(run, {"top": "pixelcnn", "bottom": "transformer"}, codec)
    for level, prior in enumerate(priors):
        nats = code_density(prior, held_out, level, Console(silent=True)).nats
        assert found[f"{prior.spec.target.name}_bits"] == pytest.approx((-nats / LN2).tolist(), abs=1e-3)
        base = code_density(fit_baseline("unigram", store, level), held_out, level, Console(silent=True)).nats
        found["baseline_bits"] = [
            bits + float(nat) / LN2 for bits, nat in zip(found["baseline_bits"], base, strict=True)
        ]
    assert found["baseline_bits"] == pytest.approx([0.0] * 6, abs=1e-3)
    assert found["decoder_bits"] == pytest.approx((held_out.decoder_nats / LN2).tolist(), abs=1e-3)
    assert found["label_bits"] == pytest.approx((held_out.label_nats / LN2).tolist(), abs=1e-6)
    parts = [found[key] for key in ("top_bits", "bottom_bits", "decoder_bits", "label_bits")]
    assert found["total_bits"] == pytest.approx([sum(row) for row in zip(*parts, strict=True)])


def test_a_sum_over_classes_costs_no_more_than_the_label_and_its_own_class(
    score: Callable[..., dict[str, Any]],
) -> None:
    """p(codes) is at least p(y) p(codes | y) for the image's own y."""
    given, summed = (columns(score("--label", use)["files"]["scores.csv"]) for use in ("given", "marginal"))
    assert all(a >= b - 1e-6 for a, b in zip(given["total_bits"], summed["total_bits"], strict=True))


def test_against_others_every_score_is_judged(judged: dict[str, Any]) -> None:
    record = judged
    inliers, outliers = (columns(record["files"][name]) for name in ("scores.csv", "against.csv"))
    rows = {row["score"]: row for row in record["detection"]["rows"]}
    assert set(rows) == {
        *("top_bits", "bottom_bits", "code_bits", "decoder_bits", "total_bits"),
        *("complexity_bits", "complexity_corrected", "ratio", "mse"),
    }
    for key, row in rows.items():
        assert row["auroc"] == pytest.approx(auroc(inliers[key], outliers[key]))
    assert (record["detection"]["inliers"], record["detection"]["outliers"]) == (6, 7)
    assert record["detection"] == json.loads(Path(record["files"]["detection.json"]).read_text())
    assert "complexity-corrected" in Path(record["files"]["detection.md"]).read_text()
    for name in ("histograms.png", "roc.png", "maps.png"):
        with Image.open(record["files"][name]) as picture:
            assert picture.convert("L").getextrema()[0] < 100
    assert record["sets"][1]["pixels"] == ["images of 20x20 pixels are resized to 16x16", "1 channels become 3"]
    assert set(outliers["label"]) == {""}


def test_maps_add_up_to_the_bits_of_their_level(judged: dict[str, Any]) -> None:
    maps = load_file(judged["files"]["maps.safetensors"])
    for prefix, name in (("", "scores.csv"), ("against_", "against.csv")):
        found = columns(judged["files"][name])
        for level in ("top", "bottom"):
            assert maps[prefix + level].sum((1, 2)).tolist() == pytest.approx(found[f"{level}_bits"], rel=1e-5)
            assert float(maps[prefix + level].min()) >= 0


def test_a_map_covers_the_pixels_of_its_cells(finished_run: Path) -> None:
    codec = HierarchicalVQVAE.from_pretrained(RunFolder(finished_run).codec)
    pixels = enlarged(torch.arange(4.0).view(2, 2), codec, 0)
    assert pixels.shape == (16, 16)
    assert torch.equal(pixels[::8, ::8], torch.arange(4.0).view(2, 2))
    assert torch.equal(enlarged(torch.arange(16.0).view(4, 4), codec, 1)[::4, ::4], torch.arange(16.0).view(4, 4))


def test_maps_show_images_from_the_fewest_bits_to_the_most() -> None:
    class Few:
        columns: ClassVar = {"total_bits": torch.tensor([5.0, 1.0, 9.0, 3.0])}

    assert shown_rows(Few(), 3) == [1, 3, 2]  # type: ignore[arg-type]
    assert shown_rows(Few(), 10) == [1, 3, 0, 2]  # type: ignore[arg-type]


def test_a_bound_is_said_to_be_one_and_has_no_map(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run", str(run_copy)]
    quick = ["--set", "training.steps=2", "--set", "priors.roundtrip.width=16"]
    assert cli.call(["train-prior", "--prior", "roundtrip", "--level", "top", *quick, *run]) == 0
    capsys.readouterr()
    mix = ["--prior", "top=roundtrip,bottom=pixelcnn", "--maps", "-n", "3", "--json"]
    assert cli.call(["score", *mix, *run]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["likelihood"] == "bound"
    assert record["provenance"]["estimator_samples"] == 64
    assert set(load_file(record["files"]["maps.safetensors"])) == {"bottom"}
    assert cli.call(["train-prior", "--prior", "roundtrip", "--level", "bottom", *quick, *run]) == 0
    capsys.readouterr()
    assert cli.call(["score", "--prior", "roundtrip", "--maps", "-n", "3", "--out", "none", *run]) == 0
    out, err = capsys.readouterr()
    assert "no bits by position at top, bottom (roundtrip); left out" in err
    assert "upper bounds (<=), from 64 draws" in out
    assert not (run_copy / "scores/none/maps.png").exists()
    # What was made with a prior goes when the prior does.
    assert cli.call(["train-prior", "--prior", "roundtrip", "--level", "bottom", "--overwrite", *quick, *run]) == 0
    assert not (run_copy / "scores/none").exists()


def test_baselines_need_no_training_and_the_ratio_to_itself_is_nought(score: Callable[..., dict[str, Any]]) -> None:
    found = columns(score("--prior", "uniform", "--baseline", "uniform")["files"]["scores.csv"])
    assert found["top_bits"] == pytest.approx([4 * 4.0] * 6)
    assert found["bottom_bits"] == pytest.approx([16 * 4.0] * 6)
    assert found["ratio"] == pytest.approx([0.0] * 6, abs=1e-9)


def test_scores_do_not_depend_on_how_many_are_scored(score: Callable[..., dict[str, Any]]) -> None:
    whole, one = (
        columns(score()["files"]["scores.csv"]),
        columns(score("-n", "1", "--out", "one")["files"]["scores.csv"]),
    )
    assert one["index"] == ["0"]
    for key in ("total_bits", "complexity_bits", "ratio"):
        assert one[key][0] == pytest.approx(whole[key][0], abs=1e-3)


def test_it_says_where_things_are_and_what_is_next(scored_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["score", "--run", str(scored_run), "--out", "shown"]) == 0
    out, err = capsys.readouterr()
    assert f"scores.csv: {scored_run}/scores/shown/scores.csv" in out
    assert "next: vqgen score --maps" in out
    assert "complexity-corrected" in out
    assert "priors: top" in err


def test_scores_of_other_images_are_not_replaced_without_a_word(
    scored_run: Path, tmp_path: Path, speckles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "speckles.npy").write_bytes(speckles.read_bytes())
    call = ["score", "--run", str(scored_run), "-n", "2", "--data"]
    for source, told in ((speckles, False), (speckles, False), (tmp_path / "speckles.npy", True)):
        assert cli.call([*call, str(source)]) == 0
        said = capsys.readouterr().err
        assert (f"holds scores of {speckles}; they are replaced" in said) == told


def test_names_of_folders_say_what_was_asked_for() -> None:
    assert ScoreRequest().default_name() == "own"
    assert ScoreRequest("a/b c.npz", against="../odd/", label="none").default_name() == "b-c-against-odd-none"
    request = ScoreRequest("x" * 200, prior="top=pixelsnail,bottom=pixelcnn", baseline="uniform")
    assert len(request.default_name()) <= 80
    assert request.default_name() != ScoreRequest("x" * 201, prior=request.prior, baseline="uniform").default_name()


def test_bad_requests_are_refused_and_write_nothing(
    finished_run: Path, fails: Callable[..., str], tmp_path: Path, speckles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["--run", str(finished_run)]
    (tmp_path / "empty").mkdir()
    assert "is empty" in fails("score", "--data", str(tmp_path / "empty"), *run)
    assert "No file or folder" in fails("score", "--against", str(tmp_path / "absent.npz"), *run)
    assert "the images that it is to be told from" in fails("score", "--against", "shapes", *run)
    same = ["--data", str(speckles), "--against", str(speckles)]
    for split in ([], ["--split", "all"]):
        assert "the images that it is to be told from" in fails("score", *same, *split, *run)
    assert "the images that it is to be told from" in fails("score", "--split", "all", "--against", "shapes", *run)
    assert "cannot be the name" in fails("score", "--out", "../up", *run)
    assert "no prior is named for bottom" in fails("score", "--prior", "top=pixelcnn", *run)
    assert "no trained roundtrip" in fails("score", "--prior", "roundtrip", *run)
    assert "transformr" in fails("score", "--prior", "transformr", *run)
    assert "--baseline" in fails("score", "--baseline", "top=unigram", *run)
    assert "without label dropout" in fails("score", "--label", "none", *run)
    given = ["--label", "given", "--data", str(speckles)]
    assert "have no labels" in fails("score", *given, *run)
    monkeypatch.setattr("pipelines.scoring.labels.MOST_CLASSES", 4)
    assert "--label marginal" in fails("score", *run)
    monkeypatch.setattr("pipelines.scoring.labels.MOST_CLASSES", 20)
    monkeypatch.setattr(Transformer, "likelihood", "none")
    assert "has no likelihood to score images by" in fails("score", "--prior", "transformer", *run)
    assert not (finished_run / "scores").exists()


def test_hostile_names_of_classes_and_files_stay_text(score: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for name in ('$x_{a}$, "b"', "<script>", "=1+1", "-1"):
        folder = tmp_path / "odd $x_{" / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16), (40 * number, 9, 9)).save(folder / f"{number}.png")
    record = score("--data", str(tmp_path / "odd $x_{"), "--maps", "--against", "shapes")
    assert set(columns(record["files"]["scores.csv"])["label"]) == {'$x_{a}$, "b"', "<script>", "'=1+1", "-1"}
