"""Rows of small pictures as PNG files with a transparent ground between them, small enough for a page of many."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

MOST_PIXELS = 80
"""Larger pictures are shrunk to this many pixels a side: a page holds hundreds."""
MOST_TRUE_COLOUR = 48
"""Larger colour pictures are kept in 255 colours."""
SHRUNK = f"Pictures are shrunk to {MOST_PIXELS} pixels and drawn in 255 colours to keep this page small."


def strip_png(images: Tensor, columns: int | None = None) -> bytes:
    """Pictures side by side, row by row, a transparent pixel after each: a PNG file.

    Args:
        images: uint8 (B, C, H, W) of 1 to 4 channels; alpha is laid over white.
        columns: pictures in a row; None: all. Places that are left over stay transparent.

    Raises:
        ValueError: not a batch of at least one uint8 picture of 1 to 4 channels.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0 or not 1 <= images.shape[1] <= 4:
        raise ValueError(f"expected uint8 (B, C, H, W), got {images.dtype} {list(images.shape)}")
    pictures = [_opaque(pixels) for pixels in rearrange(images.cpu(), "b c h w -> b h w c").numpy()]
    if max(images.shape[2:]) > MOST_PIXELS:
        pictures = [_shrunk(pixels) for pixels in pictures]
    columns = columns or len(pictures)
    height, width, channels = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.zeros((rows * (height + 1), columns * (width + 1), channels), np.uint8)
    shown = np.zeros(sheet.shape[:2], bool)
    for place, pixels in enumerate(pictures):
        y, x = place // columns * (height + 1), place % columns * (width + 1)
        sheet[y : y + height, x : x + width] = pixels
        shown[y : y + height, x : x + width] = True
    return _to_png(sheet[:-1], shown[:-1], few_colours=max(height, width) > MOST_TRUE_COLOUR)


def is_shrunk(images: Tensor) -> bool:
    """Whether `strip_png` shows ``images`` (B, C, H, W) smaller or in fewer colours than they are."""
    return max(images.shape[2:]) > MOST_TRUE_COLOUR and (images.shape[1] > 2 or max(images.shape[2:]) > MOST_PIXELS)


def _opaque(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(H, W, 1 to 4) laid over white: (H, W, 1 or 3)."""
    if pixels.shape[2] in (1, 3):
        return pixels
    alpha = pixels[..., -1:].astype(np.float32) / 255
    laid: npt.NDArray[np.uint8] = np.rint(pixels[..., :-1] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return laid


def _shrunk(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(H, W, C) with its longer side at `MOST_PIXELS`."""
    height, width = pixels.shape[:2]
    share = MOST_PIXELS / max(height, width)
    size = max(1, round(width * share)), max(1, round(height * share))
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    small = np.array(picture.resize(size, Image.Resampling.LANCZOS))
    return small[..., None] if small.ndim == 2 else small


def _to_png(sheet: npt.NDArray[np.uint8], shown: npt.NDArray[np.bool_], *, few_colours: bool) -> bytes:
    buffer = io.BytesIO()
    if few_colours and sheet.shape[2] == 3:
        palette = Image.fromarray(sheet).quantize(255)
        indices = np.where(shown, np.array(palette), 255).astype(np.uint8)
        picture = Image.fromarray(indices).convert("L")
        picture.putpalette([*(palette.getpalette() or [])[: 3 * 255], 0, 0, 0])
        picture.save(buffer, format="PNG", transparency=255, optimize=True)
    else:
        alpha = np.where(shown, 255, 0).astype(np.uint8)[..., None]
        pixels = np.concatenate([sheet, alpha], axis=2)
        Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
