"""The scale on which a prior is judged: uniform codes, and code frequencies position by position.

Both take every code as independent of the others, so that what a learned prior gains over `Unigram` is what it
knows of structure. Both are exact, and neither is trained: `Unigram` is complete after ``prepare``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from priors.base import Batches, Density, Prior, PriorSpec
from priors.inputs import check_codes, check_inputs, check_mask, check_range
from priors.registry import register
from priors.sampling import PLAIN, Noise, SampleOptions, draw, exact
from vqgen.codes import Codes
from vqgen.collectives import sum_over_processes
from vqgen.config import Settings
from vqgen.errors import InputError

MAX_ENTRIES = 2**26
"""Largest table of counts (256 MiB) for which each class has its own."""

SMOOTHING = 0.5
"""Added to each count (Krichevsky and Trofimov 1981), so that no code has probability 0."""


class BaselineConfig(Settings):
    """A baseline has no settings."""


class IndependentPrior(Prior):
    """A prior whose codes do not depend on each other; a subclass gives the table of each label."""

    likelihood = "exact"
    Config = BaselineConfig
    training_defaults: ClassVar[Mapping[str, Any]] = {"steps": 0}
    players = ()

    def table(self, label: int) -> Tensor:
        """log p of each code at each position, (h * w, K) float64 nats; ``label`` = classes means "no label"."""
        raise NotImplementedError

    def forward(
        self,
        codes: Tensor,
        context: Codes = (),
        label: Tensor | None = None,
        *,
        player: str = "model",
        progress: float = 1.0,
        step: int = 0,
    ) -> dict[str, Tensor]:
        """``loss`` in nats per code, ``bits_per_code`` the same in bits; there is nothing to train."""
        loss = -self.log_prob_map(codes, context, label).mean()
        return {"loss": loss, "bits_per_code": loss / math.log(2)}

    def log_prob_map(self, codes: Tensor, context: Codes = (), label: Tensor | None = None) -> Tensor:
        """log p of each code, (B, h, w) float64 nats; its sum over a map is ``log_prob``."""
        codes = check_codes(self, codes)
        _, label = check_inputs(self, len(codes), context, label)
        nats = exact(torch.zeros_like(codes))
        for value, rows in self._by_label(len(codes), label):
            table = self.table(value)
            picked = table.gather(1, rearrange(codes[rows], "b h w -> (h w) b").to(table.device))
            nats[rows] = rearrange(picked, "(h w) b -> b h w", w=codes.shape[2])
        return nats

    def log_prob(
        self,
        codes: Tensor,
        context: Codes = (),
        label: Tensor | None = None,
        *,
        noise: Noise | None = None,
        samples: int = 64,
    ) -> Density:
        """Exact; ``noise`` and ``samples`` change nothing."""
        return Density.exact(self.log_prob_map(codes, context, label).sum((1, 2)))

    @torch.no_grad()
    def sample(
        self,
        noise: Noise,
        context: Codes = (),
        label: Tensor | None = None,
        options: SampleOptions = PLAIN,
        known: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """One map per index of ``noise``, (B, h, w) int64. Guidance must be 1: nothing is trained to be guided."""
        batch = len(noise.indices)
        if options.guidance != 1.0:
            raise InputError(f"The prior '{self.name}' cannot be guided.", "Leave guidance at 1.")
        _, label = check_inputs(self, batch, context, label)
        known, keep = check_mask(self, batch, known, keep)
        target = self.spec.target
        u = noise.uniform("codes", target.positions)
        codes = torch.empty(batch, target.height, target.width, dtype=torch.int64, device=self.device)
        for value, rows in self._by_label(batch, label):
            table = self.table(value)
            for row in rows.tolist():  # one map at a time: a table is large, a batch of them would be larger
                codes[row] = rearrange(draw(table, u[row], options), "(h w) -> h w", w=target.width)
        return codes if known is None or keep is None else torch.where(keep, known, codes)

    def _by_label(self, batch_size: int, label: Tensor | None) -> list[tuple[int, Tensor]]:
        """Each label that occurs, with the rows that have it."""
        if label is None:
            return [(self.spec.classes, torch.arange(batch_size))]
        return [(value, (label == value).nonzero()[:, 0].cpu()) for value in sorted(set(label.tolist()))]


@register
class Uniform(IndependentPrior):
    """Every code is as likely as any other: log2 K bits per code."""

    name = "uniform"
    summary = "Baseline: every code equally likely."

    def __init__(self, config: Settings | Mapping[str, Any], spec: PriorSpec) -> None:
        super().__init__(config, spec)
        self.place: Tensor
        self.register_buffer("place", torch.zeros(()), persistent=False)  # follows .to(device), as weights do

    def table(self, label: int) -> Tensor:
        target = self.spec.target
        value = exact(self.place) - math.log(target.codebook_size)
        return value.expand(target.positions, target.codebook_size)


@register
class Unigram(IndependentPrior):
    """How often each code occurs at each position in the training codes, per class when labelled.

    Every count starts at one half. Where the table of counts of all classes would have more than `MAX_ENTRIES`
    entries (1,000 classes of 64 x 64 maps of 512 codes would be 8 GB), the classes share one.
    """

    name = "unigram"
    summary = "Baseline: how often each code occurs at each position, per class."

    def __init__(self, config: Settings | Mapping[str, Any], spec: PriorSpec) -> None:
        super().__init__(config, spec)
        entries = spec.target.positions * spec.target.codebook_size
        classes = spec.classes if spec.classes * entries <= MAX_ENTRIES else 0
        self.counts: Tensor
        self.register_buffer(
            "counts", torch.zeros(max(classes, 1), spec.target.positions, spec.target.codebook_size, dtype=torch.int32)
        )

    @torch.no_grad()
    def prepare(self, batches: Batches) -> None:
        """Count the codes of ``batches``; on several processes, of all their batches together.

        Raises:
            InputError: codes without labels for a prior with labels, or a code or label out of range.
        """
        counts = torch.zeros_like(self.counts)
        classes, positions, size = counts.shape
        where = torch.arange(positions, device=counts.device)
        for codes, _, label in batches:
            rows = torch.zeros(len(codes), dtype=torch.int64, device=counts.device)
            if classes > 1:
                if label is None:
                    raise InputError(f"The prior '{self.name}' has {self.spec.classes} labels; these codes have none.")
                check_range(label, classes, "labels")
                rows = label.to(counts.device)
            flat = rearrange(check_codes(self, codes), "b h w -> b (h w)")
            cells = (rows[:, None] * positions + where) * size + flat
            cells = rearrange(cells, "b n -> (b n)")
            counts.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=counts.dtype))
        self.counts.copy_(sum_over_processes(counts))

    def table(self, label: int) -> Tensor:
        counts = self.counts.sum(0) if label == self.spec.classes or len(self.counts) == 1 else self.counts[label]
        smoothed = exact(counts) + SMOOTHING
        return (smoothed / smoothed.sum(-1, keepdim=True)).log()
