"""The pictures and charts of a comparison, in the order in which the report shows them.

Every picture that is not of all images is of the first ones, never of chosen ones; where some are chosen, its caption
says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipelines.code_pictures import code_colours
from pipelines.code_sources import decoded
from pipelines.comparison_measures import code_counts, joint_bits, nearest_training, position_bits
from pipelines.likelihood import HeldOut
from pipelines.report.codec_charts import use_chart
from pipelines.report.columns import BASELINES
from pipelines.report.figures import Chart, Figure, Section, Sections, Strip, Strips, listed
from pipelines.report.heat_maps import position_maps
from pipelines.report.histograms import bits_histograms
from pipelines.report.strips import SHRUNK, is_shrunk, strip_png
from pipelines.report.tables import by_bits
from pipelines.sample import MOST_CLASS_COLUMNS, Samples
from priors.base import Prior
from priors.registry import SOURCES
from vqgen.code_store import CodeStore
from vqgen.codec import HierarchicalVQVAE
from vqgen.console import Console
from vqgen.image_split import spread
from vqgen.images import image_grid, to_png
from vqgen.run_folder import RunFolder

SIDE_BY_SIDE = 10
"""Pictures in a row."""
REAL, SAMPLED = 4, 8
"""Test images and samples of one class in a row."""
MOST_CLASSES = 16
GRID = 64
"""Samples shown of a prior whose classes are not shown apart."""
_WIDEST = 2560


@dataclass(frozen=True)
class Material:
    """What a comparison has measured and drawn, as its figures need it."""

    run: RunFolder
    codec: HierarchicalVQVAE
    store: CodeStore
    held_out: HeldOut
    seed: int
    mixes: Mapping[str, Mapping[str, str]]
    """Row name -> level -> prior, of the rows that cover every level, baselines too."""
    priors: Mapping[tuple[str, str], Prior]
    """By prior and level."""
    bits: Mapping[tuple[str, str], Tensor]
    """By prior and level: (B,) float64, bits of each measured test image."""
    drawn: Mapping[str, Samples]
    """Row name -> all its samples."""
    sources: Mapping[str, Tensor]
    """``neighbour`` and ``random``: uint8 (P, C, H, W), in the order of the images that are shown."""
    training: Tensor | None
    """Some training images, uint8 (N, C, H, W); None where sample quality was not measured."""


class _Draw(Protocol):
    def __call__(self, *, dark: bool) -> bytes: ...


def comparison_sections(material: Material, rows: Sequence[Mapping[str, Any]], console: Console) -> Sections:
    """Every picture of a comparison; ``rows`` are those of compare.json."""
    ranked = [row["prior"] for row in sorted(rows, key=by_bits) if row["level"] == "all"]
    learned = [name for name in ranked if name in material.drawn and name not in BASELINES]
    names = list(dict.fromkeys(row["prior"] for row in rows if row["prior"] not in (*BASELINES, *SOURCES)))
    four_way, png = side_by_side(material, learned)
    sections = [
        _histograms(material, names),
        four_way,
        samples_by_class(material, learned) or sample_grids(material, learned),
        neighbours(material, learned, console),
        reconstructions(material),
        code_maps(material),
        code_use(material),
        bits_by_position(material, ["unigram", *names], console),
    ]
    return Sections(tuple(section for section in sections if section is not None), png)


def _chart(title: str, caption: str, alt: str, draw: _Draw, *, wide: bool = False) -> Chart:
    return Chart(title, caption, draw(dark=False), draw(dark=True), alt, wide)


def _histograms(material: Material, names: Sequence[str]) -> Section | None:
    levels = [level.name for level in material.codec.levels]
    by_level = {"all": joint_bits(material.mixes, material.bits)} if len(levels) > 1 else {}
    by_level |= {level: {prior: own for (prior, at), own in material.bits.items() if at == level} for level in levels}
    bits = {
        level: {name: values.numpy() for name, values in of.items() if bool(torch.isfinite(values).all())}
        for level, of in by_level.items()
    }
    if not any(bits.values()):
        return None
    shown = listed(list(dict.fromkeys(name for of in bits.values() for name in of)))
    chart = _chart(
        "",
        "Further left is fewer bits. A prior whose outline is narrow finds all images about equally likely; a long "
        "tail to the right are images that it has no idea of. Of a bound, the bits are at most these.",
        f"Histograms of the bits of single test images under {shown}.",
        partial(bits_histograms, bits, names=names),
        wide=True,
    )
    text = f"What each of {len(material.held_out.indices):,} test images costs, where the table gives only the mean."
    return Section("histograms", "Bits per image", text, (chart,))


def side_by_side(material: Material, learned: Sequence[str]) -> tuple[Section, bytes]:
    """The four-way picture: held-out images, their reconstructions, near codes, random codes, and each learned prior.

    Priors that cover every level stand fewest bits first. Columns are classes where the images' classes are in turn.
    Also as a PNG file.
    """
    held_out, classes = material.held_out, material.store.info.class_names
    columns = min(SIDE_BY_SIDE, len(held_out.pictures), max(1, _WIDEST // max(held_out.pictures.shape[-1], 64)))
    codes = held_out.codes.__getitems__(held_out.pictured[:columns])["codes"]
    shown = {
        "test images": held_out.pictures,
        "reconstructions": decoded(material.codec, codes),
        "near codes": material.sources["neighbour"],
        "random codes": material.sources["random"],
        **{name: material.drawn[name].images for name in learned},
    }
    names: list[str] = []
    if held_out.picture_labels is not None and len(classes) <= MOST_CLASS_COLUMNS:
        names = [classes[label] for label in held_out.picture_labels[:columns].tolist()]
    prior = "each learned prior, fewest bits first" if len(learned) > 1 else "the learned prior"
    caption = (
        "Rows: held-out images; their reconstructions; the same images with every code replaced by its nearest other "
        f"one; codes drawn uniformly{f'; {prior}' if learned else ''}. Not selected."
    )
    rows = tuple(_strip(name, images[:columns]) for name, images in shown.items())
    pictures = torch.cat([images[:columns] for images in shown.values()])
    png = to_png(image_grid(pictures, columns=columns, row_names=list(shown), column_names=names))
    strips = Strips("", "", rows, columns=tuple(names))
    return Section("four-way", "Side by side", caption, (strips,), _shrunk(held_out.pictures)), png


def samples_by_class(material: Material, learned: Sequence[str]) -> Section | None:
    """For each learned prior, and unigram, test images and samples of each class; None where there are no classes."""
    held_out, classes = material.held_out, material.store.info.class_names
    names = [name for name in (*learned, "unigram") if name in material.drawn]
    of_split = held_out.codes.labels()
    if of_split is None or any(material.drawn[name].labels is None for name in names):
        return None
    indices = np.asarray(held_out.indices)
    measured = of_split[indices]
    present = sorted(set(measured.tolist()))
    real = {
        label: held_out.data.splits["test"].__getitems__(indices[measured == label][:REAL].tolist())["images"]
        for label in spread(np.asarray(present), MOST_CLASSES)
    }
    parts = [part for name in names if (part := _class_strips(name, material.drawn[name], real, classes)) is not None]
    if not parts:
        return None
    text = "Test images of each class on the left, samples of that class on the right. Neither are selected."
    if len(real) < len(classes):
        text += f" {len(real)} of {len(classes)} classes are shown."
    return Section("samples", "Samples by class", text, tuple(parts), _shrunk(held_out.pictures))


def _class_strips(name: str, drawn: Samples, real: Mapping[int, Tensor], classes: Sequence[str]) -> Strips | None:
    """A row for each class of ``real`` that has samples: its test images, then its samples."""
    assert drawn.labels is not None
    rows = []
    for label, images in real.items():
        made = drawn.images[drawn.labels == label][:SAMPLED]
        if len(made):
            alt = f"{len(images)} test images and {len(made)} samples of {name}, class {classes[label]}."
            rows.append(Strip(classes[label], (strip_png(images, REAL), strip_png(made, SAMPLED)), alt))
    return Strips(name, f"{_rate(drawn)}.", tuple(rows), ("test images", f"samples of {name}")) if rows else None


def sample_grids(material: Material, learned: Sequence[str]) -> Section:
    """Held-out images and samples of every prior that covers all levels, where there are no classes to show apart.

    ``uniform`` has none of its own: its samples are the random codes.
    """
    shown = {"test images": (material.held_out.pictures, "Images of the test split.")}
    for name in (*learned, "unigram"):
        if name in material.drawn:
            drawn = material.drawn[name]
            shown[name] = (drawn.images, f"{_rate(drawn)}.")
    figures = [
        Figure(title, caption, strip_png(images[:GRID], 8), f"{len(images[:GRID])} pictures: {title}.")
        for title, (images, caption) in shown.items()
    ]
    return Section("samples", "Samples", "Not selected.", tuple(figures), _shrunk(material.held_out.pictures))


def _rate(drawn: Samples) -> str:
    rate = len(drawn.images) / max(sum(drawn.seconds.values()), 1e-9)
    return f"{rate:,.0f} samples a second" if rate >= 10 else f"{rate:.2g} samples a second"


def neighbours(material: Material, learned: Sequence[str], console: Console) -> Section | None:
    """Those of each prior's samples that come nearest to a training image, above that image."""
    drawn = {name: material.drawn[name].codes for name in learned}
    found = nearest_training(material.codec, material.store, material.held_out, drawn, console)
    train = material.held_out.data.splits["train"]
    train.set_epoch(None)  # as they were encoded
    rows = []
    for name, group in found.groups.items():
        most = min(SIDE_BY_SIDE, len(group.distance))
        order = group.distance.argsort(stable=True)[:most]
        queries = tuple(maps[order] for maps in group.codes)
        nearest = train.__getitems__(group.place[order].tolist())["images"]
        both = torch.cat([decoded(material.codec, queries), nearest])
        copies = int((group.distance == 0).sum())
        note = f"median distance {float(group.distance.median()):.2f}, {copies} of {len(group.distance)} the same"
        alt = f"{most} pictures of {name}, and below each its nearest training image."
        shown = "test images, reconstructed" if name == "test images" else name
        rows.append(Strip(shown, (strip_png(both, most),), alt, note))
    text = (
        "Above: of each row's pictures those that come nearest to a training image, nearest first. Below: that "
        "training image. The distance is between the vectors of the codes, over all "
        "levels: 0 is the same codes, two unrelated images are about 1 apart. Samples much nearer than held-out "
        f"images are would mean that a prior repeats what it was trained on. {found.searched:,} of "
        f"{found.available:,} training images were searched."
    )
    strips = Strips("", "", tuple(rows))
    return Section("neighbours", "Nearest training images", text, (strips,), _shrunk(material.held_out.pictures))


def reconstructions(material: Material) -> Section:
    """Test images, and what the coarsest levels, then all, make of them (VQ-VAE-2, figure 3)."""
    codec, levels = material.codec, [level.name for level in material.codec.levels]
    images, codes = _shown(material)
    rows = [_strip("test images", images)]
    for depth in range(1, len(levels) + 1):
        name = "all levels" if depth == len(levels) > 1 else " and ".join(levels[:depth])
        rows.append(_strip(name, decoded(codec, codes[:depth])))
    text = "What each level adds: decoded from the coarsest level alone, then with every finer one."
    if len(levels) > 1 and codec.config.level_dropout == 0:
        text += " This codec was not trained to do without finer levels."
    strips = Strips("", "", tuple(rows))
    return Section("reconstructions", "Reconstructions, level by level", text, (strips,), _shrunk(images))


def code_maps(material: Material) -> Section:
    """The code map of each level as a picture, under the images of the reconstructions."""
    codec = material.codec
    images, codes = _shown(material)
    height, width = images.shape[-2:]
    rows = [_strip("test images", images)]
    for quantizer, stride, level, spec in zip(codec.quantizers, codec.config.strides, codes, codec.levels, strict=True):
        colours = code_colours(quantizer.codebook)[level.cpu()].permute(0, 3, 1, 2)
        whole = colours.repeat_interleave(stride, 2).repeat_interleave(stride, 3)[:, :, :height, :width]
        rows.append(_strip(f"{spec.name}, {spec.height} x {spec.width}", whole.contiguous()))
    text = (
        "Each square is one code, in the colour that the first three principal components of its codebook vector give, "
        "so that codes whose vectors are near look alike. Colours compare within a level, not between levels."
    )
    return Section("code-maps", "Code maps", text, (Strips("", "", tuple(rows)),), _shrunk(images))


def code_use(material: Material) -> Section:
    """How often each code stands in the maps of the test images."""
    counts = code_counts(material.store, material.held_out)
    chart = _chart(
        "",
        "Uses as multiples of equal use, on a logarithmic axis, most used first.",
        f"Histograms of how often each code is used, most used first, of the levels {listed(list(counts))}.",
        partial(use_chart, counts),
    )
    text = (
        f"Codes of {len(material.held_out.indices):,} test images. Even use says that the codebook is spent well; it "
        "also makes codes cost more bits, so that bits per code of codecs with other use do not compare."
    )
    return Section("code-use", "Use of the codebooks", text, (chart,))


def bits_by_position(material: Material, names: Sequence[str], console: Console) -> Section | None:
    """A chart per level of the mean bits of the code at each place, for each prior that says them."""
    levels = [level.name for level in material.codec.levels]
    found = position_bits(material.priors, levels, material.held_out, console)
    charts = []
    for level, maps in found.maps.items():
        shown = {name: maps[name] for name in names if name in maps}
        if shown:
            means = ", ".join(f"{name} {values.mean():.2f}" for name, values in shown.items())
            title = level if len(levels) > 1 else ""
            alt = f"Heat maps of bits per code by position at level {level}; means: {means}."
            charts.append(_chart(title, "", alt, partial(position_maps, shown), wide=True))
    if not charts:
        return None
    text = (
        f"The mean cost of the code at each place over {found.images:,} test images, one colour scale for all priors "
        "of a level; the number is the map's mean. Dark is cheap. Places of which a prior has seen little when it "
        "comes to them, such as the first in its order, cost more. Under uniform every place costs log2 K."
    )
    notes = tuple(
        f"{name} has no map: it gives the likelihood of a whole image, not of its single codes." for name in found.none
    )
    return Section("positions", "Bits by position", text, tuple(charts), notes)


def _shown(material: Material) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first pictures (P, C, H, W), and their codes."""
    held_out = material.held_out
    count = min(SIDE_BY_SIDE, len(held_out.pictures))
    return held_out.pictures[:count], held_out.codes.__getitems__(held_out.pictured[:count])["codes"]


def _strip(name: str, images: Tensor) -> Strip:
    return Strip(name, (strip_png(images),), f"{len(images)} pictures: {name}.")


def _shrunk(images: Tensor) -> tuple[str, ...]:
    return (SHRUNK,) if is_shrunk(images) else ()
