"""Pictures as tensors and back: one picture to uint8, batches to [-1, 1], grids to PNG.

Every picture becomes 8-bit before anything else happens to it: the likelihood of `vqgen.losses` is one over the
256 values of the resized 8-bit picture. Colour profiles are ignored. What is on a disk or a hub is `vqgen.sources`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from vqgen.files import replacing

Pixels = npt.NDArray[Any]

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of a picture with so many channels."""

ORIENTATION = 0x0112
"""EXIF tag of how a camera was held."""

_WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_GREY = ("1", "L", *_WIDE)
_BIT_DEPTHS = (8, 10, 12, 14, 16)
_TEXT = 12
_LONGEST_NAME = 40
"""Characters of a name that are drawn."""
_RUNS_A_PROGRAM = {"EPS"}
"""Formats that Pillow hands to another program (Ghostscript), which a picture of a stranger must not start."""


class ValueRange(NamedTuple):
    """The numbers of a source that become 0 and 255."""

    low: float
    high: float

    def to_uint8(self, values: Pixels) -> npt.NDArray[np.uint8]:
        """``values`` of any shape, rounded to the nearest of the 256 levels; what lies outside is clipped."""
        scaled = (np.asarray(values, dtype=np.float64) - self.low) * (255.0 / (self.high - self.low))
        rounded: npt.NDArray[np.uint8] = np.rint(scaled).clip(0, 255).astype(np.uint8)
        return rounded


def value_range(low: float, high: float, *, floating: bool) -> ValueRange:
    """The range that numbers from ``low`` to ``high`` must be meant in.

    Floats are in [0, 1], [-1, 1] or [0, 255], the first that holds them; integers have the smallest usual bit
    depth (8, 10, 12, 14 or 16) that holds them. Floats may overstep by a hundredth, as resampled pictures do.

    Raises:
        ValueError: none holds them, or they are not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("values are not finite")
    if floating:
        for start, stop in ((0, 1), (-1, 1), (0, 255)):
            slack = 0.01 * (stop - start) if stop == 1 else 1.0
            if start - slack <= low and high <= stop + slack:
                return ValueRange(start, stop)
        raise ValueError(f"values from {low:.6g} to {high:.6g} are in none of [0, 1], [-1, 1] and [0, 255]")
    for bits in _BIT_DEPTHS:
        if low >= 0 and high < 2**bits:
            return ValueRange(0, 2**bits - 1)
    raise ValueError(f"values from {low:.6g} to {high:.6g} are not in [0, 65535]")


def to_float(images: Tensor) -> Tensor:
    """uint8 of any shape as float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats of any shape in [-1, 1] as uint8: clamped and rounded to the nearest level."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def is_wide(image: Image.Image | Pixels) -> bool:
    """Whether the values are not 8-bit, so that a `ValueRange` has to say what they mean."""
    if isinstance(image, Image.Image):
        return image.mode in _WIDE
    return image.dtype not in (np.dtype(np.uint8), np.dtype(bool))


def channels_of(image: Image.Image | Pixels) -> int:
    """Channels that a picture naturally has: grey 1, grey and alpha 2, colour 3, colour and alpha 4."""
    if not isinstance(image, Image.Image):
        return 1 if image.ndim == 2 else int(image.shape[2])
    alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return (1 if image.mode in (*_GREY, "LA", "La") else 3) + alpha


def open_picture(file: IO[bytes]) -> Image.Image:
    """The picture in an open file, decoded, whatever may be wrong with it.

    Raises:
        OSError: it is no picture, a damaged one, or one too large to be decoded.
    """
    Image.init()
    formats = [name for name in Image.ID if name not in _RUNS_A_PROGRAM]
    try:
        image = Image.open(file, formats=formats)
        image.load()
        image.getexif()  # read here, where it may be damaged, and not where it is needed
    except UnidentifiedImageError:
        raise OSError("it is no picture of a known format") from None
    except OSError:
        raise
    except Exception as error:  # whatever a decoder makes of bytes that anybody may have written
        raise OSError(str(error) or type(error).__name__) from error
    return image


def size_of(image: Image.Image | Pixels) -> tuple[int, int]:
    """Height and width of a picture, as it is meant to be seen."""
    if not isinstance(image, Image.Image):
        return int(image.shape[0]), int(image.shape[1])
    turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def to_array(
    image: Image.Image | Pixels,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    values: ValueRange | None = None,
) -> npt.NDArray[np.uint8]:
    """A picture as uint8 (C, H, W).

    ``image`` is a Pillow image, turned as its EXIF data say, or an array (H, W) or (H, W, C). Without ``channels``
    and ``size`` (height, width) they stay as they are. Alpha that is not wanted is laid over white. Another size is
    reached without distortion: the largest centred crop of the right shape, resampled by Lanczos. ``values`` says
    what 16-bit and float numbers mean; without it, the picture's own extremes decide.

    Raises:
        ValueError: numbers in no known range, or a colour space that cannot be converted.
        OSError: a truncated file.
    """
    if not isinstance(image, Image.Image):
        image = _array_to_uint8(image, values)
        wanted = channels_of(image) if channels is None else channels
        if wanted == channels_of(image) and size in (None, image.shape[:2]):
            return np.array(rearrange(image, "h w c -> c h w"))
        image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    wanted = channels_of(image) if channels is None else channels
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if is_wide(image):
        image = Image.fromarray(_array_to_uint8(np.asarray(image), values)[..., 0])
    image = _convert(image, wanted)
    if size is not None and (image.height, image.width) != tuple(size):
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.LANCZOS)
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(rearrange(pixels, "h w c -> c h w"))


def check_shape(pixels: Pixels) -> None:
    """Refuse an array that is no picture by its shape.

    Raises:
        ValueError: it is neither (H, W) nor (H, W, 1 to 4).
    """
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in MODES) or 0 in pixels.shape:
        raise ValueError(f"an array of shape {list(pixels.shape)} is not a picture (H, W) or (H, W, 1 to 4)")


def _array_to_uint8(pixels: Pixels, values: ValueRange | None) -> npt.NDArray[np.uint8]:
    """(H, W) or (H, W, C) of any number type as uint8 (H, W, C)."""
    check_shape(pixels)
    if pixels.dtype == np.dtype(bool):
        pixels = pixels * np.uint8(255)
    elif is_wide(pixels):
        if values is None:
            floating = not np.issubdtype(pixels.dtype, np.integer)
            values = value_range(float(pixels.min()), float(pixels.max()), floating=floating)
        elif not np.isfinite(pixels).all():
            raise ValueError("values are not finite")
        pixels = values.to_uint8(pixels)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """A Pillow image of 8-bit values or fewer, in the mode of so many channels."""
    if image.mode == MODES[channels] and "transparency" not in image.info:
        return image
    natural = channels_of(image)
    if image.mode not in MODES.values() or "transparency" in image.info:
        image = image.convert(MODES[natural] if natural != 2 else "RGBA")
    if natural in (2, 4) and channels in (1, 3):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    return image.convert(MODES[channels])


def image_grid(
    images: Tensor,
    columns: int | None = None,
    pad: int = 2,
    scale: int | None = None,
    *,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> Image.Image:
    """Pictures side by side, row by row, on white.

    ``images`` is uint8 (B, C, H, W); alpha is laid over white. Without ``columns`` the grid is about square.
    ``pad`` is in pixels of the result. Each pixel is drawn ``scale`` times as large; without it, small pictures
    grow to about 64 pixels. Names stand at the left of each row and above each column.

    Raises:
        ValueError: not a batch of at least one uint8 picture of 1 to 4 channels.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0 or images.shape[1] not in MODES:
        raise ValueError(f"expected uint8 (B, C, H, W), got {images.dtype} {list(images.shape)}")
    count, channels, height, width = images.shape
    scale = max(1, 64 // max(height, width)) if scale is None else scale
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    rows = math.ceil(count / columns)

    font = ImageFont.load_default()
    line = _TEXT + 4
    row_names, column_names = [_short(name) for name in row_names], [_short(name) for name in column_names]
    widest = max((math.ceil(font.getlength(name)) for name in column_names), default=0)
    cell = max(width * scale, widest)
    left = max((math.ceil(font.getlength(name)) + 2 * pad for name in row_names), default=0)
    top = line if column_names else 0
    canvas = Image.new(
        "L" if channels <= 2 else "RGB",
        (left + columns * (cell + pad) + pad, top + rows * (height * scale + pad) + pad),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(column_names[:columns]):
        draw.text(
            (left + pad + column * (cell + pad) + cell // 2, top // 2), name, fill="black", font=font, anchor="mm"
        )
    for row, name in enumerate(row_names[:rows]):
        middle = top + pad + row * (height * scale + pad) + height * scale // 2
        draw.text((pad, middle), name, fill="black", font=font, anchor="lm")
    for place, pixels in enumerate(rearrange(images.cpu(), "b c h w -> b h w c").numpy()):
        row, column = divmod(place, columns)
        picture = _convert(Image.fromarray(pixels[..., 0] if channels == 1 else pixels), 1 if channels <= 2 else 3)
        picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        inset = (cell - width * scale) // 2
        canvas.paste(picture, (left + pad + column * (cell + pad) + inset, top + pad + row * (height * scale + pad)))
    return canvas


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def to_pil(image: Tensor) -> Image.Image:
    """One picture, uint8 (C, H, W), as a Pillow image."""
    pixels = rearrange(image.cpu(), "c h w -> h w c").numpy()
    return Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)


def to_png(image: Image.Image) -> bytes:
    """A Pillow image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | Path, image: Image.Image) -> None:
    """Write ``image`` as PNG to ``path`` in one step, so that no reader meets half a file.

    Raises:
        InputError: the disk is full, or the path cannot be written.
    """
    with replacing(Path(path)) as temporary:
        image.save(temporary, format="PNG")
