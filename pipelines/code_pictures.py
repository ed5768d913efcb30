"""A codec's work as pictures: what each level says where, what comes back, and what is lost on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes
from vqgen.images import image_grid, to_array, to_pil

SMALLEST = 64
"""Pixels of the longer side of a picture, at least."""
EXTREMES = 0.02
"""Share of a codebook's vectors at either end of a component that get that end's colour, so that a few far-off
vectors do not make all others look alike."""


def code_map_grid(codec: HierarchicalVQVAE, images: Tensor, codes: Codes) -> Image.Image:
    """A row per image: the image, and each level's code map over the same area, coarse to fine.

    A code has the colour of its codebook vector (`code_colours`). Colours compare within a level, not between
    levels. What the codec pads images with is cut off the maps too.

    Args:
        images: (B, C, H, W) uint8.
        codes: of these images, all levels.
    """
    height, width = images.shape[-2:]
    scale = max(1, math.ceil(SMALLEST / max(height, width)))
    columns = [torch.stack([_in_colour(image) for image in images])]
    columns[0] = _enlarged(columns[0], scale)
    for quantizer, stride, level in zip(codec.quantizers, codec.config.strides, codes, strict=True):
        coloured = rearrange(code_colours(quantizer.codebook)[level.cpu()], "b h w c -> b c h w")
        columns.append(_enlarged(coloured, stride * scale)[:, :, : height * scale, : width * scale])
    names = ["image", *(f"{spec.name} {spec.height}x{spec.width}" for spec in codec.levels)]
    cells = torch.stack(columns, dim=1).flatten(0, 1)
    return image_grid(cells, columns=len(columns), scale=1, pad=4, column_names=names)


def code_colours(codebook: Tensor) -> Tensor:
    """(K, 3) uint8 on the CPU: red, green and blue are the first three principal components of a codebook (K, D).

    Each component is stretched from its lowest to its highest values, so near vectors look alike and the codebook
    fills the colours. Components that a small codebook does not have are middle grey.
    """
    vectors = codebook.detach().cpu().double()
    centred = vectors - vectors.mean(dim=0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    components = centred @ axes[:3].T
    # The sign of a component is the solver's choice: the one that makes its longest arm positive is the same anywhere.
    longest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(longest < 0, -1.0, 1.0)
    low, high = torch.quantile(components, EXTREMES, dim=0), torch.quantile(components, 1 - EXTREMES, dim=0)
    spread = high - low
    flat = spread <= 1e-9 * centred.abs().max().clamp(min=1e-30)
    shares = torch.where(flat, 0.5, (components - low) / torch.where(flat, 1.0, spread)).clamp(0, 1)
    colours = torch.full((len(vectors), 3), 128, dtype=torch.uint8)
    colours[:, : shares.shape[1]] = (shares * 255).round().to(torch.uint8)
    return colours


def reconstruction_grid(
    images: Tensor, made: Sequence[Tensor], captions: Sequence[str], row_names: Sequence[str] = ()
) -> Image.Image:
    """A row per image: the image, what was made of it, and what the last of these errs by.

    The error is the absolute difference, the mean over channels, on black. It is shown a power of two times brighter,
    as far as its brightest values over all rows allow; the column says how many times.

    Args:
        images: (B, C, H, W) uint8.
        made: pictures like ``images``, one tensor for each of ``captions``.
        row_names: of the images, at the left.
    """
    error = (images.double() - made[-1].double()).abs().mean(dim=1, keepdim=True)
    seen = error[error >= 1].numpy()  # where nothing is lost says nothing of how bright the rest is
    times = 2 ** int(math.log2(255 / np.quantile(seen, 1 - EXTREMES))) if seen.size else 1
    shown = (error * times).round().clamp(max=255).to(torch.uint8)
    cells = [torch.stack([_in_colour(image) for image in pictures]) for pictures in (images, *made, shown)]
    names = ["original", *captions, f"error x{times}" if times > 1 else "error"]
    rows = torch.stack(cells, dim=1).flatten(0, 1)
    scale = max(1, math.ceil(SMALLEST / max(images.shape[-2:])))
    return image_grid(rows, columns=len(cells), scale=scale, pad=4, row_names=row_names, column_names=names)


def _in_colour(image: Tensor) -> Tensor:
    """(C, H, W) uint8 as (3, H, W); alpha is laid over white."""
    return torch.from_numpy(to_array(to_pil(image), 3))


def _enlarged(pictures: Tensor, times: int) -> Tensor:
    """(B, C, h, w) with every pixel ``times`` as large."""
    return pictures.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
