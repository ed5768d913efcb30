"""The report's charts and rows of pictures: what they say, that they repeat, and what they refuse."""

from __future__ import annotations

import io
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.report import plots
from pipelines.report.figures import Figure, Strip, Strips, listed
from pipelines.report.heat_maps import position_maps
from pipelines.report.histograms import bits_histograms
from pipelines.report.strips import MOST_PIXELS, is_shrunk, strip_png

HOSTILE = "\x01\udcff<script>alert('x')</script>|`$\\frac{$\n\"><img src=x onerror=alert(1)> 漢字"


def row(prior: str, level: str, bits: float | None, likelihood: str = "exact") -> dict[str, Any]:
    return {"prior": prior, "level": level, "bits_per_code": bits, "likelihood": likelihood}


def rows() -> list[dict[str, Any]]:
    bits = {"uniform": 9.0, "pixelcnn": 5.614, "unigram": 6.83, "transformer": 5.1302}
    return [
        *(row(prior, level, cost) for prior, cost in bits.items() for level in ("all", "bottom", "top")),
        row("roundtrip", "top", 6.31, "bound"),
    ]


def curves(prior: str = "pixelcnn") -> list[dict[str, Any]]:
    curve = {"prior": prior, "level": "top", "steps": [0, 100, 200], "seconds": [0.0, 1.5, 3.0]}
    return [curve | {"bits_per_code": [9.0, math.nan, 5.6], "unigram": 6.83}]


def bits() -> dict[str, dict[str, np.ndarray]]:
    noise = np.random.Generator(np.random.Philox(0)).normal(size=500)
    top = {"uniform": np.full(500, 90.0), "unigram": 80 + 4 * noise, "pixelcnn": 60 + 8 * noise}
    return {"all": {name: 5 * values for name, values in top.items()}, "top": top}


def maps() -> dict[str, np.ndarray]:
    return {"unigram": np.linspace(2, 9, 64).reshape(8, 8), "pixelcnn": np.linspace(1, 5, 64).reshape(8, 8)}


def words(chart: bytes) -> str:
    return "".join(ElementTree.fromstring(chart).itertext())


def png(width: int = 34, height: int = 17) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 60, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def noise_images(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dark", [False, True])
def test_charts_are_repeatable_svg_with_every_name_and_figure(dark: bool) -> None:
    chart = plots.bits_chart(rows(), dark=dark)
    assert chart == plots.bits_chart(rows(), dark=dark)
    said = words(chart)
    assert all(text in said for text in ("transformer", "5.13", "≤ 6.31", "unigram 6.83", "uniform 9.00", "all levels"))
    said = words(plots.learning_curves(curves(), dark=dark))
    assert all(text in said for text in ("pixelcnn", "unigram", "steps", "seconds of training", "top"))
    chart = bits_histograms(bits(), dark=dark)
    assert chart == bits_histograms(bits(), dark=dark)
    assert all(text in words(chart) for text in ("pixelcnn", "unigram", "uniform", "all levels", "bits per image"))
    chart = position_maps(maps(), dark=dark)
    assert chart == position_maps(maps(), dark=dark)
    assert all(text in words(chart) for text in ("pixelcnn", "unigram", "5.50", "3.00", "bits per code"))


def test_charts_as_png_are_opaque() -> None:
    drawn = (
        plots.bits_chart(rows(), kind="png"),
        plots.learning_curves(curves(), kind="png"),
        bits_histograms(bits(), kind="png"),
        position_maps(maps(), kind="png"),
    )
    for chart in drawn:
        with Image.open(io.BytesIO(chart)) as image:
            assert image.convert("RGBA").getextrema()[3] == (255, 255)


def test_charts_take_hostile_names_and_gaps() -> None:
    made = [*rows(), row(HOSTILE, "top", 0.01), row("a,b" * 30, "top", 1.0)]
    ElementTree.fromstring(plots.bits_chart(made))
    ElementTree.fromstring(plots.bits_chart([row("uniform", "top", 0.0)]))
    drawn = curves(HOSTILE) + [curve | {"unigram": None, "seconds": [None, None, 2.0]} for curve in curves("$x^$")]
    ElementTree.fromstring(plots.learning_curves([drawn[0] | {"steps": [], "seconds": []}, *drawn]))
    one = {"uniform": np.zeros(3)}
    ElementTree.fromstring(bits_histograms({HOSTILE: {HOSTILE: np.array([4.0]), "$x^$": np.arange(9.0)}, "a": one}))
    ElementTree.fromstring(position_maps({HOSTILE: np.zeros((1, 9)), "$x^$": np.zeros((1, 9))}))


def test_charts_of_nothing_say_so() -> None:
    with pytest.raises(ValueError, match="bits per code"):
        plots.bits_chart([row("random", "all", None, "none")])
    with pytest.raises(ValueError, match="point"):
        plots.learning_curves([curves()[0] | {"bits_per_code": [math.nan] * 3}])
    with pytest.raises(ValueError, match="bits per image"):
        bits_histograms({"all": {}})
    with pytest.raises(ValueError, match="position"):
        position_maps({})


def test_maps_of_a_level_share_their_colours() -> None:
    low, high = np.zeros((4, 4)), np.ones((4, 4))
    same, apart = _colours_of_maps({"a": low, "b": low}), _colours_of_maps({"a": low, "b": high})
    assert len(same) == 1
    assert len(apart) == 2


def _colours_of_maps(values: dict[str, np.ndarray]) -> set[tuple[int, ...]]:
    """Colours that fill a large part of a chart besides its ground."""
    with Image.open(io.BytesIO(position_maps(values, kind="png"))) as image:
        found = image.convert("RGB").getcolors(1 << 24) or []
        return {colour for count, colour in found if count > 0.05 * image.width * image.height} - {(255, 255, 255)}


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_strip_holds_its_pictures_exactly_with_gaps_one_can_see_through(channels: int) -> None:
    images = noise_images(5, channels, 6, 9)
    if channels in (2, 4):
        images[:, -1] = 255
    with Image.open(io.BytesIO(strip_png(images, 3))) as strip:
        assert strip.size == (30, 13)
        pixels = np.array(strip.convert("RGBA"))
    colours = 1 if channels <= 2 else 3
    for place, image in enumerate(images):
        y, x = place // 3 * 7, place % 3 * 10
        shown = pixels[y : y + 6, x : x + 9]
        assert (shown[..., 3] == 255).all()
        assert (shown[..., :colours] == image[:colours].permute(1, 2, 0).numpy()).all()
        assert (pixels[y : y + 6, x + 9, 3] == 0).all()
    assert (pixels[7:, 20:, 3] == 0).all()


def test_alpha_is_laid_over_white() -> None:
    images = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    with Image.open(io.BytesIO(strip_png(images))) as strip:
        assert np.array(strip.convert("RGBA"))[0, 0].tolist() == [255, 255, 255, 255]


def test_large_pictures_are_shrunk_to_few_colours() -> None:
    images = noise_images(2, 3, 100, 200)
    assert is_shrunk(images)
    assert not is_shrunk(noise_images(1, 3, 32, 32))
    assert not is_shrunk(noise_images(1, 1, 64, 64))
    with Image.open(io.BytesIO(strip_png(images))) as strip:
        assert strip.mode == "P"
        assert strip.size == (2 * (MOST_PIXELS + 1), MOST_PIXELS // 2)
        pixels = np.array(strip.convert("RGBA"))
    assert (pixels[:, MOST_PIXELS, 3] == 0).all()
    assert (pixels[:, :MOST_PIXELS, 3] == 255).all()


def test_strips_refuse_what_is_no_batch_of_pictures() -> None:
    for images in (torch.zeros(2, 3, 4, 4), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            strip_png(images)


def test_small_pictures_are_enlarged_by_whole_factors() -> None:
    figure = Figure("", "", png(34, 17), "")
    assert (figure.zoom, figure.width, figure.height) == (16, 544, 272)
    large = Figure("", "", png(600, 20), "")
    assert (large.zoom, large.width) == (1, 600)
    with pytest.raises(ValueError, match="no PNG"):
        Figure("grid", "", b"<svg/>", "")
    strip = Strip("a", (png(100, 20), png(200, 20)), "")
    strips = Strips("", "", (strip,), ("x", "y"))
    assert strips.zoom == 3
    assert [size for _, *size in strips.sources(strip)] == [[300, 60], [600, 60]]
    with pytest.raises(ValueError, match="block"):
        Strips("", "", (strip,))
    with pytest.raises(ValueError, match="no PNG"):
        Strips("", "", (Strip("a", (b"<svg/>",), ""),))


def test_names_are_listed_as_one_says_them() -> None:
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
