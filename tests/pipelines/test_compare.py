"""The comparison whole: quality beside anchors, training at equal budget first, files that agree, bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import cli
from pipelines.compare import compare
from pipelines.comparison_quality import (
    RECONSTRUCTIONS,
    SHOWN,
    SHUFFLED,
    TRAINING,
    QualityRequest,
    labels_in_turn,
    plan_quality,
)
from pipelines.comparison_rows import COLUMNS, QUALITY_KEYS, reconstruction_figures
from pipelines.comparison_training import TrainingRequest, own_list, train_missing
from pipelines.likelihood import read_held_out
from pipelines.run_codes import open_codes
from pipelines.sample import SampleRequest, draw_samples, load_priors
from vqgen.checkpoint import random_state
from vqgen.console import Console
from vqgen.hub import fingerprint
from vqgen.run_folder import RunFolder

Fails = Callable[..., str]
LEVELS = ("top", "bottom")
FEATURES = [key for key in QUALITY_KEYS if "cas" not in key]
FEW = ["-n", "4", "--samples", "2"]


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.call([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def rows_of(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["prior"], row["level"]): row for row in result["rows"]}


@pytest.fixture
def short_classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.quality.cas.STEPS", 3)


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A run with enough test images for sample quality, and a classifier that was hardly trained."""
    run = tmp_path_factory.mktemp("measured") / "run"
    many = ["--set", "data.count=1200"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.classify.STEPS", 8)
        patch.setattr("pipelines.quality.cas.STEPS", 3)
        assert cli.call(["train-codes", "--config", str(tiny_config), "--run", str(run), *many]) == 0
        assert cli.call(["train-prior", "--prior", "transformer", "--run", str(run)]) == 0
        assert cli.call(["compare", "--run", str(run), "--samples", "100"]) == 0
    return run


@pytest.fixture(scope="module")
def unlabelled_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    np.save(folder / "grey.npy", np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8))
    run = folder / "run"
    data = ["--data", str(folder / "grey.npy")]
    assert cli.call(["train-codes", "--config", str(tiny_config), *data, "--run", str(run)]) == 0
    assert cli.call(["train-prior", "--prior", "unigram", "--run", str(run)]) == 0
    assert cli.call(["train-prior", "--prior", "pixelcnn", "--run", str(run)]) == 0
    return run


def test_every_set_of_samples_is_measured_beside_the_anchors(measured_run: Path) -> None:
    result = json.loads((measured_run / "compare/compare.json").read_text())
    rows = rows_of(result)
    for prior in ("uniform", "unigram", "transformer", "neighbour", "random"):
        whole = rows[prior, "all"]
        assert all(whole[key] is not None for key in QUALITY_KEYS), prior
        assert whole["samples"] == 100
        assert 0 <= whole["precision"] <= 1
        assert 0 <= whole["cas"] <= 1
        if prior not in ("neighbour", "random"):
            assert all(rows[prior, level][key] is None for level in LEVELS for key in QUALITY_KEYS)
    assert [rows["random", "all"][key] == rows["uniform", "all"][key] for key in QUALITY_KEYS]
    anchors = {row["prior"]: row for row in result["anchors"]}
    assert list(anchors) == [TRAINING, RECONSTRUCTIONS, SHUFFLED]
    assert all(set(row) == {"prior", "level", *COLUMNS} for row in anchors.values())
    assert all(row["level"] == "all" for row in anchors.values())
    assert all(anchors[TRAINING][key] is not None for key in QUALITY_KEYS)
    assert all(anchors[SHUFFLED][key] is None for key in FEATURES if key != "samples")
    assert anchors[SHUFFLED]["cas"] is not None
    assert anchors[TRAINING]["frechet"] < rows["random", "all"]["frechet"]
    assert anchors[TRAINING]["frechet"] < anchors[RECONSTRUCTIONS]["frechet"]


def test_what_the_quality_rests_on_is_recorded(measured_run: Path) -> None:
    provenance = json.loads((measured_run / "compare/compare.json").read_text())["provenance"]
    quality = provenance["quality"]
    assert quality["extractor"] == "classifier"
    assert quality["weights"] == fingerprint(measured_run / "classifier")
    assert (quality["samples"], quality["test_images"], quality["training_images"]) == (100, 100, 100)
    assert (quality["seed"], quality["cas_steps"]) == (0, 3)
    assert all(value is not None for value in quality.values())
    assert provenance["notices"] == []
    assert provenance["budget"] == {"equal": True, "transformer, top": "4 steps", "transformer, bottom": "4 steps"}
    assert "memory" in provenance["memory"]


def test_reconstruction_and_codes_are_said(measured_run: Path) -> None:
    result = json.loads((measured_run / "compare/compare.json").read_text())
    made = result["reconstruction"]
    assert set(made) == {"mse", "psnr", "ssim", "images"}
    assert made["images"] == result["provenance"]["images"] > 100
    assert -10 * np.log10(made["mse"]) <= made["psnr"] + 1e-6  # Jensen: the mean of PSNRs is no less
    assert result["codes"]["bits_per_image"] == 20 * 4
    assert result["codes"]["bits_per_image"] * result["codes"]["ratio"] == 16 * 16 * 3 * 8
    row = rows_of(result)["transformer", "all"]
    assert row["bytes_per_image"] == pytest.approx(row["bits_per_image"] / 8)
    assert row["bits_per_pixel"] == pytest.approx(row["bits_per_image"] / 256)
    assert row["compression_ratio"] == pytest.approx(16 * 16 * 3 * 8 / row["bits_per_image"])
    uniform = rows_of(result)["uniform", "all"]
    assert uniform["compression_ratio"] == pytest.approx(result["codes"]["ratio"])
    assert uniform["standard_error"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("place", ["finished_run", "measured_run"])
def test_every_row_has_every_key_and_csv_is_json(place: str, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(place)
    result = json.loads((run / "compare/compare.json").read_text())
    rows = [*result["rows"], *result["anchors"]]
    assert all(list(row) == ["prior", "level", *COLUMNS] for row in rows)
    with (run / "compare/compare.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        for key, value in row.items():
            text = line[key]
            found = None if text == "" else text if isinstance(value, str) else float(text)
            assert found == value, key


def test_cost_has_memory_where_it_was_measured(finished_run: Path) -> None:
    rows = rows_of(json.loads((finished_run / "compare/compare.json").read_text()))
    stages = json.loads((finished_run / "run.json").read_text())["stages"]
    assert stages["codec"]["peak_memory"] > 0
    for prior in ("pixelcnn", "transformer"):
        peaks = [stages[f"priors/{prior}/{level}"]["peak_memory"] for level in LEVELS]
        assert [rows[prior, level]["train_memory"] for level in LEVELS] == peaks
        assert rows[prior, "all"]["train_memory"] == max(peaks)
        assert rows[prior, "all"]["sample_memory"] > 0
        assert rows[prior, "top"]["sample_memory"] is None
    assert rows["unigram", "all"]["train_memory"] is None


TITLES = {
    "likelihood": {"bits/code": "bits_per_code", "bits/image": "bits_per_image", "bits/dim": "bits_per_dim"},
    "quality": {"Fréchet": "frechet", "KID": "kid", "images": "samples", "CAS": "cas"}
    | {key: key for key in ("precision", "recall", "density", "coverage")},
    "compression": {"bytes/image": "bytes_per_image", "bits/pixel": "bits_per_pixel"},
}
"""Titles of columns of the report's tables, and where compare.json has the figure."""


class Tables(HTMLParser):
    """The figures of a page's tables: (table, group, prior) -> title -> text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: dict[tuple[str, str, str], dict[str, str]] = {}
        self._table, self._group, self._titles, self._row, self._text = "", "", [""], [""], ""
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "table":
            self._table = str(given.get("aria-labelledby", "")).removeprefix("table-")
            self._titles, self._group = [], ""
        elif tag == "tr":
            self._row = []
        elif tag in ("th", "td"):
            self._text, self._scope = "", given.get("scope")

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        text = " ".join(self._text.split())
        if tag == "th" and self._scope == "rowgroup":
            self._group = text
        elif tag == "th" and self._scope == "col":
            self._titles.append(text)
        elif tag in ("th", "td"):
            self._row.append(text)
        elif tag == "tr" and len(self._row) == len(self._titles) > 1:
            self.cells[self._table, self._group, self._row[0]] = dict(zip(self._titles[1:], self._row[1:], strict=True))


def test_the_tables_of_the_report_are_compare_json(measured_run: Path) -> None:
    """Every figure on the page is the one in compare.json, as far as it is written out."""
    result = json.loads((measured_run / "compare/compare.json").read_text())
    rows = rows_of({"rows": [*result["rows"], *result["anchors"]]})
    page = Tables((measured_run / "compare/report.html").read_text(encoding="utf-8"))
    seen = 0
    for (table, group, prior), cells in page.cells.items():
        if table not in TITLES or (prior, "all") not in rows:
            continue
        row = rows[prior, group if table == "likelihood" and group in LEVELS else "all"]
        for title, key in TITLES[table].items():
            if title not in cells:
                continue
            found = re.search(r"-?[\d,]+(\.\d+)?(e\+\d+)?", cells[title])
            if row[key] is None:
                assert cells[title] == "-", (table, prior, title)
                continue
            assert found is not None, (table, prior, title)
            place = int((found[2] or "e0")[1:]) - len(found[1] or ".") + 1  # of the last digit that is written
            assert float(found[0].replace(",", "")) == pytest.approx(row[key], rel=0, abs=0.5001 * 10.0**place)
            seen += 1
    assert seen >= 80, "the tables were not found"
    assert {key[2] for key in page.cells if key[0] == "quality"} >= {TRAINING, RECONSTRUCTIONS, SHUFFLED, "transformer"}


def test_a_comparison_leaves_the_global_generators_alone_and_repeats(
    measured_run: Path, short_classifiers: None
) -> None:
    run = RunFolder(shutil.copytree(measured_run, measured_run.parent / "again"))
    before = random_state()
    compare(run, [], Console(silent=True), quality=QualityRequest(samples=100))
    after = random_state()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    first, second = (json.loads((path / "compare/compare.json").read_text()) for path in (measured_run, run.path))
    repeated = [key for key in COLUMNS if key not in ("samples_per_second", "sample_memory")]
    for one, other in zip(first["rows"] + first["anchors"], second["rows"] + second["anchors"], strict=True):
        assert {key: one[key] for key in repeated} == {key: other[key] for key in repeated}


def test_samples_are_those_of_the_first_few(measured_run: Path) -> None:
    """More samples leave the first ones as they were, classes in turn; the others follow the training split."""
    run = RunFolder(measured_run)
    codec, store = open_codes(run)
    classes = len(store.info.class_names)
    many, few = labels_in_turn(store, 1000), labels_in_turn(store, SHOWN)
    assert few == tuple(place % classes for place in range(SHOWN))
    assert many[:SHOWN] == few
    assert len(many) == 1000
    training = np.bincount(store.split("train").labels(), minlength=classes) / store.info.splits["train"]
    assert np.abs(np.bincount(many, minlength=classes) - 1000 * training).max() <= 1
    priors = load_priors(run, dict.fromkeys(LEVELS, "transformer"), codec)
    mix = {prior.spec.target.name: prior.name for prior in priors}
    drawn = [
        draw_samples(codec, priors, store, SampleRequest(mix, images=count, labels=labels), Console(silent=True))
        for count, labels in ((70, labels_in_turn(store, 70)), (8, ()))
    ]
    assert torch.equal(drawn[0].images[:8], drawn[1].images)


@pytest.mark.parametrize("count", [1, 5, 63, 65, 67, 101])
def test_labels_are_as_many_as_samples(count: int, measured_run: Path) -> None:
    _, store = open_codes(RunFolder(measured_run))
    assert len(labels_in_turn(store, count)) == count


def test_few_images_leave_quality_out_and_say_so(finished_run: Path) -> None:
    result = json.loads((finished_run / "compare/compare.json").read_text())
    assert result["anchors"] == []
    assert result["provenance"]["quality"] is None
    notice = result["provenance"]["notices"][0]
    assert "too few" in notice
    assert "at least 100 are needed" in notice
    assert notice in (finished_run / "compare/compare.md").read_text(encoding="utf-8")
    assert "at least 100 are needed" in (finished_run / "compare/report.html").read_text(encoding="utf-8")
    assert all(row[key] is None for row in result["rows"] for key in QUALITY_KEYS)
    assert not (finished_run / "classifier").exists()


def test_without_torchmetrics(measured_run: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    said = fails("compare", "--run", str(measured_run), "--extractor", "codec")
    assert "needs torchmetrics, which is not installed" in said
    assert "pip install 'vqgen[metrics]'" in said
    run, console = RunFolder(measured_run), Console(silent=True)
    codec, store = open_codes(run)
    plan = plan_quality(QualityRequest(), run, store, None)
    assert (plan.measured, plan.samples) == (False, SHOWN)
    assert "torchmetrics" in plan.notices[0]
    assert plan_quality(QualityRequest(cas=True), run, store, None).cas, "the score does not need it"
    held_out = read_held_out(run, codec, store, console, images=3, pictures=3)
    assert reconstruction_figures(held_out)["ssim"] is None
    assert reconstruction_figures(held_out)["psnr"] is not None


def test_plans(measured_run: Path, unlabelled_run: Path) -> None:
    run, bare = RunFolder(measured_run), RunFolder(unlabelled_run)
    store, unlabelled = open_codes(run)[1], open_codes(bare)[1]
    plan = plan_quality(QualityRequest(), run, store, None)
    assert (plan.samples, plan.test_images, plan.training_images) == (1000, 120, min(1000, store.info.splits["train"]))
    assert plan.features
    assert plan.cas
    assert plan_quality(QualityRequest(samples=100), run, store, None).test_images == 100
    assert plan_quality(QualityRequest(), run, store, 110).test_images == 110
    assert not plan_quality(QualityRequest(cas=False), run, store, None).cas
    none = plan_quality(QualityRequest(measured=False), run, store, None)
    assert (none.samples, none.measured) == (SHOWN, False)
    assert plan_quality(QualityRequest(samples=200, measured=False), run, store, None).samples == 200
    few = plan_quality(QualityRequest(), bare, unlabelled, None)
    assert (few.samples, few.measured, len(few.notices)) == (SHOWN, False, 1)


def test_train_gives_each_prior_the_same_minutes(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(run_copy)
    run.remove_stages([run.prior_stage(name, level) for name in ("pixelcnn", "transformer") for level in LEVELS])
    budget = ["--train", "--minutes", "0.01"]
    result = json_of(capsys, "compare", "--run", str(run_copy), *budget, *FEW)
    rows = rows_of(result)
    for prior in ("pixelcnn", "transformer"):
        for level in LEVELS:
            record = run.stage(run.prior_stage(prior, level))
            assert record is not None
            training = record["settings"]["training"]
            assert (training["minutes"], training["steps"], training["batch_size"]) == (0.01, None, 16)
            assert 0.6 <= rows[prior, level]["train_seconds"] < 2
    assert result["provenance"]["budget"]["equal"] is True
    assert result["provenance"]["budget"]["pixelcnn, top"] == "0.01 minutes"
    assert not any("budget" in notice for notice in result["provenance"]["notices"])
    assert json.loads((run_copy / "run.json").read_text())["commands"][-1]["argv"][:2] == ["vqgen", "compare"]
    # The same line again trains nothing.
    before = (run_copy / "priors/pixelcnn/top/model.safetensors").stat().st_mtime_ns
    assert train_missing(run, own_list(run, LEVELS), TrainingRequest(0.01), Console(silent=True)) == []
    assert (run_copy / "priors/pixelcnn/top/model.safetensors").stat().st_mtime_ns == before


def test_priors_of_another_budget_are_kept_and_named(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(run_copy)
    run.remove_stages([run.prior_stage("transformer", level) for level in LEVELS])
    before = (run_copy / "priors/pixelcnn/top/model.safetensors").read_bytes()
    named = ["--prior", "top=pixelcnn,bottom=transformer", "--set", "priors.transformer.depth=2"]
    arguments = ["compare", "--run", str(run_copy), "--train", "--minutes", "0.01", *named, *FEW, "--no-quality"]
    assert cli.call(arguments) == 0
    said = capsys.readouterr().err
    assert "Not at equal budget" in said
    assert "pixelcnn, top (4 steps)" in said
    assert (run_copy / "priors/pixelcnn/top/model.safetensors").read_bytes() == before
    assert run.stage(run.prior_stage("transformer", "top")) is None, "only what is named is trained"
    record = run.stage(run.prior_stage("transformer", "bottom"))
    assert record is not None
    assert record["settings"]["config"]["depth"] == 2
    provenance = json.loads((run_copy / "compare/compare.json").read_text())["provenance"]
    assert provenance["budget"] == {
        "equal": False,
        "pixelcnn, top": "4 steps",
        "transformer, bottom": "0.01 minutes",
    }
    assert provenance["notices"][0].startswith("Not at equal budget")


def test_a_run_that_lists_no_priors(run_copy: Path, fails: Fails) -> None:
    config = run_copy / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text[: text.index("run:")] + "run: {priors: []}\n...\n", encoding="utf-8")
    assert "--prior pixelcnn" in fails("compare", "--run", str(run_copy), "--train", "--minutes", "1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train"], ["--minutes"]),
        (["--minutes", "2"], ["--train"]),
        (["--set", "priors.pixelcnn.width=8"], ["--set", "--train"]),
        (["--train", "--minutes", "1", "--prior", "pixelcnn", "--set", "priors.transformer.depth=2"], ["transformer"]),
        (["--train", "--minutes", "1", "--prior", "pixelcnn", "--set", "priors.pixelcnn.widht=8"], ["widht", "width"]),
        (["--no-quality", "--extractor", "codec"], ["--no-quality", "--extractor"]),
        (["--no-quality", "--cas"], ["--no-quality", "--cas"]),
        (["--extractor", "classifier"], ["too few", "at least 100 are needed", "test split has only 6 images"]),
        (["--cas"], ["too few", "at least 100 are needed"]),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: list[str], fails: Fails, finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    message = fails("compare", *arguments, "--run", str(finished_run))
    for part in said:
        assert part in message
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()} == before


def test_bad_settings_and_missing_images_are_refused_before_any_training(
    measured_run: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.compare.open_extractor", None)
    monkeypatch.setattr("pipelines.compare.train_missing", None)
    train = ["compare", "--run", str(measured_run), "--train", "--minutes", "1", "--prior", "pixelcnn"]
    assert "widht" in fails(*train, "--set", "priors.pixelcnn.widht=8")
    assert "absent" in fails(*train, "--data", str(measured_run / "absent.npy"))


def test_an_extractor_that_is_not_known(measured_run: Path, fails: Fails) -> None:
    said = fails("compare", "--run", str(measured_run), "--extractor", "clasifier")
    assert "Did you mean 'classifier'?" in said


def test_cas_of_unlabelled_images(unlabelled_run: Path, fails: Fails) -> None:
    said = fails("compare", "--run", str(unlabelled_run), "--cas")
    assert "have no labels" in said
    assert "without --cas" in said


def test_a_prior_of_other_codes(run_copy: Path, fails: Fails) -> None:
    path = run_copy / "priors/pixelcnn/top/config.json"
    config = json.loads(path.read_text())
    config["spec"]["codec_fingerprint"] = "0" * 64
    path.write_text(json.dumps(config))
    said = fails("compare", "--run", str(run_copy))
    assert "codes of another codec" in said
    assert "train-prior --prior pixelcnn --level top --overwrite" in said


def test_training_on_several_processes_is_refused(
    finished_run: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = fails("compare", "--run", str(finished_run), "--train", "--minutes", "1")
    assert "train-prior" in said
