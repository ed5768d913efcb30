"""Priors that go code by code: p(codes) as a product over positions in a scan order.

`AutoregressivePrior` adds to `priors.base.Prior` everything that follows from two methods (``logits`` and
``stepper``): the loss, the exact likelihood, its map over positions, sampling, guidance and masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from priors.base import Density, Prior, at_least_float32, evaluating
from priors.inputs import check_codes, check_inputs, check_mask
from priors.sampling import PLAIN, Noise, SampleOptions, draw, exact
from priors.scan import Scan, to_maps, to_sequence
from vqgen.codes import Codes
from vqgen.compiling import Part
from vqgen.errors import DivergedError, InputError


class Stepper(Protocol):
    """Walks the positions of a batch of maps in the prior's scan order."""

    def step(self, previous: Tensor | None) -> Tensor:
        """Logits (B, K) of the next position; ``previous`` is the (B,) int64 code of the last one, None at first."""
        ...


class AutoregressivePrior(Prior):
    """A prior that predicts each code from those before it in its scan order, one position after another.

    A subclass gives ``logits``, and ``stepper`` where it can do better than one whole pass per position. Its
    settings may have ``scan``, the order of `priors.scan` in which it visits the positions (without it: ``raster``,
    row by row, left to right), and ``label_dropout``, the share of training maps whose label is hidden, which is
    what classifier-free guidance needs.

    Maps go in and come out as images have them, in rows and columns, whatever the scan order; only a stepper, and
    the noise of `sample`, go along the scan.

    Known codes are an approximation: each position sees the kept codes before it in the scan, not those after.
    """

    likelihood = "exact"

    def logits(self, codes: Tensor, context: Codes = (), label: Tensor | None = None) -> Tensor:
        """Logits (B, h, w, K) of all positions in one pass, from codes (B, h, w), both laid out as the image is.

        Each position sees only the codes before it in the scan order, context and label. A label equal to the
        number of classes, as ``label=None``, means "no label".
        """
        raise NotImplementedError

    def stepper(self, batch_size: int, context: Codes = (), label: Tensor | None = None) -> Stepper:
        """A walk along the scan over ``batch_size`` maps: the logits of ``logits``, one position at a time.

        This default makes one whole pass per position; the faster ones are checked against it.
        """
        return ReplayStepper(self, batch_size, context, label)

    @property
    def scan(self) -> Scan:
        """The order in which it visits the positions: its setting ``scan``, ``raster`` where it has none."""
        scan: Scan = getattr(self.config, "scan", "raster")
        return scan

    @property
    def label_dropout(self) -> float:
        """Share of training maps whose label was hidden."""
        return float(getattr(self.config, "label_dropout", 0.0)) if self.spec.classes else 0.0

    def compilable(self) -> Sequence[Part]:
        """``logits``, the one pass that training makes."""
        return [Part(self, "logits")]

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
        """Mean cross-entropy: ``loss`` in nats per code, ``bits_per_code`` the same in bits."""
        if self.training and label is not None and self.label_dropout > 0:
            hidden = torch.rand(label.shape, device=label.device) < self.label_dropout
            label = label.masked_fill(hidden, self.spec.classes)
        loss = self._nats(codes, context, label).mean()
        return {"loss": loss, "bits_per_code": loss.detach() / math.log(2)}

    def log_prob_map(self, codes: Tensor, context: Codes = (), label: Tensor | None = None) -> Tensor:
        """log p of each code given those before it, (B, h, w) float64 nats; its sum over a map is ``log_prob``."""
        codes = check_codes(self, codes)
        context, label = check_inputs(self, len(codes), context, label)
        with evaluating(self):
            return -exact(self._nats(codes, context, label))

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
        """One map per index of ``noise``, (B, h, w) int64, by inverse CDF with one uniform per code, in scan order.

        Raises:
            InputError: guidance without a label, or by a prior that was trained without label dropout.
            DivergedError: the logits are not finite numbers.
        """
        batch = len(noise.indices)
        height, width = self.spec.target.height, self.spec.target.width
        context, label = check_inputs(self, batch, context, label)
        known, keep = check_mask(self, batch, known, keep)
        if known is not None and keep is not None:
            known, keep = (to_sequence(maps, self.scan) for maps in (known, keep))
        guided = options.guidance != 1.0
        if guided:
            self._check_guidance(label)
        u = noise.uniform("codes", height * width)
        u = u if self.device.type == "mps" else u.to(self.device)  # float64, which mps has not
        codes = torch.empty(batch, height * width, dtype=torch.int64, device=self.device)
        broken = torch.zeros((), dtype=torch.bool, device=self.device)
        with evaluating(self):
            conditional = self.stepper(batch, context, label)
            unconditional = self.stepper(batch, context, None) if guided else None
            previous: Tensor | None = None
            for position in range(height * width):
                logits = conditional.step(previous)
                if unconditional is not None:
                    base = at_least_float32(unconditional.step(previous))
                    logits = base + options.guidance * (at_least_float32(logits) - base)
                broken |= ~logits.amax(-1).isfinite().all()  # nan, inf, or no code left
                previous = draw(logits, u[:, position], options)
                if known is not None and keep is not None:
                    previous = torch.where(keep[:, position], known[:, position], previous)
                codes[:, position] = previous
        if broken:
            raise DivergedError(f"The prior '{self.name}' gives logits that are not finite numbers.", "Train it again.")
        return to_maps(codes, height, width, self.scan).contiguous()

    def _nats(self, codes: Tensor, context: Codes, label: Tensor | None) -> Tensor:
        """Cross-entropy (B, h, w) of each code in nats, in at least float32 whatever the autocast."""
        logits = at_least_float32(self.logits(codes, context, label))
        nats = F.cross_entropy(rearrange(logits, "b h w k -> (b h w) k"), codes.flatten(), reduction="none")
        return nats.view(codes.shape)

    def _check_guidance(self, label: Tensor | None) -> None:
        if label is None:
            raise InputError("Guidance needs a label to guide towards.", "Give one, or leave guidance at 1.")
        if not self.label_dropout > 0:
            raise InputError(
                f"This '{self.name}' was trained without label dropout, so it knows no unconditional codes to guide "
                "away from.",
                f"Train it again with --set priors.{self.name}.label_dropout=0.1, or leave guidance at 1.",
            )


class ReplayStepper:
    """The slow, plain way to walk the positions: a whole pass of ``prior.logits`` for each."""

    def __init__(self, prior: AutoregressivePrior, batch_size: int, context: Codes, label: Tensor | None) -> None:
        self.prior, self.context, self.label = prior, context, label
        target = prior.spec.target
        self.codes = torch.zeros(batch_size, target.height, target.width, dtype=torch.int64, device=prior.device)
        numbers = torch.arange(target.positions).view(1, target.height, target.width)
        self.places = [divmod(number, target.width) for number in to_sequence(numbers, prior.scan)[0].tolist()]
        self.position = 0

    def step(self, previous: Tensor | None) -> Tensor:
        if previous is not None:
            row, column = self.places[self.position - 1]
            self.codes[:, row, column] = previous
        row, column = self.places[self.position]
        self.position += 1
        return self.prior.logits(self.codes, self.context, self.label)[:, row, column]
