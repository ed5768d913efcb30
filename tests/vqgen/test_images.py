from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqgen.images import (
    MODES,
    ORIENTATION,
    ValueRange,
    channels_of,
    image_grid,
    save_png,
    size_of,
    to_array,
    to_float,
    to_uint8,
    value_range,
)

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def test_every_level_survives_the_way_to_float_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32
    assert floats[0] == -1
    assert floats[-1] == 1
    assert torch.equal(to_uint8(floats), levels)


def test_to_uint8_rounds_and_clamps() -> None:
    steps = torch.tensor([-7.0, -1.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 1.0, 7.0])
    assert to_uint8(steps).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.uint8


@pytest.mark.parametrize(
    ("low", "high", "floating", "expected"),
    [
        (0, 1, True, (0, 1)),
        (-0.9, 0.9, True, (-1, 1)),
        (0, 254.5, True, (0, 255)),
        (-0.005, 1.005, True, (0, 1)),
        (0, 1, False, (0, 255)),
        (0, 256, False, (0, 1023)),
        (3, 4000, False, (0, 4095)),
        (0, 65535, False, (0, 65535)),
    ],
)
def test_value_range(low: float, high: float, floating: bool, expected: tuple[int, int]) -> None:
    assert value_range(low, high, floating=floating) == expected


@pytest.mark.parametrize(
    ("low", "high", "floating"), [(0, 300, True), (-2, 1, True), (-1, 5, False), (0, 70000, False), (0, np.nan, True)]
)
def test_value_range_refuses_what_it_cannot_place(low: float, high: float, floating: bool) -> None:
    with pytest.raises(ValueError, match="values"):
        value_range(low, high, floating=floating)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "P", "PA", "YCbCr", "HSV"])
def test_any_mode_becomes_any_number_of_channels(mode: str, channels: int) -> None:
    image = Image.fromarray(COLOURS).convert("P" if mode == "PA" else mode)
    image = image.convert(mode)
    pixels = to_array(image, channels)
    assert pixels.shape == (channels, 6, 9)
    assert pixels.dtype == np.uint8
    if channels in (2, 4):
        assert pixels[-1].min() == 255


def test_rgb_is_kept_exactly() -> None:
    assert np.array_equal(to_array(Image.fromarray(COLOURS)), COLOURS.transpose(2, 0, 1))
    assert np.array_equal(to_array(COLOURS), COLOURS.transpose(2, 0, 1))
    assert to_array(COLOURS).flags.writeable


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert to_array(image, 3)[:, 0].T.tolist() == [[200, 0, 0], [255, 255, 255]]
    assert channels_of(image) == 4


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert channels_of(image) == 3
    assert to_array(image)[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]
    image.info["transparency"] = 1
    assert channels_of(image) == 4
    assert to_array(image)[:, 0].T.tolist() == [[10, 20, 30, 255], [40, 50, 60, 0]]
    assert to_array(image, 3)[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_sixteen_bit_and_float_use_the_range_given() -> None:
    wide = np.array([[0, 65535], [257 * 7, 257 * 100]], dtype=np.uint16)
    assert to_array(Image.fromarray(wide)).tolist() == [[[0, 255], [7, 100]]]
    twelve = np.array([[0, 4095]], dtype=np.uint16)
    assert to_array(twelve).tolist() == [[[0, 255]]]
    assert to_array(twelve, values=ValueRange(0, 65535)).tolist() == [[[0, 16]]]
    assert to_array(Image.fromarray(np.array([[0.0, 1.0, 0.5]], dtype=np.float32))).tolist() == [[[0, 255, 128]]]
    assert to_array(np.array([[True, False]])).tolist() == [[[255, 0]]]
    with pytest.raises(ValueError, match="not finite"):
        to_array(np.array([[np.nan]]), values=ValueRange(0, 1))


def test_exif_rotation_is_undone(tmp_path: Path) -> None:
    picture = np.zeros((16, 32, 3), dtype=np.uint8)
    picture[:, :16] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: show it a quarter turn clockwise
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert size_of(image) == (32, 16)
        assert np.array_equal(to_array(image), np.rot90(picture, -1).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(20, 20), (90, 90), (20, 68), (40, 24)])
def test_resizing_crops_the_centre_and_never_stretches(size: tuple[int, int]) -> None:
    # A black disc stays as wide as it is high.
    y, x = np.mgrid[:60, :100]
    disc = np.where(np.hypot(y - 29.5, x - 49.5) < 12, 0, 255).astype(np.uint8)
    pixels = to_array(Image.fromarray(disc), 1, size)[0] < 128
    assert pixels.shape == size
    assert abs(int(pixels.any(0).sum()) - int(pixels.any(1).sum())) <= 1
    assert pixels.any()
    assert np.array_equal(pixels, pixels[::-1, ::-1])


@pytest.mark.parametrize("shape", [(4,), (4, 4, 5), (0, 4), (2, 4, 4, 3)])
def test_arrays_that_are_no_pictures_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is not a picture"):
        to_array(np.zeros(shape, dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grid_puts_each_picture_in_its_place(channels: int) -> None:
    images = torch.zeros(5, channels, 4, 6, dtype=torch.uint8)
    for index in range(5):
        images[index, : channels - 1 if channels in (2, 4) else channels] = 10 + 40 * index
    if channels in (2, 4):
        images[:, -1] = 255
    grid = image_grid(images, columns=3, pad=1, scale=2)
    assert grid.mode == ("L" if channels <= 2 else "RGB")
    pixels = np.array(grid.convert("L"))
    assert pixels.shape == (1 + 2 * (8 + 1), 1 + 3 * (12 + 1))
    for index in range(5):
        top, left = 1 + index // 3 * 9, 1 + index % 3 * 13
        assert (pixels[top : top + 8, left : left + 12] == 10 + 40 * index).all()
    assert (pixels[10:, 27:] == 255).all()
    assert (pixels[0] == 255).all()


def test_grid_grows_small_pictures_and_makes_room_for_names() -> None:
    images = torch.full((4, 1, 8, 8), 128, dtype=torch.uint8)
    plain = image_grid(images)
    assert plain.size == (2 * 66 + 2, 2 * 66 + 2)
    named = image_grid(images, row_names=["first", "second"], column_names=["a", "a very long name of a column"])
    assert named.width > plain.width
    assert named.height > plain.height
    assert np.array(named.convert("L"))[:14].min() < 100


def test_grid_refuses_what_is_no_batch() -> None:
    for wrong in (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4)):
        with pytest.raises(ValueError, match="expected uint8"):
            image_grid(wrong)


def test_save_png_leaves_the_old_picture_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "grid.png"
    save_png(path, Image.fromarray(COLOURS))
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(path, Image.new("HSV", (2, 2)))
    with Image.open(path) as image:
        assert np.array_equal(np.array(image), COLOURS)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_modes_are_those_of_numpy_arrays() -> None:
    for channels, mode in MODES.items():
        array = np.zeros((2, 2, channels), dtype=np.uint8)
        assert Image.fromarray(array[..., 0] if channels == 1 else array).mode == mode
