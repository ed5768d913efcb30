"""Pictures and charts of a codec: what they show is what is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.code_pictures import code_colours, code_map_grid, reconstruction_grid
from pipelines.report.codec_charts import use_chart
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import ImageSpec
from vqgen.images import to_float


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_near_codes_have_near_colours() -> None:
    generator = torch.Generator().manual_seed(1)
    groups = torch.randn(6, 16, generator=generator) * 10
    codebook = groups.repeat_interleave(5, 0) + torch.randn(30, 16, generator=generator) * 0.01
    colours = code_colours(codebook).double()
    apart = torch.cdist(colours, colours)
    same = torch.arange(30)[:, None] // 5 == torch.arange(30) // 5
    assert apart[same].max() < 6
    assert apart[~same].min() > 20
    assert colours.max() == 255
    assert colours.min() == 0


def test_colours_do_not_hang_on_what_means_nothing() -> None:
    codebook = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    colours = code_colours(codebook)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(code_colours(codebook[order]), colours[order])
    assert (code_colours(codebook * 3 + 5).int() - colours.int()).abs().max() <= 1


@pytest.mark.parametrize(("size", "width"), [(1, 4), (2, 1), (3, 2), (5, 1), (64, 3)])
def test_colours_of_small_codebooks(size: int, width: int) -> None:
    codebook = torch.randn(size, width, generator=torch.Generator().manual_seed(4))
    colours = code_colours(codebook)
    assert colours.shape == (size, 3)
    assert colours.dtype == torch.uint8
    if size == 1:
        assert colours.unique().tolist() == [128]
    assert code_colours(torch.ones(size, width)).unique().tolist() == [128]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_code_maps_lie_over_their_image(channels: int) -> None:
    """Odd sizes: the codec pads to 24x16, and the maps are cut back to the image."""
    spec = ImageSpec(channels, 20, 15)
    codec = HierarchicalVQVAE({"strides": (8, 4), "codebook_size": 8, "code_dim": 4, "width": 8}, spec).eval()
    images = pictures(3, channels, 20, 15)
    codes = codec.encode(to_float(images))
    grid = np.asarray(code_map_grid(codec, images, codes).convert("RGB"))
    scale, pad = 4, 4  # 20 pixels become at least 64
    cell = (grid.shape[1] - 4 * pad) // 3
    assert cell >= 15 * scale
    top = grid.shape[0] - 3 * (20 * scale + pad)
    for column, (quantizer, level, stride) in enumerate(zip(codec.quantizers, codes, (8, 4), strict=True), start=1):
        colours = code_colours(quantizer.codebook)
        left = pad + column * (cell + pad) + (cell - 15 * scale) // 2
        for image in range(3):
            for y, x in ((0, 0), (19, 14), (7, 8), (8, 7)):
                code = int(level[image, y // stride, x // stride])
                place = top + image * (20 * scale + pad) + y * scale + 1, left + x * scale + 1
                assert grid[place].tolist() == colours[code].tolist()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_error_column_is_what_the_last_picture_errs_by(channels: int) -> None:
    images = torch.full((2, channels, 64, 64), 100, dtype=torch.uint8)
    made = images.clone()
    made[0, :, 10:20, 10:20] = 130
    grid = reconstruction_grid(images, [images, made], ["top", "all levels"], ["first", "second"])
    pixels = np.asarray(grid.convert("RGB"))
    last = pixels[-2 * (64 + 4) :, -(64 + 4) : -4]  # the column of errors, both rows
    assert last[15, 15].tolist() == [240] * 3  # 30, eight times brighter
    assert last[40, 40].tolist() == [0] * 3
    assert last[68 + 15, 15].tolist() == [0] * 3


def test_the_chart_of_use_shows_what_was_counted() -> None:
    counts = {"top": torch.tensor([5, 0, 5, 0]), "bottom <b> $x$": torch.arange(2000)}
    svg = use_chart(counts).decode()
    assert "perplexity 2.0 of 4, 2 dead" in svg
    assert "2,000, 1 dead" in svg
    assert "never used" in svg
    assert "<b>" not in svg
    assert svg.encode() == use_chart(counts)
    assert use_chart(counts, dark=True) != use_chart(counts)
    assert use_chart(counts, kind="png").startswith(b"\x89PNG")
    assert len(svg) < 200_000


@pytest.mark.parametrize("counts", [[0, 0, 0], [7], [0, 9], [1] * 5000])
def test_the_chart_of_odd_codebooks(counts: list[int]) -> None:
    svg = use_chart({"top": torch.tensor(counts)}).decode()
    assert ("no codes counted" in svg) == (sum(counts) == 0)
