"""Shapes shared by every layer: images, levels and their code maps.

The legend used everywhere: B batch, C image channels, H W image, h w code map, D code width, K codebook
size, L levels. How code maps are kept on disk is `vqgen.code_store`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

Codes: TypeAlias = "tuple[Tensor, ...]"
"""Code maps, coarse to fine; each (B, h, w) int64 in [0, K)."""

_NAMES = {1: ("top",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}

MAX_LEVELS = max(_NAMES)

MAX_SIDE = 2**13
MAX_SIZE = 2**20

# The bounds hold for what is read from files: nothing is made by sizes of a stranger before they are known to be sane.
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
"""Rows or columns of an image or of a code map."""
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
"""Codes of a codebook, numbers of a code's vector, or classes."""


@dataclass(frozen=True)
class ImageSpec:
    """The images a codec takes: C channels, H rows and W columns of 8-bit values."""

    channels: Annotated[int, Field(ge=1, le=4)]
    height: Side
    width: Side

    @property
    def dims(self) -> int:
        """Values in one image, the denominator of bits/dim."""
        return self.channels * self.height * self.width


@dataclass(frozen=True)
class LevelSpec:
    """One level's code map: h rows and w columns of codes in [0, K), each a vector of D numbers."""

    name: str
    height: Side
    width: Side
    codebook_size: Size
    code_dim: Size

    @property
    def positions(self) -> int:
        """Codes in one map."""
        return self.height * self.width


def level_names(count: int) -> tuple[str, ...]:
    """Names of ``count`` levels, coarse to fine: top, middle, bottom.

    Raises:
        KeyError: ``count`` is not 1, 2 or 3.
    """
    return _NAMES[count]
