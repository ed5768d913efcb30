"""What RoundTrip counts before training: code frequencies, and codebooks whitened by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange
from torch import Tensor

from priors.sampling import exact
from vqgen.codes import LevelSpec
from vqgen.collectives import sum_over_processes
from vqgen.errors import InputError

if TYPE_CHECKING:
    from priors.base import Batches, Prior

SMOOTHING = 0.5
"""Added to each count, so that no code has frequency 0."""
MAX_BIAS = 10**6
"""Most numbers in a bias per position that is not asked for."""
MAX_WIDTH = 64
"""Most principal components of a codebook that the networks see."""


def bias_rows(code_bias: Literal["auto", "position", "marginal", "none"], target: LevelSpec) -> int:
    """Rows of the bias: one per position, one for all, or none."""
    if code_bias == "auto":
        code_bias = "position" if target.positions * target.codebook_size <= MAX_BIAS else "marginal"
    return {"position": target.positions, "marginal": 1, "none": 0}[code_bias]


def whitened_width(level: LevelSpec) -> int:
    """Numbers of a level's whitened codebook vector."""
    return min(level.code_dim, MAX_WIDTH)


def count_codes(prior: Prior, batches: Batches) -> list[Tensor]:
    """How often each code occurs at each position, (n, K) int64 for each coarser level and then the target.

    On several processes, in all their batches together.
    """
    levels = (*prior.spec.context, prior.spec.target)
    counts = [torch.zeros(lv.positions * lv.codebook_size, dtype=torch.int64, device=prior.device) for lv in levels]
    for codes, context, _ in batches:
        for level, count, maps in zip(levels, counts, (*context, codes), strict=True):
            flat = rearrange(maps.to(prior.device), "b h w -> b (h w)")
            cells = torch.arange(level.positions, device=prior.device) * level.codebook_size + flat
            count.index_add_(0, cells.flatten(), torch.ones_like(cells).flatten())
    counts = [sum_over_processes(count) for count in counts]
    return [count.view(level.positions, level.codebook_size) for level, count in zip(levels, counts, strict=True)]


def log_frequencies(counts: Tensor, rows: int) -> Tensor:
    """log relative frequencies (rows, K) float64 of counts (n, K): per position, or over all where ``rows`` is 1."""
    smoothed = exact(counts if rows == len(counts) else counts.sum(0, keepdim=True)) + SMOOTHING
    return (smoothed / smoothed.sum(-1, keepdim=True)).log()


def whiten(codebook: Tensor, counts: Tensor, width: int) -> Tensor:
    """The codebook (K, D) about the mean code in units of the codes' spread: (K, width).

    Mean and spread are over the codes as they occur, ``counts`` (K,); the spread is one number, so that the
    directions keep their proportions. Where only one code occurs, the spread is that of all codes. Where D is above
    ``width``, the vectors are projected on as many principal components.

    Raises:
        InputError: the codebook is all zeros: it was never set.
    """
    if not codebook.any():
        raise InputError("A codebook is all zeros.", "Give the prior its codebooks with set_codebooks before prepare.")
    share = exact(counts) / exact(counts).sum().clamp(min=1)
    if (share > 0).sum() < 2:
        share = torch.full_like(share, 1 / len(share))
    centered = exact(codebook) - share @ exact(codebook)
    if centered.shape[1] > width:
        covariance = (centered * share[:, None]).T @ centered
        centered = centered @ torch.linalg.eigh(covariance).eigenvectors[:, -width:]
    spread = ((share @ centered.square().sum(-1)) / width).sqrt()
    return (centered / (spread if spread > 0 else 1.0)).to(codebook)
