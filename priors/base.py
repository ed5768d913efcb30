"""What a prior is: p(codes of one level | coarser levels, label).

`Prior` is the whole interface between a prior and the rest of the project. `AutoregressivePrior` adds, for
priors that factorise over positions in raster order, everything that follows from two methods (``logits`` and
``stepper``): the loss, the exact likelihood, its map over positions, sampling, guidance and masks.

Densities are in nats here; people are shown bits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.inputs import check_codes, check_inputs, check_mask
from priors.sampling import PLAIN, Noise, SampleOptions, draw, exact
from vqgen.codes import Codes, LevelSpec
from vqgen.config import Settings
from vqgen.errors import DivergedError, InputError, MismatchError
from vqgen.hub import HubModel

Batches = Iterable[tuple[Tensor, Codes, Tensor | None]]
"""Batches of (codes (B, h, w), coarser codes, labels (B,) or None)."""


@dataclass(frozen=True)
class PriorSpec:
    """What a prior is a density of; plain JSON, kept beside its weights."""

    target: LevelSpec
    """The level it models."""
    context: tuple[LevelSpec, ...] = ()
    """The coarser levels it is given, coarse to fine."""
    classes: int = 0
    """Number of labels; 0 where the data has none."""
    class_names: tuple[str, ...] = ()
    codec_fingerprint: str = ""
    """Fingerprint of the codec whose codes these are."""


class Density(NamedTuple):
    """Log-density of each map of a batch, (B,) float64 each."""

    nats: Tensor
    """log p(codes | context, label); of a bound, the lower bound on it."""
    standard_error: Tensor
    """Standard error of ``nats``; 0 where it is exact."""
    ess: Tensor
    """Effective number of samples behind the estimate; inf where it is exact."""

    @classmethod
    def exact(cls, nats: Tensor) -> Density:
        """A density known without error."""
        return cls(nats, torch.zeros_like(nats), torch.full_like(nats, math.inf))


class Prior(HubModel):
    """p(codes of one level | coarser levels, label).

    The signature of the constructor never grows: all choices are in ``config``, all shapes in ``spec``.
    Codebooks are in neither: a prior that wants them registers the buffers ``codebook`` (K, D) and
    ``context_codebook_0``, ``context_codebook_1``..., which are filled before ``prepare`` and saved with the
    weights.
    """

    kind = "prior"
    Spec = PriorSpec

    name: ClassVar[str]
    """The name it is registered and saved under."""
    likelihood: ClassVar[Literal["exact", "bound", "none"]]
    """What ``log_prob`` returns: the log-density, a lower bound on it, or nothing."""
    summary: ClassVar[str] = ""
    """One line for people who choose a prior."""
    Config: ClassVar[type[Settings]]
    """Settings of the architecture, a docstring under each field."""
    training_defaults: ClassVar[Mapping[str, Any]] = {"steps": 10000}
    """Training settings under the user's own."""
    players: tuple[str, ...] = ("model",)
    """Optimised in turn at each step; none for a prior that is complete after ``prepare``."""

    config: Settings
    spec: PriorSpec

    def __init__(self, config: Settings | Mapping[str, Any], spec: PriorSpec) -> None:
        super().__init__(config, spec)

    @classmethod
    def class_for(cls, name: str) -> type[HubModel]:
        """The registered class of that name; an unregistered class knows itself only.

        Raises:
            InputError: no prior of that name is known.
            MismatchError: it is another prior than the one asked for.
        """
        if name == getattr(cls, "name", None):
            return cls
        from priors.registry import get

        found = get(name)
        if not issubclass(found, cls):
            raise MismatchError(f"Expected a prior of type '{getattr(cls, 'name', cls.__name__)}', found '{name}'.")
        return found

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        first = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    def player_modules(self) -> dict[str, nn.Module]:
        """For each player the module that holds exactly its parameters."""
        return dict.fromkeys(self.players, self)

    def prepare(self, batches: Batches) -> None:
        """Once before training, over the training codes: what is counted rather than learned, into buffers.

        On several processes each one is given its share of the codes and adds up with the others.
        """

    def calibrate(self, batches: Batches) -> None:
        """Once after training, on the weights that are kept, over the validation codes."""

    def set_codebooks(self, target: Tensor, context: Sequence[Tensor] = ()) -> None:
        """Keep the codebooks (K, D) of the target and context levels, if the prior has buffers for them.

        Raises:
            MismatchError: a codebook of another shape than its buffer.
        """
        own = dict(self.named_buffers(recurse=False))
        books = {"codebook": target, **{f"context_codebook_{i}": book for i, book in enumerate(context)}}
        for key, book in books.items():
            if key not in own:
                continue
            if own[key].shape != book.shape:
                raise MismatchError(f"{key}: expected shape {list(own[key].shape)}, got {list(book.shape)}.")
            own[key].copy_(book.detach())

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
        """The training loss of one player, under ``loss`` (nats per code where it is a likelihood), and scalars to log.

        codes (B, h, w) int64; context one (B, h_i, w_i) int64 per coarser level; label (B,) int64 or None;
        progress in [0, 1] and step say how far training is.
        """
        raise NotImplementedError

    def sample(
        self,
        noise: Noise,
        context: Codes = (),
        label: Tensor | None = None,
        options: SampleOptions = PLAIN,
        known: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """One map per index of ``noise``, (B, h, w) int64; a function of the noise and the other arguments only.

        known (B, h, w) int64 and keep (B, h, w) bool: where ``keep`` is true the known code is kept.
        """
        raise NotImplementedError

    def log_prob(
        self,
        codes: Tensor,
        context: Codes = (),
        label: Tensor | None = None,
        *,
        noise: Noise | None = None,
        samples: int = 64,
    ) -> Density:
        """log p of each map, nats per map; ``noise`` and ``samples`` are for estimates.

        Called under ``no_grad``, never under ``inference_mode``: a prior that needs gradients enables them itself.
        """
        raise NotImplementedError


class Stepper(Protocol):
    """Walks the positions of a batch of maps in raster order."""

    def step(self, previous: Tensor | None) -> Tensor:
        """Logits (B, K) of the next position; ``previous`` is the (B,) int64 code of the last one, None at first."""
        ...


class AutoregressivePrior(Prior):
    """A prior that predicts each code from those before it in raster order: row by row, left to right.

    A subclass gives ``logits``, and ``stepper`` where it can do better than one whole pass per position. Its
    settings may have ``label_dropout``, the share of training maps whose label is hidden, which is what
    classifier-free guidance needs.

    Known codes are an approximation: each position sees the kept codes before it in the scan, not those after.
    """

    likelihood = "exact"

    def logits(self, codes: Tensor, context: Codes = (), label: Tensor | None = None) -> Tensor:
        """Logits (B, h, w, K) of all positions in one pass; position i sees only codes before i, context and label.

        A label equal to the number of classes, as ``label=None``, means "no label".
        """
        raise NotImplementedError

    def stepper(self, batch_size: int, context: Codes = (), label: Tensor | None = None) -> Stepper:
        """A walk over ``batch_size`` maps that gives the same logits as ``logits``, one position at a time.

        This default makes one whole pass per position; the faster ones are checked against it.
        """
        return ReplayStepper(self, batch_size, context, label)

    @property
    def label_dropout(self) -> float:
        """Share of training maps whose label was hidden."""
        return float(getattr(self.config, "label_dropout", 0.0)) if self.spec.classes else 0.0

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
        """One map per index of ``noise``, (B, h, w) int64, by inverse CDF with one uniform per code.

        Raises:
            InputError: guidance without a label, or by a prior that was trained without label dropout.
            DivergedError: the logits are not finite numbers.
        """
        batch = len(noise.indices)
        height, width = self.spec.target.height, self.spec.target.width
        context, label = check_inputs(self, batch, context, label)
        known, keep = check_mask(self, batch, known, keep)
        if known is not None and keep is not None:
            known, keep = (rearrange(mask, "b h w -> b (h w)") for mask in (known, keep))
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
        return rearrange(codes, "b (h w) -> b h w", h=height, w=width)

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
        self.position = 0

    def step(self, previous: Tensor | None) -> Tensor:
        width = self.prior.spec.target.width
        if previous is not None:
            row, column = divmod(self.position - 1, width)
            self.codes[:, row, column] = previous
        row, column = divmod(self.position, width)
        self.position += 1
        return self.prior.logits(self.codes, self.context, self.label)[:, row, column]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each submodule's own mode again after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def at_least_float32(values: Tensor) -> Tensor:
    """``values`` in float32, or as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()
