"""Bits of codes under priors, for images whose class may not be known.

A class-conditional prior is summed over the classes, exactly:

    p(codes) = sum_y p(y) prod_l p(codes of level l | coarser codes, y)

with p(y) from the training labels. Levels and positions get their shares by the chain rule: after any prefix of the
codes, coarse to fine and along each level's scan, the sum over y has some logarithm, and what the next code takes from
it is that code's bits. So a map adds up to its level, and the levels to the image. Of a bound (RoundTrip), each
class's estimate has a mean of at most its p, so the sum has too, and its logarithm is a lower bound of log p; the
share of a single level is then no bound of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from pipelines.likelihood import ESTIMATOR_SAMPLES
from priors.autoregressive import AutoregressivePrior
from priors.base import Prior
from priors.baselines import IndependentPrior
from priors.sampling import Noise
from priors.scan import Scan, to_maps, to_sequence
from vqgen.codes import Codes
from vqgen.errors import DivergedError

LabelUse = Literal["marginal", "given", "none"]

MOST_CLASSES = 20
"""Classes over which is summed unless the user says otherwise: it takes as many passes of each prior."""
_AT_ONCE = 2**25
_MOST_AT_ONCE = 256
LN2 = math.log(2)


@dataclass(frozen=True)
class Labels:
    """How labels enter the bits of codes."""

    use: LabelUse
    shares: Tensor | None = None
    """(Y,) float64: share of each class among the training labels, where they are summed over, or given."""

    @property
    def passes(self) -> int:
        """How often each prior reads an image: once for each class that is summed over."""
        return len(self.shares) if self.use == "marginal" and self.shares is not None else 1


@dataclass(frozen=True)
class CodeBits:
    """Bits of the codes of B images, float64 on the CPU."""

    levels: tuple[Tensor, ...]
    """(B,) for each level, coarse to fine."""
    maps: tuple[Tensor | None, ...]
    """(B, h, w) for each level, adding up to the level's bits; None where its prior has no bits by position."""

    @property
    def total(self) -> Tensor:
        """(B,) bits of all levels."""
        return torch.stack(self.levels).sum(0)


def has_map(prior: Prior) -> bool:
    """Whether the bits of a map can be told position by position."""
    return isinstance(prior, (AutoregressivePrior, IndependentPrior))


def images_at_once(priors: Sequence[Prior], passes: int = 1) -> int:
    """Images in one go, so that neither a level's logits nor the bits of all ``passes`` take more than 128 MiB."""
    targets = [prior.spec.target for prior in priors]
    logits = max(target.positions * target.codebook_size for target in targets)
    kept = 2 * passes * max(target.positions for target in targets)  # float64 counts twice
    return max(min(_AT_ONCE // max(logits, kept), _MOST_AT_ONCE), 1)


@torch.no_grad()
def code_bits(
    priors: Sequence[Prior], codes: Codes, labels: Labels, given: Tensor | None, indices: Sequence[int]
) -> CodeBits:
    """Bits of ``codes`` (B, h, w) of every level.

    Args:
        priors: one for each level, coarse to fine, in evaluation mode.
        given: (B,) int64 class of each image; used where ``labels`` says so.
        indices: of the images, for the random numbers of estimates.

    Raises:
        DivergedError: a log-probability that is not a finite number.
    """
    weights, cases = _cases(labels, given, len(codes[0]))
    before = weights[:, None].expand(-1, len(codes[0]))  # (Y, B): log p(y) and all codes so far
    levels, maps = [], []
    for number, prior in enumerate(priors):
        noise = Noise(0, tuple(indices), number)
        steps = torch.stack([_step_nats(prior, codes[number], codes[:number], label, noise) for label in cases])
        if not steps.isfinite().all():
            target = prior.spec.target.name
            raise DivergedError(
                f"The {prior.name} prior of level '{target}' gives log-probabilities that are not finite numbers.",
                f"Train it again: train-prior --prior {prior.name} --level {target} --overwrite.",
            )
        prefixes = before[..., None] + steps.cumsum(-1)
        along = torch.cat([before[..., None], prefixes], dim=-1).logsumexp(0)
        bits = -along.diff(dim=-1) / LN2
        levels.append(bits.sum(-1))
        maps.append(_as_map(prior, bits) if has_map(prior) else None)
        before = prefixes[..., -1]
    return CodeBits(tuple(levels), tuple(maps))


def _cases(labels: Labels, given: Tensor | None, count: int) -> tuple[Tensor, list[Tensor | None]]:
    """(Y,) log-weights, and the labels (B,) that each stands for."""
    if labels.use == "marginal":
        assert labels.shares is not None
        return labels.shares.log(), [torch.full((count,), value) for value in range(len(labels.shares))]
    return torch.zeros(1, dtype=torch.float64), [given if labels.use == "given" else None]


def _step_nats(prior: Prior, codes: Tensor, context: Codes, label: Tensor | None, noise: Noise) -> Tensor:
    """log p of each code along the scan, (B, n) float64 on the CPU, or (B, 1) of a whole map."""
    device = prior.device
    on_device = tuple(coarser.to(device) for coarser in context)
    label = None if label is None else label.to(device)
    if isinstance(prior, (AutoregressivePrior, IndependentPrior)):
        nats = prior.log_prob_map(codes.to(device), on_device, label).cpu().double()
        return to_sequence(nats, _scan(prior))
    density = prior.log_prob(codes.to(device), on_device, label, noise=noise, samples=ESTIMATOR_SAMPLES)
    return rearrange(density.nats.cpu().double(), "b -> b 1")


def _as_map(prior: Prior, bits: Tensor) -> Tensor:
    target = prior.spec.target
    return to_maps(bits, target.height, target.width, _scan(prior))


def _scan(prior: Prior) -> Scan:
    return prior.scan if isinstance(prior, AutoregressivePrior) else "raster"
