"""What a prior is: p(codes of one level | coarser levels, label).

`Prior` is the whole interface between a prior and the rest of the project. Priors that go code by code have more in
common: `priors.autoregressive`.

Densities are in nats here; people are shown bits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from priors.sampling import PLAIN, Noise, SampleOptions
from vqgen.codes import MAX_SIZE, Codes, LevelSpec
from vqgen.compiling import Part
from vqgen.config import Settings
from vqgen.errors import MismatchError
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
    classes: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
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

    @property
    def settled(self) -> float:
        """Share of the training before which no weights are kept as the best (`vqgen.task.Task.settled`)."""
        return 0.0

    def player_modules(self) -> dict[str, nn.Module]:
        """For each player the module that holds exactly its parameters."""
        return dict.fromkeys(self.players, self)

    def compilable(self) -> Sequence[Part]:
        """What ``training.compile`` compiles of it: methods of tensors alone, without collectives; none by default."""
        return ()

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


@runtime_checkable
class LatentPrior(Protocol):
    """A prior whose maps come from a latent vector z of d numbers, drawn from N(0, I)."""

    def encode_latent(self, codes: Tensor, context: Codes, label: Tensor | None) -> Tensor:
        """The z that given codes (B, h, w) most likely came from, its best guess: (B, d) float."""
        ...

    def decode_latent(
        self, z: Tensor, noise: Noise, context: Codes, label: Tensor | None, options: SampleOptions
    ) -> Tensor:
        """Codes (B, h, w) int64 drawn given z (B, d)."""
        ...


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
