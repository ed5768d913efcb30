"""Single picture files that a command is given, as opposed to a data set (`vqgen.data`)."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vqgen.codes import ImageSpec
from vqgen.errors import InputError
from vqgen.images import channels_of, open_picture, size_of, to_array
from vqgen.rows import BROKEN, first_line


def read_picture(path: Path, option: str) -> Image.Image:
    """The picture in a file, decoded.

    Raises:
        InputError: there is no such file, or it is no picture, or a damaged one; ``option`` is what named it.
    """
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder.", "Name one picture in it.")
    if not path.is_file():
        raise InputError(f"{option} {path}: there is no such file.")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what it cannot read it raises
            picture = open_picture(file)
    except BROKEN as error:
        raise InputError(
            f"{option} {path} is not a picture that can be read ({first_line(error)}).", "Give a PNG or JPEG, say."
        ) from error
    return picture


def fit_picture(picture: Image.Image, image: ImageSpec, name: str) -> tuple[Tensor, str]:
    """A picture as a codec of ``image`` takes it, uint8 (C, H, W), and what was done to it, if anything.

    It is turned, converted and resized as pictures of a data set are (`vqgen.images.to_array`).

    Raises:
        InputError: its numbers or colours cannot be converted.
    """
    try:
        pixels = to_array(picture, image.channels, (image.height, image.width))
    except BROKEN as error:
        raise InputError(
            f"--from {name} cannot be made {image.channels}x{image.height}x{image.width} ({first_line(error)}).",
            "Save it as an 8-bit PNG.",
        ) from error
    done = []
    height, width = size_of(picture)
    if (height, width) != (image.height, image.width):
        cropped = "" if height * image.width == width * image.height else " from its middle"
        done.append(f"resized to {image.width}x{image.height}{cropped}")
    if channels_of(picture) != image.channels:
        found = channels_of(picture)
        done.append(f"{found} channel{'s' if found > 1 else ''} made {image.channels}")
    return torch.from_numpy(pixels), f"{name} ({width}x{height}): {', '.join(done)}" if done else ""
