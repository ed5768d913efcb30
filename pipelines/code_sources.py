"""Codes that no prior drew: what samples of a prior are to be held against.

``random`` codes are drawn uniformly: what the decoder makes of codes that know nothing of each other. ``neighbour``
codes are those of real images, each replaced by the code whose vector is nearest: what small mistakes in every code
cost. (Indices have no metric, so a neighbour is one by distance of codebook vectors, not by number.) The images are
held-out ones where they are shown, and training images where figures hold the result against held-out ones. A prior's
samples should look better than the first and may look worse or better than the second.

Neither has a likelihood: they are sources of samples, not priors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from priors.sampling import Noise
from vqgen.codec import HierarchicalVQVAE
from vqgen.codes import Codes, LevelSpec
from vqgen.images import to_uint8

DECODED_AT_ONCE = 64
_ROWS = 1024


def random_codes(levels: Sequence[LevelSpec], seed: int, count: int) -> Codes:
    """``count`` maps of every level, each code uniform over its codebook: int64 (B, h, w), coarse to fine.

    They are, by construction, what the prior ``uniform`` samples at this seed.
    """
    maps = []
    for number, level in enumerate(levels):
        u = Noise(seed, tuple(range(count)), number).uniform("codes", level.positions)
        codes = (u * level.codebook_size).long().clamp(max=level.codebook_size - 1)
        maps.append(rearrange(codes, "b (h w) -> b h w", h=level.height))
    return tuple(maps)


def neighbour_codes(codec: HierarchicalVQVAE, codes: Codes) -> Codes:
    """``codes`` (B, h, w) of every level with each code replaced by its nearest other one."""
    return tuple(
        nearest_other(quantizer.codebook.detach().cpu())[level.cpu()]
        for quantizer, level in zip(codec.quantizers, codes, strict=True)
    )


def nearest_other(codebook: Tensor) -> Tensor:
    """(K,) int64: for each vector of ``codebook`` (K, D) the index of the nearest other one; of a lone one its own."""
    if len(codebook) == 1:
        return torch.zeros(1, dtype=torch.int64)
    vectors = codebook.double()
    nearest = torch.empty(len(vectors), dtype=torch.int64)
    for start in range(0, len(vectors), _ROWS):  # a whole K x K matrix would be 2 GB at K = 16,384
        distance = torch.cdist(vectors[start : start + _ROWS], vectors)
        own = torch.arange(len(distance))
        distance[own, start + own] = torch.inf
        nearest[start : start + _ROWS] = distance.argmin(dim=1)
    return nearest


@torch.no_grad()
def decoded(codec: HierarchicalVQVAE, codes: Codes) -> Tensor:
    """Pictures of ``codes`` (B, h, w) of every level: uint8 (B, C, H, W) on the CPU."""
    device = next(codec.parameters()).device
    pictures = []
    for start in range(0, len(codes[0]), DECODED_AT_ONCE):
        part = tuple(level[start : start + DECODED_AT_ONCE].to(device) for level in codes)
        pictures.append(to_uint8(codec.decode(part)).cpu())
    return torch.cat(pictures)
