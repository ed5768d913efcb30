"""Codes that no prior drew, the pictures made of them, and the rows and notes they leave in the comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import cli
from pipelines.code_sources import decoded, nearest_other, neighbour_codes, random_codes
from pipelines.compare import source_pictures
from pipelines.comparison_figures import Material, side_by_side
from pipelines.comparison_rows import COLUMNS, highlights, likelihood_columns, rows_of
from pipelines.likelihood import ESTIMATOR_SAMPLES, HeldOut, classes_in_turn, read_held_out
from pipelines.report.columns import BASELINES
from pipelines.report.figures import Strips
from pipelines.report.legend import legend
from pipelines.report.tables import summary, to_markdown
from pipelines.run_codes import open_codes, prior_spec
from priors import registry
from priors.base import Density
from priors.registry import SOURCES
from priors.sampling import Noise
from vqgen.console import Console
from vqgen.run_folder import RunFolder


def test_the_nearest_other_vector_is_found_by_brute_force() -> None:
    vectors = np.random.default_rng(0).normal(size=(1500, 3)).astype(np.float32)  # more rows than are done at once
    squared = ((vectors[:, None].astype(np.float64) - vectors[None]) ** 2).sum(-1)
    np.fill_diagonal(squared, np.inf)
    found = nearest_other(torch.from_numpy(vectors)).numpy()
    assert np.allclose(squared[np.arange(1500), found], squared.min(1))
    assert (found != np.arange(1500)).all()


def test_the_nearest_of_twins_and_of_one() -> None:
    assert nearest_other(torch.tensor([[1.0], [5.0], [1.0]])).tolist() == [2, 0, 0]
    assert nearest_other(torch.zeros(1, 4)).tolist() == [0]


def test_random_codes_are_uniform_and_what_the_uniform_prior_draws(finished_run: Path) -> None:
    _, store = open_codes(RunFolder(finished_run))
    drawn = random_codes(store.info.levels, 3, 500)
    for number, (level, codes) in enumerate(zip(store.info.levels, drawn, strict=True)):
        assert codes.shape == (500, level.height, level.width)
        counts = torch.bincount(codes.flatten(), minlength=level.codebook_size)
        expected = codes.numel() / level.codebook_size
        assert len(counts) == level.codebook_size
        assert float(((counts - expected) ** 2 / expected).sum()) < 50  # chi-squared of 15: p < 1e-5
        prior = registry.get("uniform")({}, prior_spec(store, number))
        context = tuple(coarser[:8] for coarser in drawn[:number])
        labels = torch.zeros(8, dtype=torch.int64)
        assert torch.equal(prior.sample(Noise(3, tuple(range(8)), number), context, labels), codes[:8])


def test_neighbours_differ_everywhere_but_lie_closer_than_random_codes(finished_run: Path) -> None:
    codec, store = open_codes(RunFolder(finished_run))
    codes = store.split("test").__getitems__(range(6))["codes"]
    near = neighbour_codes(codec, codes)
    for level, other in zip(codes, near, strict=True):
        assert (level != other).all()
    chance = random_codes(store.info.levels, 0, 6)
    for quantizer, own, close, any_ in zip(codec.quantizers, codes, near, chance, strict=True):
        moved, jumped = (quantizer.lookup(own) - quantizer.lookup(other) for other in (close, any_))
        assert moved.square().mean() < jumped.square().mean()


def test_decoding_in_parts_is_decoding_at_once(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, store = open_codes(RunFolder(finished_run))
    codes = random_codes(store.info.levels, 0, 5)
    whole = decoded(codec, codes)
    monkeypatch.setattr("pipelines.code_sources.DECODED_AT_ONCE", 2)
    assert whole.dtype == torch.uint8
    assert int((decoded(codec, codes).int() - whole.int()).abs().max()) <= 1  # rounding of the last bit


def test_pictures_go_through_the_classes_as_samples_do() -> None:
    labels = np.array([2, 0, 1, 1, 0, 2, 0])
    chosen, found = classes_in_turn(range(7), labels, 3, 5)
    assert list(chosen) == [1, 2, 0, 4, 3]
    assert found is not None
    assert found.tolist() == [0, 1, 2, 0, 1]
    assert list(classes_in_turn([0, 1, 2], labels, 3, 3)[0]) == [1, 2, 0]


@pytest.mark.parametrize(
    ("indices", "labels", "count"),
    [(range(6), None, 3), ([0, 1, 2], np.array([0, 0, 1]), 4), ([0, 1], np.array([0, 0, 1]), 2)],
)
def test_pictures_are_spread_where_classes_cannot_take_turns(
    indices: list[int], labels: np.ndarray | None, count: int
) -> None:
    chosen, found = classes_in_turn(indices, labels, 2, count)
    assert found is None
    assert chosen[0] == indices[0]
    assert chosen[-1] == indices[-1]
    assert len(chosen) == min(count, len(indices))


def held_out_of(run: Path, pictures: int = 4) -> tuple:
    folder = RunFolder(run)
    codec, store = open_codes(folder)
    return codec, store, read_held_out(folder, codec, store, Console(quiet=True), pictures=pictures)


def test_the_four_way_picture_has_a_row_for_each_way(finished_run: Path) -> None:
    codec, store, held_out = held_out_of(finished_run)
    sources = source_pictures(codec, store, held_out, 4, seed=0)
    assert list(sources) == list(SOURCES)
    run = RunFolder(finished_run)
    material = Material(run, codec, store, held_out, 0, {}, {}, {}, {}, sources, None)
    section, png = side_by_side(material, [])
    strips = section.parts[0]
    assert isinstance(strips, Strips)
    assert [row.name for row in strips.rows] == ["test images", "reconstructions", "near codes", "random codes"]
    assert "prior" not in section.text
    # The first cell of each row, found by its place, is the picture it should be.
    size, scale, pad = 16, 4, 2
    (folder := finished_run.parent / "four").mkdir(exist_ok=True)
    (folder / "way.png").write_bytes(png)
    grid = np.asarray(Image.open(folder / "way.png"))
    left = grid.shape[1] - pad - 4 * (max(size * scale, 64) + pad)
    top = grid.shape[0] - 4 * (size * scale + pad) - pad
    reconstruction = decoded(codec, held_out.codes.__getitems__(held_out.pictured[:1])["codes"])[0]
    firsts = [held_out.pictures[0], reconstruction, sources["neighbour"][0], sources["random"][0]]
    for row, picture in enumerate(firsts):
        start = top + pad + row * (size * scale + pad)
        cell = grid[start : start + size * scale : scale, left + pad : left + pad + size * scale : scale]
        assert np.array_equal(cell, picture.permute(1, 2, 0).numpy()), row


def test_sources_are_rows_and_pictures_of_the_comparison(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((finished_run / "compare/compare.json").read_text())
    rows = {(row["prior"], row["level"]): row for row in result["rows"]}
    assert all(set(row) == {"prior", "level", *COLUMNS} for row in rows.values())
    for source in SOURCES:
        assert [level for prior, level in rows if prior == source] == ["all"]
        row = rows[source, "all"]
        assert row["likelihood"] == "none"
        assert {key for key, value in row.items() if value is not None} == {"prior", "level", "likelihood"}
    with Image.open(finished_run / "compare/four_way.png") as picture:
        assert picture.height > 6 * 64  # six rows: four ways and two priors
    page = (finished_run / "compare/report.html").read_text(encoding="utf-8")
    for words in ("Side by side", "near codes", "random codes"):
        assert words in page
    capsys.readouterr()
    assert cli.call(["priors", "--json"]) == 0
    assert not {prior["name"] for prior in json.loads(capsys.readouterr().out)} & set(SOURCES)


def test_no_source_is_ranked_or_praised() -> None:
    def row(prior: str, bits: float | None) -> dict:
        return {**dict.fromkeys(COLUMNS), "prior": prior, "level": "all", "bits_per_code": bits, "likelihood": "exact"}

    rows = [row("random", None), row("unigram", 5.0), row("uniform", 6.0), row("mine", 4.0)]
    assert highlights(rows) == ["Fewest bits over all levels: mine, 4.000 bits/code (unigram 5.000)."]
    loose = {**row("loose", 5.5), "likelihood": "bound"}
    said = "loose is not shown to be better than counting codes (unigram) over all levels: <= 5.500 against"
    assert highlights([*rows, loose])[0].startswith(said)
    notes = dict(legend({"rows": rows, "provenance": {}}))
    assert "nearest other vector" in notes["neighbour, random"]
    assert "neighbour, random" not in dict(legend({"rows": rows[1:], "provenance": {}}))
    titles, _, lines = summary({"rows": rows})[0]
    assert titles == "Likelihood"
    shown = [(line[1], line[2].strip("* "), "*" in line[2]) for line in lines]
    assert shown == [("mine", "4.000", True), ("unigram", "5.000", False), ("uniform", "6.000", False)]
    rows[0]["frechet"] = 9.0
    quality = {title: lines for title, _, lines in summary({"rows": rows})}["Sample quality"]
    assert [line[1:3] for line in quality] == [["random", "9.00"]]
    assert not set(SOURCES) & {*BASELINES, *registry.BUILT_IN}


def test_a_bound_says_what_its_estimate_is_worth() -> None:
    nats = torch.tensor([-8.0, -10.0], dtype=torch.float64)
    density = Density(nats, torch.tensor([0.2, 0.4]).double(), torch.tensor([10.0, 30.0]).double())
    columns = likelihood_columns(density, 4, "bound")
    assert columns["bits_per_code"] == pytest.approx(9 / 4 / math.log(2))
    assert columns["estimator_standard_error"] == pytest.approx(0.3 / 4 / math.log(2))
    assert columns["effective_samples"] == pytest.approx(20)
    assert columns["estimator_samples"] == ESTIMATOR_SAMPLES
    row = {**dict.fromkeys(COLUMNS), "prior": "roundtrip", "level": "top", **columns}
    note = dict(legend({"rows": [row], "provenance": {}}))["≤"]
    assert "roundtrip, top" in note
    assert f"{0.3 / 4 / math.log(2):.3f} bits/code" in note
    assert "20.0 independent" in note
    assert "20.0 independent" in to_markdown({"rows": [row], "provenance": {}})
    exact = likelihood_columns(Density.exact(nats), 4, "exact")
    assert not {"estimator_samples", "estimator_standard_error", "effective_samples"} & set(exact)


def test_levels_add_up_as_independent_estimates(finished_run: Path) -> None:
    codec, store, held_out = held_out_of(finished_run)
    count = len(held_out.indices)

    class Estimated(registry.get("uniform")):  # type: ignore[misc]
        name = "estimated"
        likelihood = "bound"

    priors = [Estimated({}, prior_spec(store, level)) for level in range(2)]

    def density(nats: float, error: float, worth: float) -> Density:
        return Density(*(torch.full((count,), value, dtype=torch.float64) for value in (nats, error, worth)))

    measured = {("estimated", "top"): density(-1, 0.3, 12), ("estimated", "bottom"): density(-2, 0.4, 7)}
    rows = rows_of(RunFolder(finished_run), "estimated", priors, measured, held_out, codec)
    codes = sum(level.positions for level in codec.levels)
    assert rows[-1]["level"] == "all"
    assert rows[-1]["bits_per_image"] == pytest.approx(3 / math.log(2))
    assert rows[-1]["estimator_standard_error"] == pytest.approx(0.5 / codes / math.log(2))
    assert rows[-1]["effective_samples"] == pytest.approx(7)


def test_held_out_pictures_belong_to_their_codes(finished_run: Path) -> None:
    codec, store, held_out = held_out_of(finished_run)
    assert isinstance(held_out, HeldOut)
    assert len(held_out.pictures) == len(held_out.pictured) == 4
    again = codec.encode(held_out.pictures.float() / 127.5 - 1)
    for fresh, kept in zip(again, store.split("test").__getitems__(held_out.pictured)["codes"], strict=True):
        assert (fresh == kept).float().mean() > 0.98  # a tie may fall the other way in another batch
