"""The pictures of a comparison: made from real priors, they show what they say they show."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.code_sources import decoded, neighbour_codes, random_codes
from pipelines.comparison_figures import (
    REAL,
    SAMPLED,
    Material,
    bits_by_position,
    code_maps,
    comparison_sections,
    neighbours,
    reconstructions,
    sample_grids,
    samples_by_class,
)
from pipelines.comparison_measures import code_counts, joint_bits, nearest_training, position_bits
from pipelines.comparison_rows import LN2
from pipelines.likelihood import code_density, read_held_out
from pipelines.report.columns import BASELINES
from pipelines.report.figures import Sections, Strips
from pipelines.report.page import ORDER, write_page
from pipelines.run_codes import open_codes
from pipelines.run_priors import fit_baseline
from pipelines.sample import SampleRequest, draw_samples, load_priors
from priors.base import Density, Prior
from vqgen.console import Console
from vqgen.run_folder import RunFolder

SILENT = Console(silent=True)
LEVELS = ("top", "bottom")


@pytest.fixture(scope="module")
def material(finished_run: Path) -> Material:
    run = RunFolder(finished_run)
    codec, store = open_codes(run)
    held_out = read_held_out(run, codec, store, SILENT, pictures=20)
    mixes = {name: dict.fromkeys(LEVELS, name) for name in ("unigram", "pixelcnn", "transformer")}
    priors, bits, drawn = {}, {}, {}
    for name, mix in mixes.items():
        baseline = [fit_baseline(name, store, level) for level in range(2)] if name in BASELINES else None
        own = baseline or load_priors(run, mix, codec)
        for level, prior in enumerate(own):
            priors[name, LEVELS[level]] = prior
            bits[name, LEVELS[level]] = -code_density(prior, held_out, level, SILENT).nats / LN2
        drawn[name] = draw_samples(codec, own, store, SampleRequest(mix, images=24, seed=3), SILENT)
    codes = held_out.codes.__getitems__(held_out.pictured)["codes"]
    sources = {
        "neighbour": decoded(codec, neighbour_codes(codec, codes)),
        "random": decoded(codec, random_codes(store.info.levels, 3, len(held_out.pictured))),
    }
    return Material(run, codec, store, held_out, 3, mixes, priors, bits, drawn, sources, None)


@pytest.fixture(scope="module")
def sections(material: Material) -> Sections:
    return comparison_sections(material, rows(), SILENT)


def rows() -> list[dict[str, object]]:
    costs = {"unigram": 3.0, "pixelcnn": 2.5, "transformer": 2.0}
    return [
        {"prior": name, "level": level, "bits_per_code": cost, "likelihood": "exact"}
        for name, cost in costs.items()
        for level in (*LEVELS, "all")
    ]


def pictures_of(png: bytes, count: int, size: int = 16) -> list[np.ndarray]:
    """The pictures of a strip's first row, RGB."""
    with Image.open(io.BytesIO(png)) as strip:
        pixels = np.array(strip.convert("RGB"))
    return [pixels[:size, at * (size + 1) : at * (size + 1) + size] for at in range(count)]


def same(png: bytes, images: Tensor) -> bool:
    shown = pictures_of(png, len(images), images.shape[-1])
    return all((a == b.permute(1, 2, 0).numpy()).all() for a, b in zip(shown, images, strict=True))


def test_every_section_is_there_and_the_page_takes_them(material: Material, sections: Sections, tmp_path: Path) -> None:
    assert [section.key for section in sections.sections] == [
        *("histograms", "four-way", "samples", "neighbours", "reconstructions", "code-maps", "code-use", "positions"),
    ]
    assert {section.key for section in sections.sections} <= set(ORDER)
    with Image.open(io.BytesIO(sections.four_way)) as four_way:
        assert four_way.format == "PNG"
    strips = sections.get("four-way").parts[0]
    assert [row.name for row in strips.rows] == [
        *("test images", "reconstructions", "near codes", "random codes", "transformer", "pixelcnn"),
    ]
    shown = len(material.held_out.pictures)
    assert same(strips.rows[0].pngs[0], material.held_out.pictures)
    assert same(strips.rows[4].pngs[0], material.drawn["transformer"].images[:shown])
    path = tmp_path / "report.html"
    write_page(path, {"run": "r", "rows": rows(), "anchors": [], "provenance": {}}, sections)
    assert path.stat().st_size < 1_500_000


def test_figures_repeat_and_leave_the_random_state_alone(material: Material, sections: Sections) -> None:
    before = torch.get_rng_state()
    assert comparison_sections(material, rows(), SILENT) == sections
    assert torch.equal(before, torch.get_rng_state())


def test_samples_of_a_class_stand_beside_images_of_it(material: Material) -> None:
    section = samples_by_class(material, ["pixelcnn"])
    assert section is not None
    learned, baseline = section.parts
    assert [part.title for part in section.parts] == ["pixelcnn", "unigram"]
    assert isinstance(learned, Strips)
    assert isinstance(baseline, Strips)
    drawn, held_out = material.drawn["pixelcnn"], material.held_out
    split = held_out.data.splits["test"].__getitems__(list(held_out.indices))
    names = material.store.info.class_names
    assert [row.name for row in learned.rows] == [names[label] for label in sorted(set(split["label"].tolist()))]
    for row in learned.rows:
        label = names.index(row.name)
        assert same(row.pngs[0], split["images"][split["label"] == label][:REAL])
        assert same(row.pngs[1], drawn.images[drawn.labels == label][:SAMPLED])


def test_without_classes_all_samples_stand_in_one_grid(material: Material) -> None:
    drawn = {name: dataclasses.replace(samples, labels=None) for name, samples in material.drawn.items()}
    unlabelled = dataclasses.replace(material, drawn=drawn)
    assert samples_by_class(unlabelled, ["pixelcnn"]) is None
    section = sample_grids(unlabelled, ["pixelcnn"])
    assert [figure.title for figure in section.parts] == ["test images", "pixelcnn", "unigram"]


def test_reconstructions_go_from_the_coarsest_level_to_all(material: Material) -> None:
    strips = reconstructions(material).parts[0]
    codes = material.held_out.codes.__getitems__(material.held_out.pictured[:10])["codes"]
    assert [row.name for row in strips.rows] == ["test images", "top", "all levels"]
    assert same(strips.rows[1].pngs[0], decoded(material.codec, codes[:1]))
    assert same(strips.rows[2].pngs[0], decoded(material.codec, codes))


def test_code_maps_give_equal_codes_equal_colours(material: Material) -> None:
    strips = code_maps(material).parts[0]
    codes = material.held_out.codes.__getitems__(material.held_out.pictured[:10])["codes"]
    for row, level, stride in zip(strips.rows[1:], codes, material.codec.config.strides, strict=True):
        shown = pictures_of(row.pngs[0], len(level))
        colours: dict[int, set[tuple[int, ...]]] = {}
        for picture, own in zip(shown, level, strict=True):
            for y, x in np.ndindex(*own.shape):
                cell = picture[y * stride : (y + 1) * stride, x * stride : (x + 1) * stride].reshape(-1, 3)
                assert len({tuple(pixel) for pixel in cell.tolist()}) == 1
                colours.setdefault(int(own[y, x]), set()).add(tuple(cell[0].tolist()))
        assert all(len(found) == 1 for found in colours.values())
        assert len(colours) > 1


def test_bits_by_position_add_up_to_the_bits_of_the_images(material: Material) -> None:
    found = position_bits(material.priors, LEVELS, material.held_out, SILENT)
    assert found.images == len(material.held_out.indices)
    assert found.none == ()
    for (name, level), bits in material.bits.items():
        assert found.maps[level][name].sum() == pytest.approx(float(bits.mean()), rel=1e-4)


def test_a_prior_without_single_codes_has_no_map_and_the_page_says_so(material: Material) -> None:
    class Whole(Prior):
        name, likelihood = "whole", "exact"

        def log_prob(self, codes: Tensor, *_: object, **__: object) -> Density:
            return Density.exact(torch.zeros(len(codes)))

    template = material.priors["pixelcnn", "top"]
    whole = Whole(template.config, template.spec)
    few = {("whole", "top"): whole, ("pixelcnn", "top"): template}
    section = bits_by_position(dataclasses.replace(material, priors=few), ["whole", "pixelcnn"], SILENT)
    assert len(section.parts) == 1
    assert section.notes == ("whole has no map: it gives the likelihood of a whole image, not of its single codes.",)


def test_joint_bits_are_sums_over_levels_and_need_every_level(material: Material) -> None:
    found = joint_bits(material.mixes, material.bits)
    both = material.bits["pixelcnn", "top"] + material.bits["pixelcnn", "bottom"]
    assert torch.equal(found["pixelcnn"], both)
    some = {key: value for key, value in material.bits.items() if key != ("pixelcnn", "top")}
    assert "pixelcnn" not in joint_bits(material.mixes, some)


def test_codes_are_counted_over_the_measured_images(material: Material) -> None:
    counts = code_counts(material.store, material.held_out)
    images = len(material.held_out.indices)
    for level in material.store.info.levels:
        assert int(counts[level.name].sum()) == images * level.positions


def test_a_training_image_is_its_own_nearest_and_counted_as_the_same(material: Material) -> None:
    train = material.store.split("train")
    copied = train.__getitems__([5, 2, 7])["codes"]
    drawn = {"thief": copied, "pixelcnn": material.drawn["pixelcnn"].codes}
    found = nearest_training(material.codec, material.store, material.held_out, drawn, SILENT)
    group = found.groups["thief"]
    assert group.distance.tolist() == [0.0, 0.0, 0.0]
    assert found.searched == found.available == len(train)
    assert list(found.groups) == ["test images", "thief", "pixelcnn"]


def test_neighbours_are_shown_nearest_first_with_the_training_image_below(material: Material) -> None:
    drawn = material.drawn["pixelcnn"]
    train = material.store.split("train")
    stolen = tuple(
        torch.cat([own[:3], copy, own[3:]])
        for own, copy in zip(drawn.codes, train.__getitems__([4])["codes"], strict=True)
    )
    thief = dataclasses.replace(drawn, codes=stolen)
    section = neighbours(dataclasses.replace(material, drawn={"pixelcnn": thief}), ["pixelcnn"], SILENT)
    row = section.parts[0].rows[1]
    copies = int(row.note.split(", ")[1].split(" of ")[0])
    assert copies >= 1
    assert row.note.endswith("of 25 the same")
    assert same(row.pngs[0], decoded(material.codec, train.__getitems__([4])["codes"]))
