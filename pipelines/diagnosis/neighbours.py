"""How near samples come to the training images, against how near other held-out images come to them.

The distance between two images is that between their codes' vectors, so that a code replaced by a similar one counts
little: the root of the mean over levels of the mean squared distance over positions, each level in units of twice
the variance of its training codes. Two unrelated images are about 1 apart, the same codes 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vqgen.code_store import CodeSplit
from vqgen.codes import Codes

NUMBERS = 2**30
"""Numbers of training images' vectors that are read in one search; it decides how many images are searched."""
MOST_IMAGES = 50_000
FEWEST_IMAGES = 1_000
AT_ONCE = 2**24
"""Numbers of training images' vectors in memory at once."""
SAME = 1e-4
"""Squared distances below this are rounding: the codes are the same, or as good as the same."""


class Nearest(NamedTuple):
    """For each of Q maps, the nearest training image."""

    distance: Tensor
    """(Q,) float32."""
    place: Tensor
    """(Q,) int64 in the training split."""


@dataclass(frozen=True)
class MemoryFigures:
    """Distances to the nearest training image, over one level's codes or over ``all`` levels that are sampled."""

    scope: str
    samples: int
    held_out: int
    searched: int
    """Training images searched, evenly spread over the split."""
    training_images: int
    sample_distance: float
    """Median over the samples."""
    held_out_distance: float
    """Median over the held-out images."""
    copies: float
    """Share of the samples that have the codes of a training image."""
    held_out_copies: float
    variety: float | None
    """Mean distance between two samples over that between two held-out images."""

    @property
    def ratio(self) -> float | None:
        """Median distance of samples over that of held-out images; None where the latter have copies themselves."""
        return self.sample_distance / self.held_out_distance if self.held_out_distance > 0 else None


def searchable(codes_per_image: int, width: int, images: int) -> int:
    """How many training images are searched, of maps of so many codes of so many numbers."""
    affordable = NUMBERS // max(codes_per_image * width, 1)
    return min(images, MOST_IMAGES, max(FEWEST_IMAGES, affordable))


class Distances:
    """Squared distances of maps to training images; ``books`` are the codebooks (K, D) of the levels compared."""

    def __init__(self, books: Sequence[Tensor], train: CodeSplit, indices: Sequence[int]) -> None:
        self.books = [book.detach().float().cpu() for book in books]
        self.train, self.indices = train, indices
        some = _read(train, indices[:: max(1, len(indices) // 2048)])
        self.scales = [
            2 * float(book[codes.flatten()].var(0, correction=0).sum())
            for book, codes in zip(self.books, some, strict=False)
        ]

    def vectors(self, codes: Tensor, level: int) -> Tensor:
        """(B, positions * D) such that squared distances are in the level's units; all 0 where it has one code."""
        scale = self.scales[level] * codes[0].numel()
        flat = rearrange(self.books[level][codes], "b h w d -> b (h w d)")
        return flat / scale**0.5 if scale > 0 else torch.zeros_like(flat)

    def nearest(self, queries: Codes, advance: Callable[[float], None] | None = None) -> dict[int | None, Nearest]:
        """The nearest training image of each of Q maps by each level alone, and (under None) by all together.

        ``advance`` is told how many training images have been searched since it was told last.
        """
        own = [self.vectors(codes, level) for level, codes in enumerate(queries)]
        best: dict[int | None, tuple[Tensor, Tensor]] = {}
        step = max(1, AT_ONCE // sum(vectors.shape[1] for vectors in own))
        for start in range(0, len(self.indices), step):
            span = self.indices[start : start + step]
            maps = _read(self.train, span)
            per_level = [squared(vectors, self.vectors(maps[i], i)) for i, vectors in enumerate(own)]
            scopes: dict[int | None, Tensor] = dict(enumerate(per_level))
            scopes[None] = torch.stack(per_level).mean(0)
            for scope, distances in scopes.items():
                least, place = distances.min(1)
                index = torch.tensor(span)[place]
                if scope in best:
                    kept, kept_index = best[scope]
                    nearer = least < kept
                    least, index = torch.where(nearer, least, kept), torch.where(nearer, index, kept_index)
                best[scope] = (least, index)
            if advance is not None:
                advance(len(span))
        return {scope: Nearest(distance.sqrt(), index) for scope, (distance, index) in best.items()}

    def variety(self, maps: Codes) -> float:
        """Mean distance between two different ones of B maps, over all levels."""
        vectors = [self.vectors(codes, level) for level, codes in enumerate(maps)]
        distances = torch.stack([squared(own, own) for own in vectors]).mean(0).sqrt()
        count = len(distances)
        return float(distances.sum()) / (count * (count - 1)) if count > 1 else 0.0


def squared(queries: Tensor, others: Tensor) -> Tensor:
    """(Q, B) squared distances between the rows of (Q, F) and (B, F), those within rounding of 0 as 0."""
    lengths = queries.square().sum(1)[:, None] + others.square().sum(1)[None]
    distances = lengths - 2 * queries @ others.T
    return torch.where(distances < SAME * lengths.clamp(min=1.0), 0.0, distances)


def compare_memory(
    distances: Distances, samples: Codes, held_out: Codes, names: Sequence[str]
) -> tuple[list[MemoryFigures], Nearest]:
    """Figures of all levels together, then of each (where there are several); and the samples' nearest by all."""
    drawn, real = distances.nearest(samples), distances.nearest(held_out)
    real_variety = distances.variety(held_out)
    variety = distances.variety(samples) / real_variety if real_variety > 0 else None
    scopes: Mapping[int | None, str] = {None: "all", **(dict(enumerate(names)) if len(names) > 1 else {})}
    figures = [
        MemoryFigures(
            scope=name,
            samples=len(samples[0]),
            held_out=len(held_out[0]),
            searched=len(distances.indices),
            training_images=len(distances.train),
            sample_distance=float(drawn[scope].distance.median()),
            held_out_distance=float(real[scope].distance.median()),
            copies=float((drawn[scope].distance == 0).float().mean()),
            held_out_copies=float((real[scope].distance == 0).float().mean()),
            variety=variety if scope is None else None,
        )
        for scope, name in scopes.items()
    ]
    return figures, drawn[None]


def _read(split: CodeSplit, indices: Sequence[int]) -> Codes:
    codes: Codes = split.__getitems__(indices)["codes"]
    return codes
