"""From coarser codes and a label to one feature map that is aligned with the target's grid.

VQ-VAE-2 (Razavi et al. 2019, sec. 3.2) conditions the finer prior on the coarser codes through a residual
stack; this is that stack, for any number of coarser levels at any ratio of sizes, with the label added. How a
prior uses the map is its own affair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.base import PriorSpec
from vqgen.codes import Codes, LevelSpec
from vqgen.errors import InputError, MismatchError


class Conditioner(nn.Module):
    """Coarser codes and label to features (B, width, h, w); zeros where there is nothing to condition on.

    Each coarser level has its own embedding and residual stack, at its own resolution, where it is cheapest.
    Its features are then spread over the finer grid, the levels added up, and smoothed by one residual block.
    """

    def __init__(self, spec: PriorSpec, width: int, blocks: int = 2) -> None:
        """
        Args:
            spec: what is modelled given what.
            width: channels of the feature map.
            blocks: residual blocks per coarser level.
        """
        super().__init__()
        self.spec, self.width = spec, width
        self.levels = nn.ModuleList(_Level(level, spec.target, width, blocks) for level in spec.context)
        self.smooth = _ResidualBlock(width) if spec.context else None
        self.label = nn.Embedding(spec.classes + 1, width) if spec.classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.1)
            nn.init.zeros_(self.label.weight[-1])
        # Says on which device and in which dtype the zeros are made when there is nothing to learn.
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, context: Codes, label: Tensor | None, batch_size: int) -> Tensor:
        """Features (B, width, h, w) of coarser codes (B, h_i, w_i) int64 and labels (B,) int64.

        ``label=None``, or a label equal to the number of classes, means "no label": a learned offset from the
        mean of the labels. The offset starts at 0, so that a prior whose label was never hidden in training
        gets the average label rather than noise.

        Raises:
            MismatchError: another number of coarser levels, or maps of other sizes, than in the spec.
            InputError: labels for a spec without labels.
        """
        if len(context) != len(self.levels):
            raise MismatchError(f"Expected {len(self.levels)} coarser code maps, got {len(context)}.")
        if label is not None and self.label is None:
            raise InputError("This prior was trained without labels.", "Leave the label out.")
        features = self.zero.expand(batch_size, self.width, self.spec.target.height, self.spec.target.width)
        for level, codes in zip(self.levels, context, strict=True):
            features = features + level(codes)
        if self.smooth is not None:
            features = self.smooth(features)
        if self.label is not None:
            table: Tensor = self.label.weight
            table = torch.cat([table[:-1], table[:-1].mean(0, keepdim=True) + table[-1:]])
            rows = table[-1:].expand(batch_size, -1) if label is None else table[label]
            features = features + rearrange(rows, "b c -> b c 1 1")
        return features


class _Level(nn.Module):
    """One coarser level: codes (B, h_c, w_c) to features (B, width, h, w)."""

    def __init__(self, level: LevelSpec, target: LevelSpec, width: int, blocks: int) -> None:
        super().__init__()
        self.level = level
        self.embedding = nn.Embedding(level.codebook_size, width)
        self.blocks = nn.Sequential(*(_ResidualBlock(width) for _ in range(blocks)))
        self.spread = _spread(level, target, width)

    def forward(self, codes: Tensor) -> Tensor:
        if tuple(codes.shape[1:]) != (self.level.height, self.level.width):
            raise MismatchError(
                f"Expected {self.level.name} codes of {self.level.height} x {self.level.width}, "
                f"got {' x '.join(map(str, codes.shape[1:]))}."
            )
        features: Tensor = self.spread(self.blocks(rearrange(self.embedding(codes), "b h w c -> b c h w")))
        return features


def _spread(level: LevelSpec, target: LevelSpec, width: int) -> nn.Module:
    if (level.height, level.width) == (target.height, target.width):
        return nn.Identity()
    if target.height % level.height == 0 and target.width % level.width == 0:
        return _CellToPixels(width, target.height // level.height, target.width // level.width)
    return _Nearest(target.height, target.width)


class _CellToPixels(nn.Module):
    """Each coarse cell to its own rows x columns fine cells, so that a fine cell knows its place in the coarse one."""

    def __init__(self, width: int, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.expand = nn.Conv2d(width, width * rows * columns, 1)

    def forward(self, features: Tensor) -> Tensor:
        cells: Tensor = self.expand(features)
        return rearrange(cells, "b (c r s) h w -> b c (h r) (w s)", r=self.rows, s=self.columns)


class _Nearest(nn.Module):
    """Fine cell (i, j) takes coarse cell (floor(i h_c / h), floor(j w_c / w)), for sizes that do not divide."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, features: Tensor) -> Tensor:
        rows = torch.arange(self.height, device=features.device) * features.shape[-2] // self.height
        columns = torch.arange(self.width, device=features.device) * features.shape[-1] // self.width
        nearest: Tensor = features[:, :, rows[:, None], columns[None, :]]
        return nearest


class _ResidualBlock(nn.Module):
    """x + conv1x1(gelu(conv3x3(gelu(x)))), the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        residual: Tensor = self.outer(F.gelu(self.inner(F.gelu(features))))
        return features + residual
