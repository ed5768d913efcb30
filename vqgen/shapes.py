"""The built-in picture set: one anti-aliased shape on a soft background, drawn when asked for.

The label is the shape. Texture, colours, place, size and rotation vary, so that a codec has something to learn and a
good prior visibly beats a bad one, and all of it is a pure function of (split, index): nothing is stored, and
picture 17 of ``train`` is the same picture everywhere. Each pixel knows its signed distance to the outline (in
pixels, negative inside), which gives clean edges at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from einops import rearrange
from numpy.random import Generator, Philox

Array = npt.NDArray[Any]

CLASS_NAMES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
TEXTURES = ("solid", "stripes", "checks", "dots")
SIZE = (32, 32)
"""Height and width where none is asked for."""

VERSION = 1
"""Part of the random streams: another number is another set of pictures."""

_STREAM = 0x76716765
_SPLITS = {"train": 0, "validation": 1, "test": 2}
_DRAWS = 16
_CHUNK = 512
_HEART = np.float32(0.64)


def labels(indices: Sequence[int] | Array) -> npt.NDArray[np.int64]:
    """Classes of the pictures at ``indices``: they take turns, so every split is balanced."""
    return np.asarray(indices, dtype=np.int64) % len(CLASS_NAMES)


def render(indices: Sequence[int] | Array, size: tuple[int, int] = SIZE, split: str = "train") -> Array:
    """Pictures at ``indices`` of ``split`` as uint8 (B, 3, H, W); ``size`` is (H, W).

    Raises:
        KeyError: ``split`` is not train, validation or test.
    """
    places = np.asarray(indices, dtype=np.int64)
    images = np.empty((len(places), 3, *size), dtype=np.uint8)
    for start in range(0, len(places), _CHUNK):
        part = places[start : start + _CHUNK]
        images[start : start + _CHUNK] = _draw(labels(part), _uniforms(part, _SPLITS[split]), size)
    return images


def _uniforms(indices: Array, split: int) -> Array:
    """(B, 16) float32 in [0, 1): each picture has a Philox stream of its own."""
    key = (_STREAM << 16) | (VERSION << 8) | split
    return np.stack([Generator(Philox(key=[key, int(index)])).random(_DRAWS) for index in indices]).astype(np.float32)


def _draw(kinds: Array, u: Array, size: tuple[int, int]) -> Array:
    """Pictures of shapes ``kinds`` (B,) by the draws ``u`` (B, 16), as uint8 (B, 3, H, W)."""
    height, width = size
    column = [rearrange(u[:, i], "b -> b 1 1") for i in range(u.shape[1])]
    shorter = float(min(size))
    rows = rearrange(np.arange(height, dtype=np.float32) + 0.5, "h -> 1 h 1")
    columns = rearrange(np.arange(width, dtype=np.float32) + 0.5, "w -> 1 1 w")

    radius = shorter * (0.28 + 0.14 * column[0])
    y = rows - (radius + (height - 2 * radius) * (0.15 + 0.7 * column[1]))
    x = columns - (radius + (width - 2 * radius) * (0.15 + 0.7 * column[2]))
    turn = np.float32(2 * np.pi) * column[3]
    x, y = (np.cos(turn) * x + np.sin(turn) * y) / radius, (np.cos(turn) * y - np.sin(turn) * x) / radius

    distance = np.empty((len(kinds), height, width), dtype=np.float32)
    for kind, outline in enumerate(_OUTLINES):
        chosen = np.flatnonzero(kinds == kind)
        if len(chosen):
            distance[chosen] = outline(x[chosen], y[chosen])
    inside = _edge(distance * radius)

    # A second colour near the first paints half of the texture, but never the rim: so the outline always shows.
    hue, backdrop_hue = column[4], column[5]
    light = column[6] < 0.5
    main = _colour(hue, 0.75 + 0.25 * column[7], np.where(light, 0.9, 0.55))
    second = _colour(hue + 0.08 * (column[8] - 0.5), np.where(light, 0.4, 0.8), np.where(light, 1.0, 0.25))
    texture = _texture(np.floor(len(TEXTURES) * column[9]), x, y, radius, column[10])
    ink = _mix(main, second, texture * _edge(distance * radius + np.maximum(1, 0.08 * radius)))

    # The background runs from one pale colour to another along a direction of its own.
    angle = np.float32(2 * np.pi) * column[11]
    along = 0.5 + (np.cos(angle) * (columns / width - 0.5) + np.sin(angle) * (rows / height - 0.5)) / np.float32(1.42)
    near = _colour(backdrop_hue, 0.10 + 0.20 * column[12], 0.80 + 0.18 * column[13])
    far = _colour(backdrop_hue + 0.15, 0.10 + 0.20 * column[14], 0.80 + 0.18 * column[15])
    picture = _mix(_mix(near, far, along), ink, inside)
    drawn: Array = np.rint(picture * 255).clip(0, 255).astype(np.uint8)
    return drawn


def _edge(distance: Array) -> Array:
    """Share of a pixel inside an outline ``distance`` pixels away: 1 inside, 0 outside, a ramp of one pixel."""
    share: Array = (0.5 - distance).clip(0, 1)
    return share


def _mix(first: Array, second: Array, share: Array) -> Array:
    """``share`` (B, H, W) of the colour ``second`` over ``first``, each (B, 3, H, W) or (B, 3, 1, 1)."""
    mixed: Array = first + (second - first) * share[:, None]
    return mixed


def _colour(hue: Array, saturation: Array, value: Array) -> Array:
    """Hue (any real number), saturation and value, each (B, 1, 1), as RGB (B, 3, 1, 1) in [0, 1]."""
    offsets = np.array([5, 3, 1], dtype=np.float32).reshape(1, 3, 1, 1)
    k = (offsets + 6 * hue[:, None]) % 6
    rgb: Array = value[:, None] * (1 - saturation[:, None] * np.minimum(k, 4 - k).clip(0, 1))
    return rgb.astype(np.float32)


def _texture(kind: Array, x: Array, y: Array, radius: Array, fineness: Array) -> Array:
    """Share of the second colour at each pixel (B, H, W); x, y are in radii, in the turned frame of the shape."""
    period = 0.5 + 0.25 * fineness
    blur = period * radius / 2
    wave_x, wave_y = np.cos(2 * np.pi / period * x), np.cos(2 * np.pi / period * y)

    def step(wave: Array) -> Array:
        return (0.5 + wave * blur / 1.6).clip(0, 1)

    checks = 0.5 + 2 * (step(wave_x) - 0.5) * (step(wave_y) - 0.5)
    dots = step(wave_x + wave_y - 0.7)
    chosen: Array = np.where(kind == 1, step(wave_x), np.where(kind == 2, checks, np.where(kind == 3, dots, 0)))
    return chosen.astype(np.float32)


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.9


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.74


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) * np.float32(0.866) - y * 0.5, y) - 0.5


def _star(x: Array, y: Array) -> Array:
    # Fold the plane into a tenth of the star; one edge from the tip (0, 1) to the inner corner is left.
    tenth = np.float32(np.pi / 5)
    angle = np.arctan2(x, y)
    folded = np.abs((angle + tenth) % (2 * tenth) - tenth)
    length = np.hypot(x, y)
    px, py = length * np.sin(folded), length * np.cos(folded)
    inner = 0.44
    corner_x, corner_y = inner * np.sin(tenth), inner * np.cos(tenth)
    normal = np.array([1.02 - corner_y, corner_x], dtype=np.float32)
    normal /= np.linalg.norm(normal)
    distance: Array = (px * normal[0] + (py - 1.02) * normal[1]).astype(np.float32)
    return distance


def _cross(x: Array, y: Array) -> Array:
    wide, narrow = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(wide - 0.92, narrow - 0.28)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.7) - 0.2


def _heart(x: Array, y: Array) -> Array:
    # In the frame whose tip is (0, 0) and whose notch is (0, 1): a quarter disc on a square on its corner.
    x, y = np.abs(x) * _HEART, 0.56 - y * _HEART
    disc = np.hypot(x - 0.25, y - 0.75) - np.float32(0.3536)
    along = 0.5 * (x + y).clip(0, None)
    side = np.minimum(np.hypot(x, y - 1), np.hypot(x - along, y - along)) * np.sign(x - y)
    distance: Array = np.where(x + y > 1, disc, side) / _HEART
    return distance


def _moon(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y) - 0.95, 0.7 - np.hypot(x - 0.48, y))


_OUTLINES: tuple[Callable[[Array, Array], Array], ...] = (
    _circle,
    _square,
    _triangle,
    _star,
    _cross,
    _ring,
    _heart,
    _moon,
)
"""Signed distances in radii, negative inside, in the order of the class names."""
